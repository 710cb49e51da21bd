// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Programs of the image that the agent runs.
//!
//! `ecr.exec` is one program on the console, for people who work on kernels and images, and for tests. It leads its own
//! session with the console as its terminal, so that a shell has job control.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use nix::sys::wait::WaitStatus;
use nix::unistd::setsid;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;

use crate::reaper::Reaper;

/// What programs find when nobody has set their environment.
pub const ENVIRONMENT: [(&str, &str); 3] =
    [("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"), ("HOME", "/"), ("TERM", "linux")];

/// What a program may say on each of its streams: no more fits into an answer.
const MOST_OUTPUT: u64 = 3 << 20;

/// Run `command` (program and arguments) to its end and say how it ended.
pub async fn run(command: &[String], reaper: &Reaper) {
    let Some((program, arguments)) = command.split_first() else { return };
    let mut child = Command::new(program);
    child.args(arguments).env_clear().envs(ENVIRONMENT).current_dir("/");
    // SAFETY: between fork and exec only system calls are made, and nothing is allocated.
    unsafe { child.pre_exec(own_the_terminal) };
    let ended = match reaper.spawn(&mut child) {
        Ok(ended) => ended,
        Err(error) => return log::error!("ecr.exec: start {program}: {error}"),
    };
    match ended.wait().await {
        Some(WaitStatus::Exited(_, status)) => log::info!("ecr.exec: exit status {status}"),
        Some(WaitStatus::Signaled(_, signal, _)) => log::info!("ecr.exec: killed by {signal}"),
        other => log::error!("ecr.exec: {program} is lost: {other:?}"),
    }
}

/// Lead a session that has standard input as its terminal; for the time between fork and exec.
pub fn own_the_terminal() -> io::Result<()> {
    setsid()?;
    // Standard input need not be a terminal: without console there is none.
    // SAFETY: TIOCSCTTY takes an integer; 0 means that no terminal is stolen from another session.
    unsafe { libc::ioctl(libc::STDIN_FILENO, libc::TIOCSCTTY as _, 0) };
    Ok(())
}

/// Where the image may have a program.
const DIRECTORIES: [&str; 4] = ["/sbin", "/usr/sbin", "/bin", "/usr/bin"];

/// The program `name` of the image.
pub fn find_program(name: &str) -> Result<PathBuf> {
    DIRECTORIES
        .iter()
        .map(|directory| Path::new(directory).join(name))
        .find(|path| path.exists())
        .with_context(|| format!("the guest image has no {name}"))
}

/// How a program ended, and what it said.
#[derive(Debug)]
pub struct Finished {
    /// The exit status, or 128 and the signal.
    pub status: i32,
    pub output: Vec<u8>,
    pub errors: Vec<u8>,
}

impl Finished {
    /// An error if the program reports one, in its words.
    pub fn check(&self, program: &str) -> Result<()> {
        if self.status != 0 {
            let errors = String::from_utf8_lossy(&self.errors);
            bail!("{program} ended with status {}: {}", self.status, errors.trim());
        }
        Ok(())
    }
}

/// Run a program with `input` on its standard input.
pub async fn run_to_end(
    program: &Path,
    arguments: &[&str],
    input: Vec<u8>,
    reaper: &Reaper,
) -> Result<Finished> {
    let ((stdin, feed), (output, stdout), (errors, stderr)) =
        (io::pipe()?, io::pipe()?, io::pipe()?);
    let mut child = Command::new(program);
    child.args(arguments).env_clear().envs(ENVIRONMENT).current_dir("/");
    child.stdin(stdin).stdout(stdout).stderr(stderr);
    let ended = reaper.spawn(&mut child).with_context(|| format!("start {}", program.display()))?;
    // It holds the program's ends of the pipes, which have to close with the program.
    drop(child);
    let mut feed = pipe::Sender::from_owned_fd(OwnedFd::from(feed))?;
    let feed = async move {
        // A program that does not read to the end has its reasons, and says so in its status.
        let _ = feed.write_all(&input).await;
    };
    let ((), output, errors) = tokio::join!(feed, read_all(output.into()), read_all(errors.into()));
    let (output, errors) = (output?, errors?);
    let status = match ended.wait().await {
        Some(WaitStatus::Exited(_, status)) => status,
        Some(WaitStatus::Signaled(_, signal, _)) => 128 + signal as i32,
        other => bail!("{} is lost: {other:?}", program.display()),
    };
    Ok(Finished { status, output, errors })
}

async fn read_all(from: OwnedFd) -> Result<Vec<u8>> {
    let mut all = Vec::new();
    let from = pipe::Receiver::from_file(File::from(from)).context("read from a program")?;
    from.take(MOST_OUTPUT + 1).read_to_end(&mut all).await.context("read from a program")?;
    if all.len() as u64 > MOST_OUTPUT {
        bail!("it says more than {MOST_OUTPUT} bytes");
    }
    Ok(all)
}
