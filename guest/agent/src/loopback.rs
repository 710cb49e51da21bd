// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The loopback link, up: the kernel gives it 127.0.0.1 and ::1 by itself.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result};
use nix::errno::Errno;

/// Set `IFF_UP` on `lo` (netdevice(7), `SIOCGIFFLAGS` and `SIOCSIFFLAGS`).
pub fn bring_up() -> Result<()> {
    set_up(c"lo").context("bring up the loopback link")
}

fn set_up(name: &std::ffi::CStr) -> nix::Result<()> {
    // SAFETY: plain system call without pointers.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    let fd = Errno::result(fd)?;
    // SAFETY: the descriptor is new and nobody else's.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };

    // SAFETY: every field of the request, the union's included, is valid as zeroes.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.to_bytes_with_nul()) {
        *to = from.cast_signed() as libc::c_char;
    }
    // SAFETY: both requests take a pointer to an ifreq, which lives until the calls return.
    Errno::result(unsafe {
        libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS as _, &mut request)
    })?;
    // SAFETY: SIOCGIFFLAGS filled in the flags.
    unsafe { request.ifr_ifru.ifru_flags |= libc::IFF_UP as libc::c_short };
    // SAFETY: as for SIOCGIFFLAGS.
    Errno::result(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &request) })?;
    Ok(())
}
