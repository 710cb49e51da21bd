// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Commands with a time limit: on pipes, or on a terminal of their own.

use std::fmt;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::fs::{Mode, OFlags};
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;

/// Bytes of each stream that a message shows.
const SHOWN: usize = 8 << 10;

/// How a command ended, and what it wrote.
#[derive(Debug, Clone)]
pub struct Finished {
    /// The command, for messages.
    pub command: String,
    /// Its exit status; 128 and the signal, if it was killed.
    pub code: i32,
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: Vec<u8>,
    /// How long it ran.
    pub wall: Duration,
}

impl fmt::Display for Finished {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "`{}` ended with {} after {:.1} s; it wrote:\n{}{}",
            self.command,
            self.code,
            self.wall.as_secs_f64(),
            end(&self.stdout),
            end(&self.stderr)
        )
    }
}

/// The last of what a command wrote, which may be all of it.
fn end(written: &[u8]) -> String {
    let from = written.len().saturating_sub(SHOWN);
    let cut = if from > 0 { "[...]" } else { "" };
    format!("{cut}{}", String::from_utf8_lossy(&written[from..]))
}

impl Finished {
    /// Its standard output as text.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Its standard error as text.
    #[must_use]
    pub fn errors(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// Itself, if it ended with `code`.
    ///
    /// # Errors
    /// It ended otherwise.
    pub fn expect(self, code: i32) -> Result<Self> {
        if self.code != code {
            bail!("{self}\nexit status {code} was expected");
        }
        Ok(self)
    }
}

fn code(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default())
}

/// A running command. Dropping it kills it.
#[derive(Debug)]
pub struct Running {
    child: Child,
    command: String,
    started: Instant,
    stdout: Option<JoinHandle<Vec<u8>>>,
    stderr: Option<JoinHandle<Vec<u8>>>,
}

/// Starts `command`; its standard input is `input`, or empty.
///
/// # Errors
/// It cannot be started.
pub fn start(mut command: Command, input: Option<Stdio>) -> Result<Running> {
    let text = describe(&command);
    command.stdin(input.unwrap_or_else(Stdio::null)).stdout(Stdio::piped()).stderr(Stdio::piped());
    let started = Instant::now();
    let mut child = command.spawn().with_context(|| format!("start `{text}`"))?;
    let stdout = child.stdout.take().map(|pipe| thread::spawn(move || read_all(pipe)));
    let stderr = child.stderr.take().map(|pipe| thread::spawn(move || read_all(pipe)));
    Ok(Running { child, command: text, started, stdout, stderr })
}

fn describe(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

fn read_all(mut pipe: impl Read) -> Vec<u8> {
    let mut bytes = Vec::new();
    // What came before an error is what there is.
    let _ = pipe.read_to_end(&mut bytes);
    bytes
}

impl Running {
    /// The standard input, if it is a pipe.
    pub fn stdin(&mut self) -> Option<std::process::ChildStdin> {
        self.child.stdin.take()
    }

    /// Whether it has ended.
    ///
    /// # Errors
    /// The system does not say.
    pub fn ended(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_some())
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// It runs longer than `limit`; it is killed, and the error says what it wrote.
    pub fn finish(mut self, limit: Duration) -> Result<Finished> {
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break Some(status);
            }
            if self.started.elapsed() > limit {
                break None;
            }
            thread::sleep(Duration::from_millis(5));
        };
        let wall = self.started.elapsed();
        if status.is_none() {
            self.child.kill()?;
        }
        let take = |reader: Option<JoinHandle<Vec<u8>>>| {
            reader.and_then(|reader| reader.join().ok()).unwrap_or_default()
        };
        let finished = Finished {
            command: self.command.clone(),
            code: status.map_or(-1, code),
            stdout: take(self.stdout.take()),
            stderr: take(self.stderr.take()),
            wall,
        };
        if status.is_none() {
            bail!("still running after {limit:?}, killed: {finished}");
        }
        Ok(finished)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A command on a terminal of its own. Dropping it kills it.
#[derive(Debug)]
pub struct OnTerminal {
    child: Child,
    terminal: Arc<File>,
    output: Receiver<Vec<u8>>,
    seen: String,
}

impl OnTerminal {
    /// Starts `command` on a terminal of `rows` and `columns`.
    ///
    /// # Errors
    /// No terminal can be had, or the command cannot be started.
    pub fn start(mut command: Command, rows: u16, columns: u16) -> Result<Self> {
        let terminal = rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY)?;
        rustix::pty::grantpt(&terminal)?;
        rustix::pty::unlockpt(&terminal)?;
        let name = rustix::pty::ptsname(&terminal, Vec::new())?;
        let theirs: OwnedFd = rustix::fs::open(name, OFlags::RDWR | OFlags::NOCTTY, Mode::empty())?;
        set_size(&terminal, rows, columns)?;
        command.stdin(theirs.try_clone()?).stdout(theirs.try_clone()?).stderr(theirs.try_clone()?);
        // SAFETY: between fork and exec only system calls are made, on descriptor 0, which is the terminal.
        unsafe {
            command.pre_exec(|| {
                if libc::setsid() < 0 || libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        let child = command.spawn().with_context(|| format!("start `{}`", describe(&command)))?;
        let terminal = Arc::new(File::from(terminal));
        let (sender, output) = mpsc::channel();
        let reader = Arc::clone(&terminal);
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(length @ 1..) = (&*reader).read(&mut buffer) {
                if sender.send(buffer[..length].to_vec()).is_err() {
                    return;
                }
            }
        });
        Ok(Self { child, terminal, output, seen: String::new() })
    }

    /// Types `text`.
    ///
    /// # Errors
    /// The terminal is gone.
    pub fn type_in(&self, text: &str) -> Result<()> {
        Ok((&*self.terminal).write_all(text.as_bytes())?)
    }

    /// Changes its size; the kernel tells the command.
    ///
    /// # Errors
    /// The terminal is gone.
    pub fn resize(&self, rows: u16, columns: u16) -> Result<()> {
        set_size(&*self.terminal, rows, columns)
    }

    /// Waits until it has printed `text`; returns all that was printed so far, which is then forgotten.
    ///
    /// # Errors
    /// It did not, in time. The error shows what was printed.
    pub fn wait_for(&mut self, text: &str, limit: Duration) -> Result<String> {
        let until = Instant::now() + limit;
        while !self.seen.contains(text) {
            match self.output.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(bytes) => self.seen.push_str(&String::from_utf8_lossy(&bytes)),
                Err(RecvTimeoutError::Timeout) => {
                    bail!("{text:?} did not come in {limit:?}; seen:\n{}", self.seen)
                }
                Err(RecvTimeoutError::Disconnected) => {
                    bail!("the terminal closed without {text:?}; seen:\n{}", self.seen)
                }
            }
        }
        Ok(std::mem::take(&mut self.seen))
    }

    /// Waits for its end; returns its exit status.
    ///
    /// # Errors
    /// It runs longer than `limit`.
    pub fn finish(mut self, limit: Duration) -> Result<i32> {
        let until = Instant::now() + limit;
        while Instant::now() < until {
            if let Some(status) = self.child.try_wait()? {
                return Ok(code(status));
            }
            while let Ok(bytes) = self.output.try_recv() {
                self.seen.push_str(&String::from_utf8_lossy(&bytes));
            }
            thread::sleep(Duration::from_millis(5));
        }
        bail!("still running after {limit:?}; seen:\n{}", self.seen)
    }
}

impl Drop for OnTerminal {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn set_size(terminal: impl AsFd, rows: u16, columns: u16) -> Result<()> {
    let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    rustix::termios::tcsetwinsize(terminal, size)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn output_and_status_are_kept() {
        let run = start(shell("echo out; echo err >&2; exit 3"), None).unwrap();
        let finished = run.finish(Duration::from_secs(5)).unwrap().expect(3).unwrap();
        assert_eq!((finished.text().as_str(), finished.errors().as_str()), ("out\n", "err\n"));
        let error = start(shell("echo said; exec sleep 100"), None)
            .unwrap()
            .finish(Duration::from_millis(300))
            .unwrap_err();
        assert!(error.to_string().contains("said"), "{error}");
    }

    #[test]
    fn a_terminal_has_a_size_and_changes_it() {
        let script = "stty size; read line; stty size; exit 7";
        let limit = Duration::from_secs(5);
        let mut run = OnTerminal::start(shell(script), 24, 80).unwrap();
        run.wait_for("24 80", limit).unwrap();
        run.resize(30, 100).unwrap();
        run.type_in("x\n").unwrap();
        run.wait_for("30 100", limit).unwrap();
        assert_eq!(run.finish(limit).unwrap(), 7);
    }
}
