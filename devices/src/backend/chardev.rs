// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Character backends: where the bytes of a serial line or console go to and come from.
//!
//! A [`Chardev`] belongs to the machine, a [`CharPort`] to the device in front of it. The port only
//! touches memory, so a device never waits for the host: a worker on an I/O thread does all reading and
//! writing. Output that nobody takes is dropped, except for its last [`TAIL`] bytes, which are kept to
//! be shown when the guest fails. Input is read only as fast as the device takes it.
//!
//! Left out: several clients at once, TCP, pseudo-terminals, reconnecting as a client.

use std::collections::VecDeque;
use std::fmt;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::Mutex;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::stream::{Direction, Stream};
use super::unix_socket::{UnixSocket, UnixSocketError};
use crate::io_thread::{IoHandle, IoThreadError, WorkerId};
use worker::CharWorker;

mod worker;

/// Most bytes of output kept for somebody who is connected but slow; what comes after is dropped.
pub const PENDING: usize = 64 << 10;

/// How many bytes of the last output are kept for [`Chardev::tail`].
pub const TAIL: usize = 16 << 10;

/// What a character backend is to be made of.
#[derive(Debug)]
pub enum ChardevSpec {
    /// Output goes nowhere and there is no input.
    Null,
    /// Open descriptors, such as a terminal. Their flags are left as they are.
    Fds {
        /// Where input comes from, if there is any.
        input: Option<OwnedFd>,
        /// Where output goes.
        output: OwnedFd,
    },
    /// Output is appended to a file; there is no input.
    File {
        /// The file, made if it is missing.
        path: PathBuf,
    },
    /// A listening unix socket. One client at a time; others wait until it has left.
    Unix {
        /// Where to listen.
        path: PathBuf,
    },
}

/// Why a character backend could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum ChardevError {
    /// The socket could not be made.
    #[error(transparent)]
    Socket(#[from] UnixSocketError),
    /// The system refused.
    #[error("{attempted}: {source}")]
    Open {
        /// What was attempted, with its value.
        attempted: String,
        /// Why it failed.
        source: io::Error,
    },
    /// There is no thread to serve it.
    #[error("start to serve a character backend: {0}")]
    Thread(#[from] IoThreadError),
}

/// A device's receiving side.
pub trait CharSink: Send {
    /// Take as much of `data` as there is room for and return how much that was. A device that did not
    /// take everything calls [`CharPort::resume`] when it can take more.
    fn receive(&mut self, data: &[u8]) -> usize;

    /// Somebody on the host has begun (`true`) or ceased to take output.
    fn opened(&mut self, _open: bool) {}
}

/// An open character backend. Dropping it writes what can be written at once, and closes it.
#[derive(Debug)]
pub struct Chardev {
    filename: String,
    shared: Arc<Shared>,
    /// Who serves it; `None` when there is nothing to serve.
    worker: Option<(IoHandle, WorkerId)>,
}

impl Chardev {
    /// Open what `spec` describes and serve it on the thread of `io`.
    ///
    /// # Errors
    /// See [`ChardevError`].
    pub fn open(spec: ChardevSpec, io: &IoHandle) -> Result<Self, ChardevError> {
        let fail = |attempted: String| |source| ChardevError::Open { attempted, source };
        let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
            .map_err(fail("make an eventfd for a character backend".into()))?;
        let shared = Arc::new(Shared { wake, output: Mutex::default(), sink: Mutex::default() });
        let stream = |fd: OwnedFd, direction| {
            let attempted = format!("use a descriptor as character {direction:?}");
            Stream::new(fd, direction).map_err(fail(attempted))
        };
        let worker = |shared: &Arc<Shared>| CharWorker::new(Arc::clone(shared));
        let (filename, worker) = match spec {
            ChardevSpec::Null => ("null".into(), None),
            ChardevSpec::Fds { input, output } => {
                let input = input.map(|fd| stream(fd, Direction::Input)).transpose()?;
                let output = stream(output, Direction::Output)?;
                ("stdio".into(), Some(worker(&shared).with_streams(input, output)))
            }
            ChardevSpec::File { path } => {
                let attempted = format!("open {path:?} to append character output");
                let file = OpenOptions::new()
                    .append(true)
                    .create(true)
                    // A FIFO that nobody reads is an error, not a reason to wait.
                    .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
                    .open(&path);
                let output = stream(file.map_err(fail(attempted))?.into(), Direction::Output)?;
                ("file".into(), Some(worker(&shared).with_streams(None, output)))
            }
            ChardevSpec::Unix { path } => {
                let socket = UnixSocket::bind(&path)?;
                let filename = format!("unix:{},server=on", path.display());
                (filename, Some(worker(&shared).with_listener(socket)))
            }
        };
        let worker = match worker {
            Some(worker) => Some((io.clone(), io.add(Box::new(worker))?)),
            None => None,
        };
        Ok(Self { filename, shared, worker })
    }

    /// The end for a device. There may be several for output; the last one connected gets the input.
    pub fn port(&self) -> CharPort {
        CharPort(Arc::clone(&self.shared))
    }

    /// Whether somebody takes output now.
    pub fn is_open(&self) -> bool {
        self.shared.output.lock().open
    }

    /// What it is, in QEMU's notation: `null`, `stdio`, `file`, `unix:PATH,server=on`; the last with
    /// `disconnected:` before it while there is no client.
    pub fn filename(&self) -> String {
        let waits = self.filename.starts_with("unix:") && !self.is_open();
        format!("{}{}", if waits { "disconnected:" } else { "" }, self.filename)
    }

    /// The last bytes of output, whether somebody took them or not.
    pub fn tail(&self) -> Vec<u8> {
        self.shared.output.lock().tail.iter().copied().collect()
    }
}

impl Drop for Chardev {
    fn drop(&mut self) {
        if let Some((io, id)) = self.worker.take()
            && let Err(error) = io.remove(id)
        {
            // The thread has ended, and the worker with it.
            log::debug!("character backend {}: {error}", self.filename);
        }
        // The sink usually holds the device, which holds a port, which holds the sink.
        let sink = self.shared.sink.lock().take();
        drop(sink);
    }
}

/// A device's end of a character backend. No call on it waits for the host.
#[derive(Debug, Clone)]
pub struct CharPort(Arc<Shared>);

impl CharPort {
    /// Deliver input to `sink` from now on, from the backend's thread. Not to be called while holding
    /// a lock that the sink takes.
    pub fn connect(&self, mut sink: Box<dyn CharSink>) {
        let mut slot = self.0.sink.lock();
        sink.opened(self.0.output.lock().open);
        *slot = Some(sink);
        drop(slot);
        self.0.wake();
    }

    /// Deliver no more input; it stays with the host. Returns when no delivery is under way.
    pub fn disconnect(&self) {
        let sink = self.0.sink.lock().take();
        drop(sink);
    }

    /// There is room again for input that [`CharSink::receive`] did not take.
    pub fn resume(&self) {
        self.0.wake();
    }

    /// Put out all of `data`, as far as somebody takes it.
    pub fn put(&self, data: &[u8]) {
        let mut output = self.0.output.lock();
        let kept = &data[data.len().saturating_sub(TAIL)..];
        let excess = (output.tail.len() + kept.len()).saturating_sub(TAIL);
        output.tail.drain(..excess);
        output.tail.extend(kept);
        if !output.open {
            return;
        }
        let was_empty = output.pending.is_empty();
        let room = PENDING.saturating_sub(output.pending.len());
        output.pending.extend(&data[..data.len().min(room)]);
        drop(output);
        // Whoever empties the buffer looks again before it sleeps, so only the first byte must wake it.
        if was_empty && !data.is_empty() {
            self.0.wake();
        }
    }
}

/// Never fails and never waits: what nobody takes is dropped.
impl Write for CharPort {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.put(data);
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What ports and worker share. Lock order: `sink` before `output`.
struct Shared {
    /// Wakes the worker: there is output, or room for input, or a new sink.
    wake: EventFd,
    output: Mutex<Output>,
    sink: Mutex<Option<Box<dyn CharSink>>>,
}

#[derive(Debug, Default)]
struct Output {
    /// Somebody takes output.
    open: bool,
    /// Not yet written; at most [`PENDING`] bytes, and empty unless `open`.
    pending: VecDeque<u8>,
    /// At most [`TAIL`] bytes.
    tail: VecDeque<u8>,
}

impl Shared {
    fn wake(&self) {
        // It can only fail when the counter is full, and then the worker is being woken already.
        let _ = self.wake.write(1);
    }

    /// Begin or cease to keep output for somebody on the host.
    fn set_open(&self, open: bool) {
        let mut sink = self.sink.lock();
        let mut output = self.output.lock();
        output.pending.clear();
        let changed = std::mem::replace(&mut output.open, open) != open;
        drop(output);
        if let (true, Some(sink)) = (changed, &mut *sink) {
            sink.opened(open);
        }
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("output", &self.output).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
