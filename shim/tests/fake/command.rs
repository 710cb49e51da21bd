// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Starting a process as a specification says, as far as a fake needs it.

use std::ffi::CString;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Stdio;

use oci_spec::runtime::Process as ProcessSpec;
use tokio::process::{Child, Command};

/// Start it on a terminal; on pipes if there is none.
pub fn spawn(
    spec: &ProcessSpec,
    root: Option<&Path>,
    terminal: Option<&OwnedFd>,
) -> io::Result<Child> {
    let args = spec.args().clone().unwrap_or_default();
    let mut command = Command::new(&args[0]);
    command.args(&args[1..]).env_clear();
    for variable in spec.env().iter().flatten() {
        let (key, value) = variable.split_once('=').unwrap_or((variable, ""));
        command.env(key, value);
    }
    match terminal {
        None => {
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        }
        Some(slave) => {
            command.stdin(slave.try_clone()?).stdout(slave.try_clone()?).stderr(slave.try_clone()?);
        }
    }
    let has_terminal = terminal.is_some();
    let root = root.map(|path| CString::new(path.to_str().unwrap()).unwrap());
    let cwd = CString::new(spec.cwd().to_str().unwrap()).unwrap();
    // SAFETY: between fork and exec only system calls are made, with memory that was there before.
    unsafe {
        command.pre_exec(move || {
            let done = |result: libc::c_int| match result {
                -1 => Err(io::Error::last_os_error()),
                _ => Ok(()),
            };
            done(libc::setsid())?;
            if has_terminal {
                done(libc::ioctl(0, libc::TIOCSCTTY, 0))?;
            }
            if let Some(root) = &root {
                done(libc::chroot(root.as_ptr()))?;
            }
            done(libc::chdir(cwd.as_ptr()))
        });
    }
    command.spawn()
}
