// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! One command, with a time limit, that leaves nothing behind.
//!
//! The command leads a session of its own and, where control groups can be made, a cgroup of its own
//! (cgroup v2, "Core Interface Files", `cgroup.kill`). When the command ends, or its time is up, everything that
//! it started is killed. Without a cgroup a process that made itself a new session escapes; its output is not
//! waited for.
//!
//! The same code runs on this machine (`native`) and in the emulated host (`init`).

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, Signal};
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;
use serde::{Deserialize, Serialize};

use crate::interrupt::{Guard, Undo};

/// How long the output of a command is still read once the command itself is gone.
const DRAIN: Duration = Duration::from_secs(2);

/// What to run.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct CommandSpec {
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Added to the environment of whoever runs it.
    pub env: Vec<(String, String)>,
    /// Where to run it.
    pub directory: Option<PathBuf>,
    /// After this it is killed.
    pub time_limit: Option<Duration>,
    /// Rows and columns of the terminal to run it on; without one its input is empty.
    pub terminal: Option<(u16, u16)>,
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ending {
    /// By itself, with this status.
    Exited(i32),
    /// By a signal that we did not send.
    Signalled(i32),
    /// It was killed when its time limit had passed.
    TimedOut(Duration),
    /// It was killed on request.
    Killed,
}

impl Ending {
    /// The exit status that a shell would give (`timeout(1)`'s 124 for a time limit).
    #[must_use]
    pub fn status(self) -> u8 {
        match self {
            Self::Exited(status) => u8::try_from(status).unwrap_or(u8::MAX),
            Self::Signalled(signal) => u8::try_from(128 + signal).unwrap_or(u8::MAX),
            Self::TimedOut(_) => 124,
            Self::Killed => 137,
        }
    }
}

impl From<ExitStatus> for Ending {
    fn from(status: ExitStatus) -> Self {
        match (status.code(), status.signal()) {
            (Some(code), _) => Self::Exited(code),
            (None, signal) => Self::Signalled(signal.unwrap_or_default()),
        }
    }
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited(status) => write!(f, "exit status {status}"),
            Self::Signalled(signal) => write!(f, "killed by signal {signal}"),
            Self::TimedOut(limit) => write!(f, "still running after {} s, killed", limit.as_secs()),
            Self::Killed => f.write_str("killed on request"),
        }
    }
}

/// Where output came from. What is written to a terminal is all `Stdout`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// What can be done to a running command.
#[derive(Debug)]
pub enum Order {
    /// Type this on its terminal; without a terminal it is lost.
    Input(Vec<u8>),
    /// Kill it.
    Kill,
}

/// Whoever waits for a command: takes its output and may give orders.
pub trait Attendant {
    /// The command wrote `bytes`.
    ///
    /// # Errors
    /// Any error kills the command and is returned by [`run`].
    fn output(&mut self, stream: Stream, bytes: Vec<u8>) -> io::Result<()>;

    /// Readable when [`Attendant::order`] has one.
    fn inbox(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// The next order; called when the inbox is readable.
    ///
    /// # Errors
    /// Any error kills the command and is returned by [`run`].
    fn order(&mut self) -> io::Result<Order> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// Runs `spec` to its end. Groups are made below `cgroups`, where there is such a directory.
///
/// # Errors
/// The command cannot be started, or its attendant failed.
pub fn run(
    spec: &CommandSpec,
    cgroups: Option<&Path>,
    attendant: &mut dyn Attendant,
) -> io::Result<Ending> {
    let mut running = Running::start(spec, cgroups)?;
    let deadline = spec.time_limit.map(|limit| Instant::now() + limit);
    let verdict = loop {
        let wait = deadline.map(|at| at.saturating_duration_since(Instant::now()));
        if wait == Some(Duration::ZERO) {
            break Some(Ending::TimedOut(spec.time_limit.unwrap_or_default()));
        }
        let ready = running.wait(attendant.inbox(), wait)?;
        running.forward_output(&ready, attendant)?;
        if ready.ended {
            break None;
        }
        if ready.inbox {
            match attendant.order()? {
                Order::Input(bytes) => running.type_in(&bytes),
                Order::Kill => break Some(Ending::Killed),
            }
        }
    };
    let status = running.kill_all()?;
    let drained = Instant::now() + DRAIN;
    while !running.outputs.is_empty() && Instant::now() < drained {
        let ready = running.wait(None, Some(drained.saturating_duration_since(Instant::now())))?;
        running.forward_output(&ready, attendant)?;
    }
    Ok(verdict.unwrap_or_else(|| status.into()))
}

/// Which of a running command's descriptors [`Running::wait`] found ready.
struct Ready {
    ended: bool,
    inbox: bool,
    outputs: Vec<bool>,
}

struct Running {
    child: Child,
    pidfd: OwnedFd,
    outputs: Vec<(Stream, File)>,
    terminal: Option<File>,
    group: Option<Cgroup>,
    /// Kills the process group that the command leads, also when we are interrupted.
    session: Option<Guard>,
    reaped: bool,
}

impl Running {
    fn start(spec: &CommandSpec, cgroups: Option<&Path>) -> io::Result<Self> {
        let group = cgroups.map(Cgroup::create).transpose()?;
        let [program, arguments @ ..] = spec.argv.as_slice() else {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "no command to run"));
        };
        let mut command = Command::new(program);
        command.args(arguments).envs(spec.env.iter().map(|(k, v)| (k, v)));
        if let Some(directory) = &spec.directory {
            command.current_dir(directory);
        }
        let terminal = spec.terminal.map(|size| Terminal::open(size, &mut command)).transpose()?;
        if terminal.is_none() {
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        }
        isolate(&mut command, group.as_ref(), terminal.is_some())?;
        let mut child = command.spawn().map_err(|e| {
            io::Error::new(e.kind(), format!("running `{}`: {e}", spec.argv.join(" ")))
        })?;
        drop(command); // It holds our copy of the terminal's other end.

        let pid = Pid::from_child(&child);
        let session = Some(Guard::new(Undo::Group(pid)));
        let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty())?;
        let stdout = child.stdout.take().map(|o| (Stream::Stdout, OwnedFd::from(o)));
        let stderr = child.stderr.take().map(|o| (Stream::Stderr, OwnedFd::from(o)));
        let mut outputs: Vec<(Stream, File)> =
            stdout.into_iter().chain(stderr).map(|(s, fd)| (s, File::from(fd))).collect();
        if let Some(Terminal(master)) = &terminal {
            outputs.push((Stream::Stdout, master.try_clone()?));
        }
        let terminal = terminal.map(|Terminal(master)| master);
        Ok(Self { child, pidfd, outputs, terminal, group, session, reaped: false })
    }

    /// Waits until the command wrote, ended, or has an order, or for as long as `limit`.
    fn wait(
        &mut self,
        inbox: Option<BorrowedFd<'_>>,
        limit: Option<Duration>,
    ) -> io::Result<Ready> {
        let limit = limit.and_then(|l| Timespec::try_from(l).ok());
        let mut polled = Vec::with_capacity(2 + self.outputs.len());
        if !self.reaped {
            polled.push(PollFd::new(&self.pidfd, PollFlags::IN));
        }
        polled.extend(inbox.iter().map(|fd| PollFd::new(fd, PollFlags::IN)));
        polled.extend(self.outputs.iter().map(|(_, file)| PollFd::new(file, PollFlags::IN)));
        match rustix::event::poll(&mut polled, limit.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
        let mut ready = polled.iter().map(|fd| !fd.revents().is_empty());
        Ok(Ready {
            ended: !self.reaped && ready.next() == Some(true),
            inbox: inbox.is_some() && ready.next() == Some(true),
            outputs: ready.collect(),
        })
    }

    fn forward_output(&mut self, ready: &Ready, to: &mut dyn Attendant) -> io::Result<()> {
        let mut buffer = [0; 16 << 10];
        // Backwards, so that the ones that end can be taken out on the way.
        for index in (0..self.outputs.len()).rev().filter(|i| ready.outputs.get(*i) == Some(&true))
        {
            let (stream, file) = &mut self.outputs[index];
            match file.read(&mut buffer) {
                // A terminal that nobody has open any more answers EIO.
                Ok(0) | Err(_) => drop(self.outputs.remove(index)),
                Ok(length) => to.output(*stream, buffer[..length].to_vec())?,
            }
        }
        Ok(())
    }

    /// What a full terminal does not take is lost, as it is for one who types faster than a program reads.
    fn type_in(&mut self, bytes: &[u8]) {
        if let Some(terminal) = &mut self.terminal {
            let _ = terminal.write(bytes);
        }
    }

    /// Kills the command's group, then reaps its leader: while that is a zombie its number is nobody else's.
    fn kill_all(&mut self) -> io::Result<ExitStatus> {
        if let Some(group) = &self.group {
            group.kill()?;
        }
        drop(self.session.take());
        let status = self.child.wait()?;
        self.reaped = true;
        Ok(status)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.reaped {
            let _ = self.kill_all();
        }
    }
}

/// The side of a pseudo-terminal that we read and type on.
struct Terminal(File);

impl Terminal {
    /// Opens one and gives its other side to `command`.
    fn open((rows, columns): (u16, u16), command: &mut Command) -> io::Result<Self> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = rustix::pty::openpt(flags)?;
        rustix::pty::grantpt(&master)?;
        rustix::pty::unlockpt(&master)?;
        let name = rustix::pty::ptsname(&master, Vec::new())?;
        let name = Path::new(std::ffi::OsStr::new(name.to_str().map_err(io::Error::other)?));
        let slave = File::options().read(true).write(true).open(name)?;
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        rustix::termios::tcsetwinsize(&slave, size)?;
        rustix::io::ioctl_fionbio(&master, true)?;
        command.stdin(slave.try_clone()?).stdout(slave.try_clone()?).stderr(slave);
        Ok(Self(master.into()))
    }
}

/// Makes `command` the leader of a session in `group` that does not outlive us.
fn isolate(command: &mut Command, group: Option<&Cgroup>, on_terminal: bool) -> io::Result<()> {
    let members = match group {
        Some(group) => Some(File::options().write(true).open(group.0.join("cgroup.procs"))?),
        None => None,
    };
    let prepare = move || {
        if let Some(members) = &members {
            rustix::io::write(members.as_fd(), b"0")?;
        }
        rustix::process::setsid()?;
        if on_terminal {
            // SAFETY: standard input was put in place by std before this closure runs.
            let stdin = unsafe { BorrowedFd::borrow_raw(0) };
            rustix::process::ioctl_tiocsctty(stdin)?;
        }
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        Ok(())
    };
    // SAFETY: between fork and exec the closure makes plain system calls on values that it owns; it takes no lock
    // and allocates nothing.
    unsafe { command.pre_exec(prepare) };
    Ok(())
}

/// A control group for one command, removed when dropped.
struct Cgroup(PathBuf);

impl Cgroup {
    fn create(below: &Path) -> io::Result<Self> {
        let path = below.join(format!("ecr-command-{}", std::process::id()));
        match fs::create_dir(&path) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(io::Error::new(
                e.kind(),
                format!("making the control group {}: {e}", path.display()),
            )),
            _ => Ok(Self(path)),
        }
    }

    fn kill(&self) -> io::Result<()> {
        fs::write(self.0.join("cgroup.kill"), "1")
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Groups that a command made below its own go with it, innermost first.
        fn remove(path: &Path) {
            for entry in fs::read_dir(path).into_iter().flatten().flatten() {
                if entry.file_type().is_ok_and(|t| t.is_dir()) {
                    remove(&entry.path());
                }
            }
            let _ = fs::remove_dir(path);
        }
        // The kernel empties a killed group a moment after `cgroup.kill` was written.
        for _ in 0..100 {
            remove(&self.0);
            if !self.0.exists() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Recorder(Vec<u8>);

    impl Attendant for Recorder {
        fn output(&mut self, _: Stream, bytes: Vec<u8>) -> io::Result<()> {
            self.0.extend(bytes);
            Ok(())
        }
    }

    fn shell(script: &str, limit: u64) -> (Ending, String) {
        let spec = CommandSpec {
            argv: vec!["sh".into(), "-c".into(), script.into()],
            env: vec![("WHO".into(), "world".into())],
            time_limit: Some(Duration::from_secs(limit)),
            ..CommandSpec::default()
        };
        let mut recorder = Recorder::default();
        let ending = run(&spec, None, &mut recorder).unwrap();
        (ending, String::from_utf8(recorder.0).unwrap())
    }

    #[test]
    fn output_and_status_come_back() {
        assert_eq!(
            shell("echo hello $WHO; exit 3", 60),
            (Ending::Exited(3), "hello world\n".into())
        );
        assert_eq!(shell("kill -TERM $$", 60).0, Ending::Signalled(15));
    }

    #[test]
    fn much_output_is_not_lost() {
        let (ending, output) = shell("head -c 3000000 /dev/zero | tr '\\0' x", 60);
        assert_eq!((ending, output.len()), (Ending::Exited(0), 3_000_000));
    }

    #[test]
    fn a_command_that_hangs_is_killed_with_its_children() {
        let (ending, output) = shell("sleep 1000 & echo $!; wait", 1);
        assert_eq!(ending, Ending::TimedOut(Duration::from_secs(1)));
        let child = Pid::from_raw(output.trim().parse().unwrap()).unwrap();
        // Orphans are reaped by whoever adopts them, which takes a moment.
        let gone = (0..200).any(|_| {
            std::thread::sleep(Duration::from_millis(10));
            fs::read_to_string(format!("/proc/{}/stat", child.as_raw_nonzero()))
                .map_or(true, |stat| stat.contains(") Z "))
        });
        assert!(gone, "{child:?} still runs");
    }

    #[test]
    fn children_left_behind_are_killed() {
        let started = Instant::now();
        assert_eq!(shell("sleep 1000 & exit 0", 60).0, Ending::Exited(0));
        assert!(started.elapsed() < Duration::from_secs(30), "waited for what was left behind");
    }

    #[test]
    fn a_missing_program_is_named() {
        let spec = CommandSpec { argv: vec!["/no/such".into()], ..CommandSpec::default() };
        let error = run(&spec, None, &mut Recorder::default()).unwrap_err();
        assert!(error.to_string().contains("/no/such"), "{error}");
    }
}
