// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Pid 1 of the emulated host, started from the initramfs.
//!
//! It brings the host up (`boot`), starts a second process that serves the control channel (`serve`), reaps
//! what falls to it, and powers the host off when the server ends. A failure ends pid 1, which the kernel answers
//! with a panic, and `ecr-testbed` sees that at once.

mod boot;
mod serve;

use std::process::{Command, ExitCode};

use anyhow::{Context, Result};
use rustix::process::{Pid, WaitOptions};
use rustix::system::RebootCommand;

/// The server's argument, followed by what did not come up.
const SERVE: &str = "serve";

/// What the server and every command find in their environment; the kernel gives pid 1 next to nothing.
const ENVIRONMENT: [(&str, &str); 4] = [
    ("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"),
    ("HOME", "/root"),
    ("TMPDIR", "/tmp"),
    ("LANG", "C.UTF-8"),
];

/// The program `ecr-testbed-init`.
#[must_use]
pub fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let result = match arguments.next().as_deref() {
        Some(SERVE) => serve::serve(arguments.collect()),
        _ if std::process::id() == 1 => first_process(),
        _ => Err(anyhow::anyhow!(
            "this program is pid 1 of the testbed's emulated host and nothing else"
        )),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ecr-testbed-init: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn first_process() -> Result<()> {
    let troubles = boot::boot()?;
    // The initramfs is out of reach by now; its program is not.
    let server = Command::new("/proc/self/exe")
        .arg(SERVE)
        .args(troubles)
        .envs(ENVIRONMENT)
        .spawn()
        .context("starting the control channel's server")?;
    reap_until(Pid::from_child(&server))?;
    rustix::fs::sync();
    rustix::system::reboot(RebootCommand::PowerOff).context("powering off")
}

fn reap_until(server: Pid) -> Result<()> {
    loop {
        match rustix::process::wait(WaitOptions::empty()) {
            Ok(Some((pid, _))) if pid == server => return Ok(()),
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e).context("waiting for processes"),
        }
    }
}
