// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What the agent and the helper that becomes a container's process say to each other: one message per packet on a
//! `SOCK_SEQPACKET` pair, with file descriptors where said.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use anyhow::{Context, Result, bail};
use nix::cmsg_space;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

/// The longest message.
const MAX_MESSAGE: usize = 8 << 10;
/// The most descriptors with one message.
const MAX_FDS: usize = 8;

/// What the helper has to do. With it come, in this order: a file with the OCI specification as a message of the agent
/// protocol, the container's cgroup directory, and, unless the process has a terminal, its standard input, output and
/// error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Make a container and become its first process.
    Create,
    /// Join the container whose first process this is.
    Exec(i32),
}

/// What the helper says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Report {
    /// This process, a child of the agent, will be the container's.
    Child(i32),
    /// Everything is prepared; with it comes the terminal's other end, if there is one. [`GO`] is awaited.
    Ready,
    /// It went wrong, and this process ends.
    Failed(String),
}

/// What the agent answers to [`Report::Ready`]. If the program is started, the socket closes without a further word.
pub const GO: &[u8] = b"go";

impl Order {
    pub fn encode(self) -> Vec<u8> {
        match self {
            Order::Create => b"create".to_vec(),
            Order::Exec(init) => format!("exec {init}").into_bytes(),
        }
    }

    pub fn decode(message: &[u8]) -> Result<Self> {
        let text = str::from_utf8(message).context("an order is text")?;
        match text.split_once(' ') {
            None if text == "create" => Ok(Order::Create),
            Some(("exec", init)) => Ok(Order::Exec(init.parse().context("a process id")?)),
            _ => bail!("{text:?} is no order"),
        }
    }
}

impl Report {
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Report::Child(pid) => format!("child {pid}").into_bytes(),
            Report::Ready => b"ready".to_vec(),
            Report::Failed(why) => {
                let mut message = format!("failed {why}").into_bytes();
                message.truncate(MAX_MESSAGE);
                message
            }
        }
    }

    pub fn decode(message: &[u8]) -> Result<Self> {
        let text = String::from_utf8_lossy(message);
        match text.split_once(' ') {
            None if text == "ready" => Ok(Report::Ready),
            Some(("child", pid)) => Ok(Report::Child(pid.parse().context("a process id")?)),
            Some(("failed", why)) => Ok(Report::Failed(why.into())),
            _ => bail!("{text:?} is no report"),
        }
    }
}

/// Send one message.
pub fn send(socket: BorrowedFd<'_>, message: &[u8], fds: &[RawFd]) -> io::Result<()> {
    let rights = [ControlMessage::ScmRights(fds)];
    let rights = if fds.is_empty() { &[] } else { &rights[..] };
    let part = [IoSlice::new(message)];
    sendmsg::<()>(socket.as_raw_fd(), &part, rights, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

/// Receive one message; an empty one when the other end is closed.
pub fn receive(socket: BorrowedFd<'_>) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut message = vec![0; MAX_MESSAGE];
    let mut space = cmsg_space!([RawFd; MAX_FDS]);
    let mut fds = Vec::new();
    let length = {
        let mut part = [IoSliceMut::new(&mut message)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let received = recvmsg::<()>(socket.as_raw_fd(), &mut part, Some(&mut space), flags)?;
        for control in received.cmsgs()? {
            if let ControlMessageOwned::ScmRights(rights) = control {
                // SAFETY: the kernel has just made these descriptors for us, and nobody else knows them.
                fds.extend(rights.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
        received.bytes
    };
    message.truncate(length);
    Ok((message, fds))
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    use std::os::fd::AsFd;

    #[test]
    fn messages_survive_the_way() {
        for order in [Order::Create, Order::Exec(4711)] {
            assert_eq!(Order::decode(&order.encode()).unwrap(), order);
        }
        let reports =
            [Report::Child(3), Report::Ready, Report::Failed("exec \"a b\": no\n".into())];
        for report in reports {
            assert_eq!(Report::decode(&report.encode()).unwrap(), report);
        }
        assert!(Report::decode(b"child x").is_err());
        assert!(Order::decode(b"run").is_err());
        assert_eq!(Report::Failed("x".repeat(1 << 20)).encode().len(), MAX_MESSAGE);
    }

    #[test]
    fn descriptors_and_the_end_are_received() {
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
                .unwrap();
        send(ours.as_fd(), GO, &[0, 1]).unwrap();
        let (message, fds) = receive(theirs.as_fd()).unwrap();
        assert_eq!((message.as_slice(), fds.len()), (GO, 2));
        drop(ours);
        assert_eq!(receive(theirs.as_fd()).unwrap().0, b"");
        assert!(send(theirs.as_fd(), GO, &[]).is_err());
    }
}
