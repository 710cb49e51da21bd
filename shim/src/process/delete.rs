// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! `delete`: containerd lost the shim, or just shut it down. Whatever is left of the container goes, and containerd
//! is told that it was killed. It may be called for what is not there, and twice.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::protobuf::{Message, MessageField};
use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::CleanUp;
use super::args::Args;
use super::id;
use super::socket::ShimSocket;
use crate::error::{Error, Kind, Result};
use crate::task::timestamp;

/// What a process that SIGKILL ended has as its exit status.
const KILLED: u32 = 128 + 9;

/// How long a shim that still runs may take to end by itself.
const GRACE: Duration = Duration::from_secs(3);

/// How long a killed process may take to be gone.
const DEATH: Duration = Duration::from_secs(1);

/// More mounts than that have never been on one directory.
const MAX_MOUNTS: usize = 64;

/// Clean up; returns what is to be printed. What could not be cleaned up is told in `warnings`, which containerd logs.
pub fn delete(args: &Args, clean_up: CleanUp, warnings: &mut impl Write) -> Result<Vec<u8>> {
    id::check_container(&args.id)?;
    let bundle = bundle(args)?;
    // Nobody reads warnings? Then nobody misses them.
    let mut warn = |text: &dyn std::fmt::Display| drop(writeln!(warnings, "{text}"));

    let pid = shim_pid(&bundle, &args.id);
    if let Some(pid) = pid
        && let Err(error) = end(pid, &args.id)
    {
        warn(&error);
    }
    if let Err(error) = clean_up(&args.namespace, &args.id, &bundle) {
        warn(&error);
    }
    if let Err(error) = unmount(&bundle.join("rootfs")) {
        warn(&error);
    }
    ShimSocket::of(&args.address, &args.namespace, &args.id).remove_stale();

    let response = DeleteResponse {
        pid: pid.map_or(0, |pid| pid.as_raw().unsigned_abs()),
        exit_status: KILLED,
        exited_at: MessageField::some(timestamp(SystemTime::now())),
        ..Default::default()
    };
    response
        .write_to_bytes()
        .map_err(|error| Error::new(Kind::Internal, format!("encode the answer: {error}")))
}

fn bundle(args: &Args) -> Result<PathBuf> {
    if !args.bundle.is_empty() {
        return Ok(PathBuf::from(&args.bundle));
    }
    std::env::current_dir().map_err(|error| {
        Error::new(Kind::Internal, format!("find the bundle (current directory): {error}"))
    })
}

/// The shim that `start` noted in the bundle. Containers of a pod have none of their own.
fn shim_pid(bundle: &Path, id: &str) -> Option<Pid> {
    let pid: i32 = fs::read_to_string(bundle.join("shim.pid")).ok()?.trim().parse().ok()?;
    let pid = (pid > 1).then(|| Pid::from_raw(pid))?;
    log::debug!("shim of {id} was process {pid}");
    Some(pid)
}

/// End a shim that still runs: it is on its way out, or does not answer containerd any more.
fn end(pid: Pid, id: &str) -> Result<()> {
    for (signal, patience) in [(Signal::SIGTERM, GRACE), (Signal::SIGKILL, DEATH)] {
        if !is_shim_of(pid, id) {
            return Ok(());
        }
        match kill(pid, signal) {
            Err(Errno::ESRCH) => return Ok(()),
            Err(error) => {
                return Err(Error::new(
                    Kind::Internal,
                    format!("send {signal} to the shim, process {pid}: {error}"),
                ));
            }
            Ok(()) => {}
        }
        let deadline = Instant::now() + patience;
        while is_shim_of(pid, id) && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(10));
        }
    }
    if is_shim_of(pid, id) {
        return Err(Error::new(
            Kind::Internal,
            format!("process {pid}, the shim of {id}, survives SIGKILL"),
        ));
    }
    Ok(())
}

/// Is `pid` still the shim of `id`, and not a zombie or a new process with its number?
fn is_shim_of(pid: Pid, id: &str) -> bool {
    // A zombie has no command line.
    let Ok(line) = fs::read(format!("/proc/{pid}/cmdline")) else { return false };
    let mut words = line.split(|&byte| byte == 0);
    let is_shim = words
        .next()
        .is_some_and(|program| program.windows(16).any(|part| part == b"containerd-shim-"));
    is_shim && words.by_ref().any(|word| word == b"-id") && words.next() == Some(id.as_bytes())
}

/// Take everything off a mount point.
fn unmount(path: &Path) -> Result<()> {
    for _ in 0..MAX_MOUNTS {
        match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            // Nothing is mounted here, or there is no such path.
            Err(Errno::EINVAL | Errno::ENOENT) => return Ok(()),
            Err(error) => {
                return Err(Error::new(
                    Kind::Internal,
                    format!("unmount {}: {error}", path.display()),
                ));
            }
        }
    }
    Err(Error::new(
        Kind::Internal,
        format!("unmount {}: more than {MAX_MOUNTS} mounts on it", path.display()),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_shim_of_that_container_is_ended() {
        let me = Pid::this();
        assert!(!is_shim_of(me, "c1"));
        assert!(!is_shim_of(Pid::from_raw(i32::MAX), "c1"));
        end(me, "c1").unwrap();
    }

    #[test]
    fn nothing_to_unmount_is_fine() {
        let dir = tempfile::tempdir().unwrap();
        unmount(&dir.path().join("none")).unwrap();
    }
}
