// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! A logging program, as containerd's `binary://` defines it: it reads standard output from file descriptor 3 and
//! standard error from 4, and closes 5 when it is ready. It is told the container by `CONTAINER_ID` and
//! `CONTAINER_NAMESPACE`.

use std::env;
use std::ffi::{CString, OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::spawn::{PosixSpawnAttr, PosixSpawnFileActions, posix_spawn};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, pipe2};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::time::timeout;

use super::sink::Sink;
use crate::error::{Error, Kind, Result};

/// How long a program may take to be ready.
const READY: Duration = Duration::from_secs(10);

/// Once its streams are closed, a program may take so long to end by itself; then it is asked to.
const ASK: Duration = Duration::from_secs(2);

/// Then it is killed.
const KILL: Duration = Duration::from_secs(12);

/// Descriptors that the program must not get where it expects others lie below this.
const ABOVE_ALL: i32 = 10;

/// A running logging program. Dropped, it is seen to its end.
#[derive(Debug)]
pub struct Logger {
    pid: Pid,
}

impl Logger {
    /// Start the program; returns the ends of its two streams.
    pub async fn start(
        path: &Path,
        args: &[OsString],
        namespace: &str,
        container: &str,
    ) -> Result<(Self, [Sink; 2])> {
        let failed = |error: io::Error| {
            let text = format!("start logging program {}: {error}", path.display());
            Error::new(Kind::InvalidArgument, text)
        };
        let [stdout, stderr, ready] =
            [channel().map_err(failed)?, channel().map_err(failed)?, channel().map_err(failed)?];
        let inherited = [stdout.0.as_fd(), stderr.0.as_fd(), ready.1.as_fd()];
        let pid = spawn(path, args, namespace, container, inherited).map_err(failed)?;
        let logger = Self { pid };
        // Only the program must hold them.
        drop((stdout.0, stderr.0, ready.1));
        wait_ready(ready.0).await.map_err(failed)?;
        let stdout = pipe::Sender::from_owned_fd(stdout.1).map_err(failed)?;
        let stderr = pipe::Sender::from_owned_fd(stderr.1).map_err(failed)?;
        Ok((logger, [Sink::pipe(stdout), Sink::pipe(stderr)]))
    }
}

impl Drop for Logger {
    fn drop(&mut self) {
        let pid = self.pid;
        // If there can be no thread, the program is left to itself.
        let _ = thread::Builder::new().name("ecr-logger-end".into()).spawn(move || end(pid));
    }
}

/// A pipe whose ends, first the one to read from, are clear of the numbers that the program knows.
fn channel() -> io::Result<(OwnedFd, OwnedFd)> {
    let (read, write) = pipe2(OFlag::O_CLOEXEC)?;
    Ok((move_up(read.as_fd())?, move_up(write.as_fd())?))
}

fn move_up(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let number = fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(ABOVE_ALL))?;
    // SAFETY: the descriptor has just been made, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Start the program with `fds` as descriptors 3, 4 and 5. This process is not copied: it may hold a guest's memory.
fn spawn(
    path: &Path,
    args: &[OsString],
    namespace: &str,
    container: &str,
    fds: [BorrowedFd<'_>; 3],
) -> io::Result<Pid> {
    let mut actions = PosixSpawnFileActions::init()?;
    for (number, fd) in (3..).zip(fds) {
        actions.add_dup2(fd.as_raw_fd(), number)?;
    }
    for number in 0..3 {
        actions.add_open(number, c"/dev/null", OFlag::O_RDWR, nix::sys::stat::Mode::empty())?;
    }
    let mut argv = vec![c_string(path.as_os_str())?];
    for arg in args {
        argv.push(c_string(arg)?);
    }
    let mut environment = Vec::new();
    let told = [("CONTAINER_ID", container), ("CONTAINER_NAMESPACE", namespace)]
        .map(|(key, value)| (OsString::from(key), OsString::from(value)));
    for (key, value) in env::vars_os().chain(told) {
        let mut pair = key;
        pair.push("=");
        pair.push(value);
        environment.push(c_string(&pair)?);
    }
    Ok(posix_spawn(path, &actions, &PosixSpawnAttr::init()?, &argv, &environment)?)
}

fn c_string(text: &OsStr) -> io::Result<CString> {
    CString::new(OsString::from(text).into_vec())
        .map_err(|_| io::Error::other(format!("{:?} contains a zero", text.as_bytes())))
}

/// The program closes its end, or writes to it.
async fn wait_ready(ready: OwnedFd) -> io::Result<()> {
    let mut ready = pipe::Receiver::from_owned_fd(ready)?;
    let mut byte = [0];
    timeout(READY, ready.read(&mut byte))
        .await
        .map_err(|_| io::Error::other(format!("it was not ready within {READY:?}")))?
        .map(drop)
}

/// Its streams are closed, or about to be: see the program end.
fn end(pid: Pid) {
    let closed = Instant::now();
    let mut asked = false;
    loop {
        match waitpid(pid, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) => {}
            _ => return,
        }
        let waited = closed.elapsed();
        if waited >= KILL {
            let _ = kill(pid, Signal::SIGKILL);
            let _ = waitpid(pid, None);
            return;
        }
        if waited >= ASK && !asked {
            let _ = kill(pid, Signal::SIGTERM);
            asked = true;
        }
        thread::sleep(Duration::from_millis(20));
    }
}
