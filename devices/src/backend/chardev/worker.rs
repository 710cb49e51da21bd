// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The side of a character backend that reads and writes, on an I/O thread.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use super::{CharSink, PENDING, Shared};
use crate::backend::stream::{Direction, Stream};
use crate::backend::unix_socket::UnixSocket;
use crate::io_thread::Worker;

/// Most bytes read or written by one system call.
const CHUNK: usize = 4 << 10;

const WAKE: u32 = 0;
const LISTENER: u32 = 1;
const INPUT: u32 = 2;
const OUTPUT: u32 = 3;

pub(super) struct CharWorker {
    shared: Arc<Shared>,
    listener: Option<UnixSocket>,
    input: Option<Input>,
    output: Option<Watched>,
}

struct Input {
    stream: Watched,
    /// Read but not yet taken by the device.
    unread: Vec<u8>,
}

/// A stream and what epoll is asked to say about it.
struct Watched {
    stream: Stream,
    token: u32,
    events: Option<EventSet>,
    /// epoll does not know files and /dev/null: these are always ready.
    always_ready: bool,
}

impl Watched {
    fn new(stream: Stream, token: u32) -> Self {
        Self { stream, token, events: None, always_ready: false }
    }

    /// Be told of `events`, and of errors and hang-ups; with `None`, of nothing.
    fn watch(&mut self, events: Option<EventSet>, ops: &mut EventOps) {
        if self.events == events || self.always_ready {
            return;
        }
        let set = events.unwrap_or(EventSet::empty());
        let request = Events::with_data(&self.stream, self.token, set);
        let result = match (self.events, events) {
            (None, _) => ops.add(request),
            (Some(_), Some(_)) => ops.modify(request),
            (Some(_), None) => ops.remove(request),
        };
        match result {
            Ok(()) => self.events = events,
            Err(_) => self.always_ready = true,
        }
    }
}

impl CharWorker {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared, listener: None, input: None, output: None }
    }

    pub(super) fn with_listener(mut self, listener: UnixSocket) -> Self {
        self.listener = Some(listener);
        self
    }

    pub(super) fn with_streams(mut self, input: Option<Stream>, output: Stream) -> Self {
        self.attach(input, output);
        self
    }

    fn attach(&mut self, input: Option<Stream>, output: Stream) {
        self.input =
            input.map(|stream| Input { stream: Watched::new(stream, INPUT), unread: Vec::new() });
        self.output = Some(Watched::new(output, OUTPUT));
        self.shared.set_open(true);
    }

    /// Take the next client, if nobody takes output at present. Input of the one before that the
    /// device has not taken yet is dropped.
    fn accept(&mut self, ops: &mut EventOps) {
        let Some(listener) = &self.listener else { return };
        if self.output.is_some() {
            return;
        }
        let client = listener.accept().and_then(|client| {
            let input = OwnedFd::from(client.try_clone()?);
            let input = Stream::new(input, Direction::Input)?;
            Ok((input, Stream::new(client.into(), Direction::Output)?))
        });
        match client {
            Ok((input, output)) => {
                let _ = ops.remove(Events::with_data(listener, LISTENER, EventSet::IN));
                self.close_input(ops);
                self.attach(Some(input), output);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => log::warn!("accept a client on {:?}: {error}", listener.path()),
        }
    }

    fn close_input(&mut self, ops: &mut EventOps) {
        if let Some(mut input) = self.input.take() {
            input.stream.watch(None, ops);
        }
    }

    /// Nobody takes output any more. What has been sent to us is still read.
    fn close_output(&mut self, ops: &mut EventOps) {
        let Some(mut output) = self.output.take() else { return };
        output.watch(None, ops);
        self.shared.set_open(false);
        self.listen(ops);
    }

    fn listen(&self, ops: &mut EventOps) {
        if let Some(listener) = &self.listener {
            // Edges only: a client that cannot be accepted, for want of descriptors, must not make us spin.
            let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
            let events = Events::with_data(listener, LISTENER, edge);
            if let Err(error) = ops.add(events) {
                log::error!("watch {:?} for clients: {error}", listener.path());
            }
        }
    }

    fn pump_output(&mut self, ops: &mut EventOps) {
        let Some(output) = &mut self.output else { return };
        match write_pending(&self.shared, &output.stream) {
            Ok(Written::All) => output.watch(Some(EventSet::empty()), ops),
            Ok(Written::Blocked) => output.watch(Some(EventSet::OUT), ops),
            Ok(Written::Enough) => self.shared.wake(),
            Err(error) => {
                log::debug!("write character output: {error}");
                self.close_output(ops);
            }
        }
    }

    /// Deliver what was read before, or what there is to read now; not both, so that one busy peer does
    /// not keep the thread.
    fn pump_input(&mut self, ops: &mut EventOps) {
        let Some(input) = &mut self.input else { return };
        let mut sink = self.shared.sink.lock();
        match sink.as_mut().map_or(Ok(Delivered::Held), |sink| input.deliver(sink.as_mut())) {
            Ok(Delivered::All) => {
                input.stream.watch(Some(EventSet::IN), ops);
                if input.stream.always_ready {
                    self.shared.wake();
                }
            }
            Ok(Delivered::Held) => input.stream.watch(None, ops),
            Err(error) => {
                drop(sink);
                log::debug!("character input ends: {error}");
                self.close_input(ops);
            }
        }
    }
}

enum Delivered {
    /// The device took everything.
    All,
    /// The device has no room.
    Held,
}

impl Input {
    fn deliver(&mut self, sink: &mut dyn CharSink) -> io::Result<Delivered> {
        if self.unread.is_empty() {
            let mut chunk = [0; CHUNK];
            match self.stream.stream.read(&mut chunk) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => self.unread.extend_from_slice(&chunk[..n]),
                Err(error) if is_transient(&error) => return Ok(Delivered::All),
                Err(error) => return Err(error),
            }
        }
        let taken = sink.receive(&self.unread).min(self.unread.len());
        self.unread.drain(..taken);
        Ok(if self.unread.is_empty() { Delivered::All } else { Delivered::Held })
    }
}

enum Written {
    /// Nothing is left.
    All,
    /// The peer is slow.
    Blocked,
    /// As much as one turn may write.
    Enough,
}

/// Write what is pending, without holding its lock meanwhile.
fn write_pending(shared: &Shared, stream: &Stream) -> io::Result<Written> {
    let mut chunk = [0; CHUNK];
    for _ in 0..PENDING / CHUNK {
        let length = {
            let output = shared.output.lock();
            let pending = output.pending.as_slices().0;
            let length = pending.len().min(CHUNK);
            chunk[..length].copy_from_slice(&pending[..length]);
            length
        };
        if length == 0 {
            return Ok(Written::All);
        }
        match stream.write(&chunk[..length]) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => drop(shared.output.lock().pending.drain(..n)),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Written::Blocked),
            Err(error) => return Err(error),
        }
    }
    Ok(Written::Enough)
}

fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

impl MutEventSubscriber for CharWorker {
    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::with_data(&self.shared.wake, WAKE, EventSet::IN)) {
            log::error!("watch a character backend: {error}");
        }
        if self.output.is_none() {
            self.listen(ops);
        }
        self.pump_output(ops);
        self.pump_input(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let ended = events.event_set().intersects(EventSet::HANG_UP | EventSet::ERROR);
        match events.data() {
            WAKE => {
                let _ = self.shared.wake.read();
            }
            LISTENER => self.accept(ops),
            OUTPUT if ended => self.close_output(ops),
            _ => {}
        }
        self.pump_output(ops);
        self.pump_input(ops);
    }
}

impl Worker for CharWorker {}

impl Drop for CharWorker {
    fn drop(&mut self) {
        if let Some(output) = &self.output {
            // The guest's last words. What does not go at once is lost: a slow peer must not hold us.
            let _ = write_pending(&self.shared, &output.stream);
        }
        self.shared.set_open(false);
    }
}
