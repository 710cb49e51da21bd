// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Helper processes: virtiofsd and hooks.
//!
//! posix_spawn(3) starts them: the child never runs code of ours, and no page table of a process that maps a guest is
//! copied. Descriptors are close-on-exec throughout the project, so a helper gets its three standard ones and what is
//! named, nothing else. Signals are as at the start of a process. A [`Child`] holds a pidfd, so its number can neither
//! be mistaken nor waited for by polling.

use std::env;
use std::ffi::{CString, OsString};
use std::fmt;
use std::fs::OpenOptions;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::ExitStatus;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::spawn::{PosixSpawnAttr, PosixSpawnFileActions, PosixSpawnFlags, posix_spawn};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::Pid;
use parking_lot::Mutex;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::host::netns;

/// A process to start.
#[derive(Debug, Default)]
pub struct SpawnRequest<'a> {
    /// The program's file; PATH is not searched.
    pub program: &'a str,
    /// What it sees as its own name. `None`: `program`.
    pub name: Option<OsString>,
    /// Its arguments, after the name.
    pub args: Vec<OsString>,
    /// Its environment. `None`: that of this process.
    pub env: Option<Vec<OsString>>,
    /// Descriptors, each with the number that the process finds it at. Of 0, 1 and 2 those not named are `/dev/null`.
    pub fds: Vec<(OwnedFd, RawFd)>,
    /// The network namespace that it runs in. `None`: that of this process.
    pub netns: Option<&'a Path>,
    /// Give it a process group of its own, so that a signal reaches what it started, too.
    pub own_group: bool,
}

/// Start a process.
pub fn spawn(request: SpawnRequest<'_>) -> Result<Child> {
    let program = request.program;
    let what = || format!("start {program}");
    match request.netns {
        // The new process is in the namespaces of the thread that makes it.
        Some(path) => netns::inside(path, || spawn_here(request)).with_context(what),
        None => spawn_here(request).with_context(what),
    }
}

fn spawn_here(request: SpawnRequest<'_>) -> Result<Child> {
    let mut argv = vec![request.name.unwrap_or_else(|| request.program.into())];
    argv.extend(request.args);
    let argv = c_strings(argv)?;
    let env = request.env.unwrap_or_else(|| {
        env::vars_os()
            .map(|(mut name, value)| {
                name.push("=");
                name.push(value);
                name
            })
            .collect()
    });
    let env = c_strings(env)?;
    let mut actions = PosixSpawnFileActions::init()?;
    let fds = out_of_the_way(request.fds)?;
    for (fd, number) in &fds {
        actions
            .add_dup2(fd.as_raw_fd(), *number)
            .with_context(|| format!("pass descriptor {number}"))?;
    }
    let attributes = attributes(request.own_group)?;
    let pid = posix_spawn(request.program, &actions, &attributes, &argv, &env)?;
    Child::new(pid, request.own_group)
}

fn c_strings(words: Vec<OsString>) -> Result<Vec<CString>> {
    words
        .into_iter()
        .map(|word| {
            CString::new(word.as_bytes()).with_context(|| format!("{word:?} holds a zero byte"))
        })
        .collect()
}

/// Copies of `fds`, and of `/dev/null` for the standard ones not among them, all above every number asked for: whatever
/// the order of the dup2 calls, none then overwrites the source of another.
fn out_of_the_way(mut fds: Vec<(OwnedFd, RawFd)>) -> Result<Vec<(OwnedFd, RawFd)>> {
    for number in 0..=2 {
        if !fds.iter().any(|(_, taken)| *taken == number) {
            let null =
                OpenOptions::new().read(true).write(true).open("/dev/null").context("/dev/null")?;
            fds.push((null.into(), number));
        }
    }
    let above = fds.iter().map(|(_, number)| *number).max().unwrap_or(2) + 1;
    fds.into_iter()
        .map(|(fd, number)| {
            ensure!(number >= 0, "descriptor number {number} is negative");
            let copy = fcntl(&fd, FcntlArg::F_DUPFD_CLOEXEC(above)).context("copy a descriptor")?;
            // SAFETY: fcntl has just made this descriptor, nobody else knows it.
            Ok((unsafe { OwnedFd::from_raw_fd(copy) }, number))
        })
        .collect()
}

/// No signal blocked, none ignored, and a process group of its own if asked for.
fn attributes(own_group: bool) -> Result<PosixSpawnAttr> {
    let mut attributes = PosixSpawnAttr::init()?;
    let mut flags =
        PosixSpawnFlags::POSIX_SPAWN_SETSIGMASK | PosixSpawnFlags::POSIX_SPAWN_SETSIGDEF;
    attributes.set_sigmask(&SigSet::empty())?;
    attributes.set_sigdefault(&SigSet::all())?;
    if own_group {
        // 0: numbered as the process.
        attributes.set_pgroup(Pid::from_raw(0))?;
        flags |= PosixSpawnFlags::POSIX_SPAWN_SETPGROUP;
    }
    attributes.set_flags(flags)?;
    Ok(attributes)
}

/// A running or ended process of ours. Dropping it kills and reaps it.
pub struct Child {
    pid: Pid,
    pidfd: OwnedFd,
    own_group: bool,
    /// How it ended, once it is reaped. The number is the process's for as long as this is `None`.
    status: Mutex<Option<ExitStatus>>,
}

impl fmt::Debug for Child {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Child({})", self.pid)
    }
}

impl Child {
    fn new(pid: Pid, own_group: bool) -> Result<Self> {
        // SAFETY: takes two numbers; the child is not reaped yet, so the number is its own.
        let result = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) };
        let fd = match Errno::result(result) {
            Ok(fd) => fd,
            Err(errno) => {
                // Unwatched it may not stay.
                let ended = kill(pid, Signal::SIGKILL).and_then(|()| waitpid(pid, None));
                return Err(errno)
                    .with_context(|| format!("open a pidfd of process {pid} ({ended:?})"));
            }
        };
        // SAFETY: the kernel has just made this descriptor, nobody else knows it.
        let pidfd = unsafe { OwnedFd::from_raw_fd(RawFd::try_from(fd)?) };
        Ok(Self { pid, pidfd, own_group, status: Mutex::new(None) })
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.pid.as_raw().unsigned_abs()
    }

    /// Send a signal to it, and to its group if that is its own. A process that has ended is no error.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let status = self.status.lock();
        if status.is_some() {
            return Ok(());
        }
        let to = if self.own_group { Pid::from_raw(-self.pid.as_raw()) } else { self.pid };
        match kill(to, signal) {
            Ok(()) | Err(Errno::ESRCH) => Ok(()),
            Err(errno) => {
                Err(errno).with_context(|| format!("send {signal} to process {}", self.pid))
            }
        }
    }

    /// How it ended, if it has.
    pub fn try_wait(&self) -> Result<Option<ExitStatus>> {
        let mut status = self.status.lock();
        if status.is_none() {
            let waited =
                waitid(Id::PIDFd(self.pidfd.as_fd()), WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG)
                    .with_context(|| format!("wait for process {}", self.pid))?;
            *status = match waited {
                WaitStatus::Exited(_, code) => Some(ExitStatus::from_raw((code & 0xff) << 8)),
                WaitStatus::Signaled(_, signal, _) => Some(ExitStatus::from_raw(signal as i32)),
                _ => None,
            };
        }
        Ok(*status)
    }

    /// Wait for its end, at most for `timeout`; `None` when it still runs. Blocks the thread.
    pub fn wait_timeout(&self, timeout: Duration) -> Result<Option<ExitStatus>> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(status) = self.try_wait()? {
                return Ok(Some(status));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            // A millisecond more than what is left: no busy loop at the end.
            let left =
                PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
            match poll(&mut [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)], left) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => {
                    return Err(errno).with_context(|| format!("wait for process {}", self.pid));
                }
            }
        }
    }

    /// Wait for its end.
    pub async fn wait(&self) -> Result<ExitStatus> {
        // A copy: several may wait, and epoll takes a descriptor once.
        let copy = self.pidfd.try_clone()?;
        // SAFETY: an OwnedFd is one open descriptor for as long as it lives, and the AsyncFd owns it.
        let watched = unsafe { AsyncFd::register_with_interest(copy, Interest::READABLE) };
        let pidfd = watched.with_context(|| format!("watch process {}", self.pid))?;
        loop {
            let mut ready = pidfd.readable().await?;
            if let Some(status) = self.try_wait()? {
                return Ok(status);
            }
            ready.clear_ready();
        }
    }
}

impl AsFd for Child {
    /// The pidfd: readable when the process has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if !matches!(self.try_wait(), Ok(None)) {
            return;
        }
        if let Err(error) = self.signal(Signal::SIGKILL) {
            log::warn!("{error:#}");
        }
        // Dying takes a moment, or forever in an uninterruptible wait: not this thread's.
        let pid = self.pid;
        let Ok(pidfd) = self.pidfd.try_clone() else { return };
        let reap = move || waitid(Id::PIDFd(pidfd.as_fd()), WaitPidFlag::WEXITED);
        if let Err(error) = thread::Builder::new().name("ecr-reap".into()).spawn(reap) {
            log::warn!("process {pid} stays a zombie: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::io::{PipeReader, Read as _, Write as _, pipe};

    fn shell(script: &str) -> SpawnRequest<'static> {
        SpawnRequest {
            program: "/bin/sh",
            args: vec!["-c".into(), script.into()],
            ..Default::default()
        }
    }

    fn long() -> Duration {
        Duration::from_secs(20)
    }

    fn text_from(mut pipe: PipeReader) -> String {
        let mut text = String::new();
        pipe.read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn descriptors_arrive_at_their_numbers_even_when_these_are_crossed() {
        let ((first, a), (second, b)) = (pipe().unwrap(), pipe().unwrap());
        let numbers = [b.as_raw_fd(), a.as_raw_fd()];
        let script = format!(
            "echo one >/proc/self/fd/{}; echo two >/proc/self/fd/{}",
            numbers[0], numbers[1]
        );
        let mut request = shell(&script);
        request.fds = vec![(a.into(), numbers[0]), (b.into(), numbers[1])];
        let child = spawn(request).unwrap();
        assert_eq!((text_from(first).as_str(), text_from(second).as_str()), ("one\n", "two\n"));
        assert!(child.wait_timeout(long()).unwrap().unwrap().success());
    }

    #[test]
    fn no_other_descriptor_is_inherited() {
        let (reader, writer) = pipe().unwrap();
        let args = vec!["/proc/self/fd".into()];
        let fds = vec![(writer.into(), 1)];
        let _child =
            spawn(SpawnRequest { program: "/bin/ls", args, fds, ..Default::default() }).unwrap();
        let text = text_from(reader);
        // Whoever runs the tests may have left open what is not close-on-exec; and ls opens the directory.
        let strange = text.lines().filter(|line| {
            let number: RawFd = line.parse().unwrap();
            // SAFETY: asks about a number, whatever it is.
            number > 2 && unsafe { libc::fcntl(number, libc::F_GETFD) } != 0
        });
        assert!(strange.count() <= 1, "{text}");
    }

    #[test]
    fn the_environment_and_the_name_are_those_given() {
        let (reader, writer) = pipe().unwrap();
        let mut request = shell("echo \"$0 $ONLY $HOME\"");
        request.args.push("called".into());
        request.env = Some(vec!["ONLY=this".into()]);
        request.fds = vec![(writer.into(), 1)];
        let child = spawn(request).unwrap();
        assert_eq!(text_from(reader), "called this \n");
        assert!(child.wait_timeout(long()).unwrap().unwrap().success());
    }

    #[test]
    fn a_missing_program_is_an_error_that_names_it() {
        let request = SpawnRequest { program: "/no/such/daemon", ..Default::default() };
        let error = spawn(request).unwrap_err();
        assert!(format!("{error:#}").contains("/no/such/daemon"), "{error:#}");
    }

    #[test]
    fn ends_are_told_apart_and_a_timeout_is_kept() {
        let child = spawn(shell("exit 7")).unwrap();
        assert_eq!(child.wait_timeout(long()).unwrap().unwrap().code(), Some(7));
        let child = spawn(shell("sleep 60")).unwrap();
        assert_eq!(child.wait_timeout(Duration::from_millis(30)).unwrap(), None);
        child.signal(Signal::SIGTERM).unwrap();
        let status = child.wait_timeout(long()).unwrap().unwrap();
        assert_eq!(status.signal(), Some(libc::SIGTERM));
        child.signal(Signal::SIGTERM).unwrap();
    }

    #[test]
    fn no_signal_is_blocked_or_ignored_in_the_child() {
        let (reader, writer) = pipe().unwrap();
        let mut request = shell("grep -E 'Sig(Blk|Ign)' /proc/self/status");
        request.fds = vec![(writer.into(), 1)];
        let _child = spawn(request).unwrap();
        let text = text_from(reader);
        let masks = text.lines().filter_map(|line| line.split_whitespace().last());
        // The real-time signals from 32 on belong to the C library.
        let standard = masks.map(|mask| u64::from_str_radix(mask, 16).unwrap() & 0x7fff_ffff);
        assert_eq!(standard.collect::<Vec<_>>(), [0, 0], "{text}");
    }

    #[tokio::test]
    async fn the_end_wakes_a_task() {
        let (reader, mut writer) = pipe().unwrap();
        let mut request = shell("read line");
        request.fds = vec![(reader.into(), 0)];
        let child = spawn(request).unwrap();
        let (a, b, ()) = tokio::join!(child.wait(), child.wait(), async {
            tokio::task::yield_now().await;
            writer.write_all(b"go\n").unwrap();
        });
        assert!(a.unwrap().success() && b.unwrap().success());
    }

    #[test]
    fn a_dropped_child_is_killed_and_reaped() {
        let child = spawn(shell("sleep 60")).unwrap();
        let path = format!("/proc/{}", child.id());
        drop(child);
        let deadline = Instant::now() + long();
        while fs::metadata(&path).is_ok() {
            assert!(Instant::now() < deadline, "{path} is still there");
            thread::sleep(Duration::from_millis(5));
        }
    }
}
