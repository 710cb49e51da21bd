// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The socket and its clients.
//!
//! All descriptors stand in an epoll set of the server's own, so whoever runs the server polls one descriptor.
//! Nothing here waits: a client that does not read is not served any further, and given up when events pile up
//! for it.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use ecr_devices::backend::unix_socket::UnixSocket;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::Controller;
use super::backends::Backends;
use super::codec::write_line;
use super::event::EventMessage;
use super::fds::MAX_WAITING;
use super::session::Session;
use crate::control::{Event, EventKind};

/// Most clients at a time.
const MAX_CLIENTS: usize = 16;
/// Most bytes taken from a client in one turn, so that the others get theirs.
const TURN: usize = 16 << 10;
/// The listening socket's token in the epoll set; clients have those above.
const LISTENER: u64 = 0;

/// A QMP server on a listening socket.
#[derive(Debug)]
pub struct Server {
    socket: UnixSocket,
    epoll: Epoll,
    clients: BTreeMap<u64, Client>,
    next_token: u64,
    backends: Backends,
}

/// A connection.
#[derive(Debug)]
struct Client {
    stream: UnixStream,
    session: Session,
    /// What the epoll set waits for.
    interest: EventSet,
    /// The client will send no more.
    at_end: bool,
}

impl Server {
    /// Serve the clients of `socket`.
    ///
    /// # Errors
    /// The system refused an epoll set.
    pub fn new(socket: UnixSocket) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        // Edge-triggered: where the process is out of descriptors, a client that cannot be accepted
        // must not wake us for ever; the next one that connects does.
        let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, LISTENER);
        epoll.ctl(ControlOperation::Add, socket.as_raw_fd(), event)?;
        Ok(Self {
            socket,
            epoll,
            clients: BTreeMap::new(),
            next_token: LISTENER + 1,
            backends: Backends::default(),
        })
    }

    /// Do all that can be done now. To be called when the server's descriptor is readable.
    pub fn dispatch(&mut self, controller: &mut dyn Controller) {
        let mut ready = [EpollEvent::default(); MAX_CLIENTS + 1];
        let count = match self.epoll.wait(0, &mut ready) {
            Ok(count) => count,
            Err(error) => {
                // Interrupted: the descriptor stays readable.
                log::debug!("wait for QMP clients: {error}");
                return;
            }
        };
        for event in ready.iter().take(count) {
            if event.data() == LISTENER {
                self.accept();
            } else {
                self.serve(event.data(), event.event_set(), controller);
            }
        }
    }

    /// Tell all clients that have negotiated.
    pub fn broadcast(&mut self, events: &[Event]) {
        for event in events {
            if let EventKind::DeviceDeleted { id } = &event.kind {
                self.backends.released(id);
            }
            let mut line = Vec::new();
            write_line(&mut line, &EventMessage::from(event));
            for client in self.clients.values_mut() {
                client.session.notify(&line);
            }
        }
        if !events.is_empty() {
            let Self { epoll, clients, .. } = self;
            clients.retain(|&token, client| client.flush(epoll, token));
        }
    }

    fn accept(&mut self) {
        loop {
            let stream = match self.socket.accept() {
                Ok(stream) => stream,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => {
                    log::warn!("accept a QMP client: {error}");
                    return;
                }
            };
            if self.clients.len() == MAX_CLIENTS {
                log::warn!("a QMP client was turned away: {MAX_CLIENTS} are connected");
                continue;
            }
            let token = self.next_token;
            self.next_token += 1;
            match Client::new(stream, &self.epoll, token) {
                Ok(mut client) => {
                    if client.flush(&self.epoll, token) {
                        self.clients.insert(token, client);
                    }
                }
                Err(error) => log::warn!("serve a QMP client: {error}"),
            }
        }
    }

    /// Serve one client for one turn.
    fn serve(&mut self, token: u64, events: EventSet, controller: &mut dyn Controller) {
        let mut may_read = events.contains(EventSet::IN);
        if !may_read && events.intersects(EventSet::ERROR | EventSet::HANG_UP) {
            self.clients.remove(&token);
            return;
        }
        loop {
            let caught_up = self.answer(token, controller);
            // An event may have been the last straw for it.
            let Some(client) = self.clients.get_mut(&token) else { return };
            if !client.flush(&self.epoll, token) {
                self.clients.remove(&token);
                return;
            }
            if client.session.is_paused() {
                return;
            }
            if !caught_up {
                continue;
            }
            if client.at_end && client.session.output().is_empty() {
                self.clients.remove(&token);
                return;
            }
            if !may_read {
                return;
            }
            may_read = false;
            client.read();
        }
    }

    /// Answer what a client has asked for, as long as it takes the answers. Returns whether nothing is left.
    fn answer(&mut self, token: u64, controller: &mut dyn Controller) -> bool {
        loop {
            let Some(client) = self.clients.get_mut(&token) else { return true };
            if client.session.is_paused() {
                return false;
            }
            let answer = client.session.next_answer(&mut self.backends, controller);
            let Some(answer) = answer else { return true };
            self.broadcast(&controller.take_events());
            if let Some(client) = self.clients.get_mut(&token) {
                client.session.answer(&answer);
            }
        }
    }
}

impl AsRawFd for Server {
    fn as_raw_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }
}

impl Client {
    fn new(stream: UnixStream, epoll: &Epoll, token: u64) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        let interest = EventSet::IN;
        epoll.ctl(ControlOperation::Add, stream.as_raw_fd(), EpollEvent::new(interest, token))?;
        Ok(Self { stream, session: Session::new(), interest, at_end: false })
    }

    /// Take what the client sent, with the descriptors that come along. Those for which no room is offered are
    /// closed by the kernel (unix(7)).
    fn read(&mut self) {
        let mut bytes = [0; TURN];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_WAITING))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC;
        let received =
            recvmsg(&self.stream, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags);
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                fds.for_each(|fd| self.session.receive_fd(fd));
            }
        }
        match received.map(|message| message.bytes).map_err(io::Error::from) {
            Ok(0) => self.at_end = true,
            Ok(length) => self.session.receive(bytes.get(..length).unwrap_or_default()),
            Err(error) if is_transient(&error) => {}
            Err(_) => self.at_end = true,
        }
    }

    /// Send what the client takes, and wait for what it may do next. Returns whether it is still there.
    fn flush(&mut self, epoll: &Epoll, token: u64) -> bool {
        while !self.session.output().is_empty() {
            match self.stream.write(self.session.output()) {
                Ok(length) => self.session.sent(length),
                Err(error) if is_transient(&error) => break,
                Err(_) => return false,
            }
        }
        if self.session.is_lost() {
            log::warn!("a QMP client does not read its events: connection closed");
            return false;
        }
        let mut interest = EventSet::empty();
        interest.set(EventSet::IN, !self.at_end && !self.session.is_paused());
        interest.set(EventSet::OUT, !self.session.output().is_empty());
        if interest == self.interest {
            return true;
        }
        self.interest = interest;
        let event = EpollEvent::new(interest, token);
        match epoll.ctl(ControlOperation::Modify, self.stream.as_raw_fd(), event) {
            Ok(()) => true,
            Err(error) => {
                log::warn!("serve a QMP client: {error}");
                false
            }
        }
    }
}

/// Whether the same may work later.
fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}
