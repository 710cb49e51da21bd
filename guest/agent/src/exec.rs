// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! `ecr.exec`: one program on the console, for people who work on kernels and images, and for tests.
//!
//! The program leads its own session with the console as its terminal, so that a shell has job control.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::sys::wait::WaitStatus;
use nix::unistd::setsid;

use crate::reaper::Reaper;

/// What programs find when nobody has set their environment.
const ENVIRONMENT: [(&str, &str); 3] =
    [("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"), ("HOME", "/"), ("TERM", "linux")];

/// Run `command` (program and arguments) to its end and say how it ended.
pub async fn run(command: &[String], reaper: &Reaper) {
    let Some((program, arguments)) = command.split_first() else { return };
    let mut child = Command::new(program);
    child.args(arguments).env_clear().envs(ENVIRONMENT).current_dir("/");
    // SAFETY: between fork and exec only system calls are made, and nothing is allocated.
    unsafe { child.pre_exec(own_the_console) };
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

fn own_the_console() -> io::Result<()> {
    setsid()?;
    // Standard input need not be a terminal: without console there is none.
    // SAFETY: TIOCSCTTY takes an integer; 0 means that no terminal is stolen from another session.
    unsafe { libc::ioctl(libc::STDIN_FILENO, libc::TIOCSCTTY as _, 0) };
    Ok(())
}
