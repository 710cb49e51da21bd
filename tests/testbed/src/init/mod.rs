// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Pid 1 of the emulated host, started from the initramfs.
//!
//! It brings the host up (`boot`), starts a second process that serves the control channel (`serve`), reaps
//! what falls to it, and powers the host off when the server ends. A failure ends pid 1, which the kernel answers
//! with a panic, and `ecr-testbed` sees that at once.

mod boot;
mod serve;

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
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
    let mut troubles = boot::boot()?;
    let _idle_vm = idle_vm();
    troubles.extend(boot::all_processors());
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

/// A VM that is never run, for as long as the host is up. KVM patches the scheduler's code when its first VM comes
/// and when its last one goes, and QEMU's emulation of several processors sometimes runs what was there before:
/// the host's kernel then dies of a breakpoint that nobody set. So the first one comes while there is one processor
/// (`maxcpus=1` on the kernel's command line).
fn idle_vm() -> Option<OwnedFd> {
    let kvm = File::open("/dev/kvm").ok()?;
    // SAFETY: KVM_CREATE_VM takes a number, the machine type, and returns a new descriptor.
    let vm = unsafe { libc::ioctl(kvm.as_raw_fd(), KVM_CREATE_VM, 0) };
    // SAFETY: the descriptor is new, so nobody else owns it.
    (vm >= 0).then(|| unsafe { OwnedFd::from_raw_fd(vm) })
}

/// `_IO(KVMIO, 0x01)`.
const KVM_CREATE_VM: libc::Ioctl = 0xAE01;

fn reap_until(server: Pid) -> Result<()> {
    loop {
        match rustix::process::wait(WaitOptions::empty()) {
            Ok(Some((pid, _))) if pid == server => return Ok(()),
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e).context("waiting for processes"),
        }
    }
}
