// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The signals that ask the process to end, as a descriptor (signalfd(2)).

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};

use vmm_sys_util::signal::{block_signal, create_sigset};

const SIGNALS: [i32; 3] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP];

/// The signals that ask the process to end. They are never unblocked: the process ends by itself.
#[derive(Debug)]
pub struct Signals(File);

/// What the sender wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// An orderly end.
    PowerDown,
    /// An end now: the terminal has gone.
    Quit,
}

impl Signals {
    /// Block them in this thread and those it starts, and receive them here.
    pub fn take() -> io::Result<Self> {
        for signal in SIGNALS {
            block_signal(signal).map_err(|error| io::Error::other(format!("{error:?}")))?;
        }
        let set = create_sigset(&SIGNALS).map_err(io::Error::from)?;
        // SAFETY: `set` lives across the call, which only reads it.
        let fd =
            unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just returned `fd`, and nobody else knows it.
        Ok(Self(unsafe { File::from_raw_fd(fd) }))
    }

    /// The next signal, if one has come.
    pub fn next(&mut self) -> Option<Wish> {
        let mut info = [0; size_of::<libc::signalfd_siginfo>()];
        self.0.read_exact(&mut info).ok()?;
        // `ssi_signo` comes first.
        let signal = u32::from_ne_bytes(*info.first_chunk()?);
        let hang_up = i32::try_from(signal) == Ok(libc::SIGHUP);
        Some(if hang_up { Wish::Quit } else { Wish::PowerDown })
    }
}

impl AsRawFd for Signals {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
