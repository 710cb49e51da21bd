// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The terminal of a process, from the container's own devpts, so that the container finds it in `/dev/pts`.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;

use anyhow::{Context, Result};
use ecr_agent_protocol::oci::Process;
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use nix::unistd::{Uid, fchown};

use super::root::Root;

const MULTIPLEXER: &str = "/dev/pts/ptmx";
/// `TIOCGPTPEER` (asm-generic/ioctls.h): open the other end of this very terminal.
const TIOCGPTPEER: libc::c_ulong = 0x5441;

/// Both ends of a new terminal.
pub struct Terminal {
    master: OwnedFd,
    slave: OwnedFd,
}

impl Terminal {
    /// A terminal if `process` wants one, below `root`, or in this process's root.
    pub fn open_if_wanted(process: &Process, root: Option<&Root>) -> Result<Option<Self>> {
        if !process.terminal {
            return Ok(None);
        }
        let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
        let master = match root {
            Some(root) => root.open_with(Path::new(MULTIPLEXER), flags),
            None => open(MULTIPLEXER, flags, Mode::empty()),
        }
        .with_context(|| format!("open {MULTIPLEXER} in the container for a terminal"))?;
        let unlocked: libc::c_int = 0;
        // SAFETY: the call reads one integer.
        let outcome =
            unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK as _, &raw const unlocked) };
        Errno::result(outcome).context("unlock the terminal")?;
        // SAFETY: the call takes flags and returns a new descriptor.
        let slave = unsafe { libc::ioctl(master.as_raw_fd(), TIOCGPTPEER as _, flags.bits()) };
        let slave = Errno::result(slave).context("open the terminal")?;
        // SAFETY: the kernel has just made it for us.
        let slave = unsafe { OwnedFd::from_raw_fd(slave) };
        let terminal = Terminal { master, slave };
        if let Some(size) = process.console_size.as_ref() {
            resize(terminal.slave.as_fd(), size.height, size.width)?;
        }
        Ok(Some(terminal))
    }

    pub fn master(&self) -> BorrowedFd<'_> {
        self.master.as_fd()
    }

    pub fn slave(&self) -> BorrowedFd<'_> {
        self.slave.as_fd()
    }

    /// Make it the controlling terminal and the standard streams of this process, for user `uid`.
    pub fn become_stdio(&self, uid: Uid) -> Result<()> {
        fchown(&self.slave, Some(uid), None).context("give the terminal to the user")?;
        // SAFETY: the call takes an integer; 0 means that no terminal is stolen from another session.
        let outcome = unsafe { libc::ioctl(self.slave.as_raw_fd(), libc::TIOCSCTTY as _, 0) };
        Errno::result(outcome).context("take the terminal as controlling terminal")?;
        nix::unistd::dup2_stdin(&self.slave)
            .and_then(|()| nix::unistd::dup2_stdout(&self.slave))
            .and_then(|()| nix::unistd::dup2_stderr(&self.slave))
            .context("set the standard streams")
    }
}

/// Set the size of a terminal, whichever end `fd` is. A size beyond what the kernel can say is cut.
pub fn resize(fd: BorrowedFd<'_>, rows: u32, columns: u32) -> Result<()> {
    let clamp = |value| u16::try_from(value).unwrap_or(u16::MAX);
    let size =
        libc::winsize { ws_row: clamp(rows), ws_col: clamp(columns), ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the call reads one structure.
    let outcome = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCSWINSZ as _, &raw const size) };
    Errno::result(outcome).with_context(|| {
        format!("set the size of the terminal to {rows} rows, {columns} columns")
    })?;
    Ok(())
}
