// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! `start`: make sure that a shim serves the container's pod, and say where. containerd waits until both output
//! streams are closed and takes all that was written as the answer, so nothing but the answer may be written, and the
//! shim must not inherit them.

use std::env;
use std::fs;
use std::io::{self, IsTerminal, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use super::args::Args;
use super::group::Role;
use super::socket::{ShimSocket, Taken};
use super::{LISTENER_FD, id};
use crate::error::{Error, Kind, Result};
use crate::task::options;

/// The newest task API that is served.
const NEWEST_API: u32 = 3;

/// The most that runtime options may take.
const MAX_OPTIONS: u64 = 1 << 20;

/// Start a shim, or find the one that is there; returns what is to be printed.
pub fn start(args: &Args) -> Result<String> {
    id::check_container(&args.id)?;
    if args.namespace.is_empty() {
        return Err(Error::new(Kind::InvalidArgument, "flag -namespace is missing"));
    }
    let bundle = env::current_dir()
        .map_err(|error| internal(format!("find the bundle (current directory): {error}")))?;
    read_options()?;
    let api = newest_api(env::var("MAX_SHIM_VERSION").ok().as_deref())?;
    let address = match Role::of_bundle(&bundle)? {
        Role::Member(sandbox) => join(args, &sandbox)?,
        Role::Owner => spawn(args, &bundle)?,
    };
    write(&bundle, "address", &address)?;
    Ok(answer(&address, api))
}

/// Containers of a pod are served by the pod's shim.
fn join(args: &Args, sandbox: &str) -> Result<String> {
    id::check_container(sandbox)?;
    let socket = ShimSocket::of(&args.address, &args.namespace, sandbox);
    if !socket.is_live() {
        return Err(Error::new(
            Kind::FailedPrecondition,
            format!(
                "container {} belongs to sandbox {sandbox}, whose shim does not serve on {}",
                args.id,
                socket.address()
            ),
        ));
    }
    Ok(socket.address())
}

fn spawn(args: &Args, bundle: &Path) -> Result<String> {
    let socket = ShimSocket::of(&args.address, &args.namespace, &args.id);
    let listener = match socket.take()? {
        // containerd asks again when it lost an answer: the shim is there, and knows what it runs.
        Taken::Live => return Ok(socket.address()),
        Taken::New(listener) => listener,
    };
    let started = spawn_self(args, &listener).and_then(|mut child| {
        write(bundle, "shim.pid", &child.id().to_string()).inspect_err(|_| {
            // Both fail only if it has ended already.
            let _ = child.kill();
            let _ = child.wait();
        })
    });
    if let Err(error) = started {
        socket.remove();
        return Err(error);
    }
    Ok(socket.address())
}

/// Run this program as the shim: in a process group of its own, with the listener as file descriptor 3 and nothing
/// else of ours.
fn spawn_self(args: &Args, listener: &UnixListener) -> Result<Child> {
    let failed = |error: io::Error| internal(format!("start the shim process: {error}"));
    let program = env::current_exe().map_err(failed)?;
    inherit_as(listener.as_fd(), LISTENER_FD).map_err(failed)?;
    let mut command = Command::new(program);
    command
        .args(["-namespace", &args.namespace, "-address", &args.address])
        .args(["-publish-binary", &args.publish_binary, "-id", &args.id])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0);
    if args.debug {
        command.arg("-debug");
    }
    command.spawn().map_err(failed)
}

/// Let the next process have `fd` as `number`, and no other descriptor but the standard streams.
fn inherit_as(fd: BorrowedFd<'_>, number: i32) -> io::Result<()> {
    // SAFETY: the call takes no pointers. It changes only a flag of descriptors, which matters at the next exec.
    let marked = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            libc::STDERR_FILENO + 1,
            libc::c_int::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    if marked != 0 {
        return Err(io::Error::last_os_error());
    }
    if fd.as_raw_fd() == number {
        let flags = nix::fcntl::FdFlag::empty();
        nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_SETFD(flags))?;
        return Ok(());
    }
    // SAFETY: dup2 takes no pointers. `number` is either free or a descriptor that this process holds close-on-exec
    // and uses no more: `start` is about to end.
    if unsafe { libc::dup2(fd.as_raw_fd(), number) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Runtime options come on standard input; what they say comes again with the first container. They have to be read,
/// or containerd could be stuck with them, and should be told of at once when they make no sense.
fn read_options() -> Result<()> {
    let stdin = io::stdin();
    if stdin.is_terminal() {
        return Ok(());
    }
    let mut bytes = Vec::new();
    stdin
        .lock()
        .take(MAX_OPTIONS)
        .read_to_end(&mut bytes)
        .map_err(|error| internal(format!("read runtime options from standard input: {error}")))?;
    options::check(&bytes)
}

/// The newest task API that both sides speak; none if containerd wants a bare address (before 1.7).
fn newest_api(theirs: Option<&str>) -> Result<Option<u32>> {
    let Some(theirs) = theirs else { return Ok(None) };
    let version: u32 = theirs.parse().map_err(|error| {
        Error::new(Kind::InvalidArgument, format!("MAX_SHIM_VERSION={theirs:?}: {error}"))
    })?;
    // containerd 1.7 refuses an answer with a version above what it asked for.
    Ok((version >= 2).then(|| version.min(NEWEST_API)))
}

fn answer(address: &str, api: Option<u32>) -> String {
    match api {
        None => address.to_owned(),
        Some(version) => {
            format!("{{\"version\":{version},\"address\":\"{address}\",\"protocol\":\"ttrpc\"}}")
        }
    }
}

/// Write a small file in the bundle, whole or not at all.
fn write(bundle: &Path, name: &str, text: &str) -> Result<()> {
    let path: PathBuf = bundle.join(name);
    let temporary = bundle.join(format!(".{name}"));
    fs::write(&temporary, text)
        .and_then(|()| fs::rename(&temporary, &path))
        .map_err(|error| internal(format!("write {}: {error}", path.display())))
}

fn internal(text: String) -> Error {
    Error::new(Kind::Internal, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answer_is_what_containerd_can_read() {
        assert_eq!(newest_api(None).unwrap(), None);
        assert_eq!(newest_api(Some("1")).unwrap(), None);
        assert_eq!(newest_api(Some("2")).unwrap(), Some(2));
        assert_eq!(newest_api(Some("9")).unwrap(), Some(3));
        assert!(newest_api(Some("two")).is_err());
        assert_eq!(answer("unix:///s", None), "unix:///s");
        assert_eq!(
            answer("unix:///s", Some(2)),
            r#"{"version":2,"address":"unix:///s","protocol":"ttrpc"}"#
        );
    }
}
