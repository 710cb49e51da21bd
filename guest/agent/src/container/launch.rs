// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The agent's side of making a process: start the helper, tell it what to become, hear what it says.

use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream as StdStream;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use ecr_agent_protocol::oci::Spec;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::sys::wait::WaitStatus;
use nix::unistd::Pid;
use protobuf::Message;
use tokio::io::Interest;
use tokio::net::UnixStream;

use super::helper;
use super::wire::{self, Order, Report};
use crate::reaper::{Ended, Reaper};

/// How long a process may take until it is ready. Mounts on a share whose server has gone never end.
const PATIENCE: Duration = Duration::from_secs(60);

/// A process that waits for its start. Dropped, it ends.
#[derive(Debug)]
pub struct Waiting {
    channel: UnixStream,
    pub ended: Ended,
    /// The agent's end of the process's terminal.
    pub master: Option<OwnedFd>,
}

impl Waiting {
    /// Let the process execute its program.
    pub async fn start(self) -> Result<()> {
        wire::send(self.channel.as_fd(), wire::GO, &[]).or_else(|error| {
            // It has ended before its start.
            Err(error).with_context(|| ending(&self.ended))
        })?;
        match receive(&self.channel).await? {
            Some((Report::Failed(why), _)) => Err(anyhow!(why)),
            Some((other, _)) => bail!("the container's process says {other:?} instead of starting"),
            None => Ok(()),
        }
    }
}

/// Kills the process unless it is wanted.
struct Guard(Option<Ended>);

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(ended) = self.0.take() {
            ended.signal(libc::SIGKILL);
        }
    }
}

/// Make a process in `cgroup`, up to where only its program is missing. `stdio` is empty for one with a terminal.
pub async fn launch(
    reaper: &Reaper,
    order: Order,
    spec: &Spec,
    cgroup: &OwnedFd,
    stdio: &[OwnedFd],
) -> Result<Waiting> {
    let (ours, theirs) = channel()?;
    let file = specification(spec)?;
    let expectation = reaper.expect();
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0("ecr-container")
        .arg(helper::ARGUMENT)
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::from(theirs))
        .stdout(Stdio::null());
    let helper = reaper.spawn(&mut command).context("start the helper")?;
    // The command holds the helper's end, and its closing has to be seen.
    drop(command);
    let mut guards = vec![Guard(Some(helper.clone()))];
    let fds: Vec<RawFd> =
        [&file, cgroup].into_iter().chain(stdio).map(AsRawFd::as_raw_fd).collect();
    wire::send(ours.as_fd(), &order.encode(), &fds).context("order a process")?;

    let ready = async {
        // The process may be ready before the helper, which has made it, gets to say so.
        let (mut child, mut prepared) = (None, None);
        loop {
            match receive(&ours).await? {
                Some((Report::Child(pid), _)) => {
                    let ended = expectation.claim(Pid::from_raw(pid));
                    guards.push(Guard(Some(ended.clone())));
                    child = Some(ended);
                }
                Some((Report::Ready, fds)) => prepared = Some(fds.into_iter().next()),
                Some((Report::Failed(why), _)) => return Err(anyhow!(why)),
                None => bail!(ending(child.as_ref().unwrap_or(&helper))),
            }
            if let (Some(child), Some(master)) = (&child, &mut prepared) {
                return Ok((child.clone(), master.take()));
            }
        }
    };
    let outcome = tokio::time::timeout(PATIENCE, ready).await;
    let (ended, master) = outcome.unwrap_or_else(|_| {
        Err(anyhow!("the container's process was not ready after {} s", PATIENCE.as_secs()))
    })?;
    guards.into_iter().for_each(|mut guard| drop(guard.0.take()));
    Ok(Waiting { channel: ours, ended, master })
}

fn channel() -> Result<(UnixStream, OwnedFd)> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)
        .context("make a socket pair for the helper")?;
    let ours = StdStream::from(ours);
    ours.set_nonblocking(true).context("make the helper's socket non-blocking")?;
    // Only its readiness is used.
    let ours = UnixStream::from_std(ours).context("watch the helper's socket")?;
    Ok((ours, theirs))
}

/// The next report; `None` when the other end is closed.
async fn receive(channel: &UnixStream) -> Result<Option<(Report, Vec<OwnedFd>)>> {
    let received = channel.async_io(Interest::READABLE, || wire::receive(channel.as_fd())).await;
    let (message, fds) = received.context("hear from the container's process")?;
    if message.is_empty() {
        return Ok(None);
    }
    Ok(Some((Report::decode(&message)?, fds)))
}

fn specification(spec: &Spec) -> Result<OwnedFd> {
    let bytes = spec.write_to_bytes().context("encode the specification")?;
    let fd = memfd_create("specification", MFdFlags::MFD_CLOEXEC)
        .context("make a file for the specification")?;
    let mut file = std::fs::File::from(fd);
    file.write_all(&bytes).context("write the specification")?;
    Ok(file.into())
}

fn ending(ended: &Ended) -> String {
    match ended.status() {
        Some(WaitStatus::Signaled(_, signal, _)) => {
            format!("the container's process was killed by {signal} before it was started")
        }
        _ => "the container's process ended before it was started".into(),
    }
}
