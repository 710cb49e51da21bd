// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The connection to another process, which may be slow, or broken, or gone.
//!
//! The `vhost` crate waits for answers as long as it takes. So a watch on an I/O thread shuts the socket down
//! when the time of an exchange is over, and the wait ends with an error. The same watch sees when the
//! other side hangs up. A connection that has failed once is of no use any more: nobody knows what the
//! other side has understood.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use parking_lot::Mutex;
use vhost::vhost_user::{Error as ProtocolError, Frontend};
use vmm_sys_util::timerfd::TimerFd;

use super::VhostUserError;
use crate::backend::unix_socket;
use crate::io_thread::{IoHandle, Worker, WorkerSet};

/// How long the other side may take until it has begun to talk.
const CONNECT_TIME: Duration = Duration::from_secs(10);
/// How long it may take for an exchange of messages later; a vCPU may be waiting.
const EXCHANGE_TIME: Duration = Duration::from_millis(if cfg!(test) { 500 } else { 5000 });
/// Between attempts to connect to a socket with a full queue.
const RETRY_INTERVAL: Duration = Duration::from_millis(5);

/// Called once, on the I/O thread, when the other side has gone.
pub(super) type OnLost = Box<dyn FnOnce() + Send>;

/// A connection.
pub(super) struct Connection {
    path: PathBuf,
    socket: UnixStream,
    talk: Mutex<Talk>,
    lost: AtomicBool,
}

/// What one exchange at a time uses.
struct Talk {
    frontend: Frontend,
    timer: TimerFd,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("path", &self.path).field("lost", &self.lost).finish()
    }
}

impl Connection {
    /// Connect to the socket at `path` for a device with `queues` queues, and watch the connection on the
    /// thread of `io` as long as the returned set lives.
    pub(super) fn open(
        path: &Path,
        queues: u64,
        io: &IoHandle,
        on_lost: OnLost,
    ) -> Result<(Arc<Self>, WorkerSet), VhostUserError> {
        let connect = |source| VhostUserError::Connect { path: path.to_owned(), source };
        let watch = |source| VhostUserError::Watch { path: path.to_owned(), source };
        let stream = connect_within(path, CONNECT_TIME).map_err(connect)?;
        let socket = stream.try_clone().map_err(watch)?;
        let timer = new_timer().map_err(watch)?;
        // SAFETY: dup takes a number only, and its result is checked.
        let expiry = match unsafe { libc::fcntl(timer.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 0) } {
            -1 => return Err(watch(io::Error::last_os_error())),
            // SAFETY: the descriptor is new, so nobody else owns it.
            fd => File::from(unsafe { OwnedFd::from_raw_fd(fd) }),
        };
        let talk = Talk { frontend: Frontend::from_stream(stream, queues), timer };
        let connection = Arc::new(Self {
            path: path.to_owned(),
            socket,
            talk: Mutex::new(talk),
            lost: AtomicBool::new(false),
        });
        let worker = Watch { connection: Arc::clone(&connection), expiry, on_lost: Some(on_lost) };
        let mut watching = WorkerSet::default();
        watching.add(io, Box::new(worker)).map_err(|error| watch(io::Error::other(error)))?;
        Ok((connection, watching))
    }

    /// Whether the other side is gone, or was given up.
    pub(super) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    /// Exchange the first messages, which may have to wait for the other side to start.
    pub(super) fn begin<T>(
        &self,
        attempted: &str,
        messages: impl FnOnce(&mut Frontend) -> vhost::Result<T>,
    ) -> Result<T, VhostUserError> {
        self.within(CONNECT_TIME, attempted, messages)
    }

    /// Exchange messages, which `attempted` describes. When this fails for any other reason than the other
    /// side's refusal, the connection is lost.
    pub(super) fn exchange<T>(
        &self,
        attempted: &str,
        messages: impl FnOnce(&mut Frontend) -> vhost::Result<T>,
    ) -> Result<T, VhostUserError> {
        self.within(EXCHANGE_TIME, attempted, messages)
    }

    fn within<T>(
        &self,
        time: Duration,
        attempted: &str,
        messages: impl FnOnce(&mut Frontend) -> vhost::Result<T>,
    ) -> Result<T, VhostUserError> {
        let mut talk = self.talk.lock();
        if self.is_lost() {
            return Err(self.failed(attempted, "it is gone".into()));
        }
        let watch = |error: vmm_sys_util::errno::Error| VhostUserError::Watch {
            path: self.path.clone(),
            source: error.into(),
        };
        talk.timer.reset(time, None).map_err(watch)?;
        let result = messages(&mut talk.frontend);
        talk.timer.clear().map_err(watch)?;
        result.map_err(|error| {
            let timed_out = self.is_lost();
            if !is_refusal(&error) {
                self.give_up();
            }
            self.failed(
                attempted,
                match error {
                    _ if timed_out => {
                        format!("no answer within {time:?}, or gone meanwhile")
                    }
                    vhost::Error::VhostUserProtocol(error) => error.to_string(),
                    error => error.to_string(),
                },
            )
        })
    }

    fn failed(&self, attempted: &str, problem: String) -> VhostUserError {
        let (path, attempted) = (self.path.clone(), attempted.to_owned());
        VhostUserError::Failed { path, attempted, problem }
    }

    /// Say that the daemon cannot be used.
    pub(super) fn unfit(&self, problem: impl Into<String>) -> VhostUserError {
        VhostUserError::Unfit { path: self.path.clone(), problem: problem.into() }
    }

    /// End the connection. Whoever waits for an answer gets an error, and the watch sees it.
    fn give_up(&self) {
        self.lost.store(true, Ordering::Release);
        // It fails only where the other side has ended it already.
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}

/// Whether the other side understood and said no, or the message was not sent at all.
fn is_refusal(error: &vhost::Error) -> bool {
    matches!(
        error,
        vhost::Error::VhostUserProtocol(
            ProtocolError::BackendInternalError
                | ProtocolError::InvalidParam
                | ProtocolError::InactiveFeature(_)
                | ProtocolError::InactiveOperation(_)
        )
    )
}

/// Connect to a listener, whose queue may be full.
fn connect_within(path: &Path, time: Duration) -> io::Result<UnixStream> {
    let end = Instant::now() + time;
    loop {
        match unix_socket::connect(path) {
            Ok(stream) => {
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < end => {
                thread::sleep(RETRY_INTERVAL);
            }
            Err(error) => return Err(error),
        }
    }
}

/// A timer whose reader does not wait.
fn new_timer() -> io::Result<TimerFd> {
    let flags = libc::TFD_NONBLOCK | libc::TFD_CLOEXEC;
    // SAFETY: the call takes numbers only.
    match unsafe { libc::timerfd_create(libc::CLOCK_MONOTONIC, flags) } {
        -1 => Err(io::Error::last_os_error()),
        // SAFETY: the descriptor is a new timer, so nobody else owns it.
        fd => Ok(unsafe { TimerFd::from_raw_fd(fd) }),
    }
}

/// Sees on an I/O thread when an exchange takes too long, and when the other side hangs up.
struct Watch {
    connection: Arc<Connection>,
    /// The timer of the exchange.
    expiry: File,
    on_lost: Option<OnLost>,
}

impl Watch {
    /// epoll's names for what is waited for.
    const SOCKET: u32 = 0;
    const EXPIRY: u32 = 1;

    fn socket_events(&self) -> Events {
        Events::with_data(&self.connection.socket, Self::SOCKET, EventSet::READ_HANG_UP)
    }

    fn lost(&mut self) {
        self.connection.give_up();
        if let Some(on_lost) = self.on_lost.take() {
            log::warn!("vhost-user daemon at {} is gone", self.connection.path.display());
            on_lost();
        }
    }
}

impl MutEventSubscriber for Watch {
    fn init(&mut self, ops: &mut EventOps) {
        let expiry = Events::with_data(&self.expiry, Self::EXPIRY, EventSet::IN);
        if let Err(error) = ops.add(self.socket_events()).and_then(|()| ops.add(expiry)) {
            log::error!("watch vhost-user daemon: {error}");
            self.lost();
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if events.data() == Self::SOCKET {
            // It would be told again and again.
            if let Err(error) = ops.remove(self.socket_events()) {
                log::error!("stop to watch vhost-user daemon: {error}");
            }
            self.lost();
            return;
        }
        // An exchange that ended in time has stopped the timer, and there is nothing to read.
        if self.expiry.read(&mut [0; 8]).is_ok() {
            let path = self.connection.path.display();
            log::error!("vhost-user daemon at {path} does not answer, and is given up");
            self.connection.give_up();
        }
    }
}

impl Worker for Watch {}
