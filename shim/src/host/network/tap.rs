// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Descriptors behind a guest's network interface: the queues of a tap or macvtap, and vhost-net.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;

use anyhow::{Context as _, Result, ensure};

const TUN: &str = "/dev/net/tun";
const VHOST: &str = "/dev/vhost-net";

nix::ioctl_write_ptr_bad!(
    /// `TUNSETIFF` of `linux/if_tun.h`.
    tun_set_iff,
    nix::request_code_write!(b'T', 202, size_of::<libc::c_int>()),
    libc::ifreq
);

/// Make the tap `name` in the network namespace of this thread, with one descriptor for each queue. It is there for as
/// long as one of them is open.
pub(super) fn create(name: &str, queues: u16) -> Result<Vec<OwnedFd>> {
    let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    if queues > 1 {
        flags |= libc::IFF_MULTI_QUEUE;
    }
    let request = interface_request(name, flags)?;
    let open_queue = || {
        let file = open(TUN).with_context(|| format!("open {TUN} (is the module tun there?)"))?;
        // SAFETY: the kernel reads and writes the one structure that it is given.
        unsafe { tun_set_iff(file.as_raw_fd(), &raw const request) }
            .with_context(|| format!("create {name} with {queues} queues"))?;
        Ok(file.into())
    };
    (0..queues).map(|_| open_queue()).collect()
}

fn interface_request(name: &str, flags: libc::c_int) -> Result<libc::ifreq> {
    let mut ifr_name = [0; libc::IFNAMSIZ];
    ensure!(name.len() < ifr_name.len(), "interface name {name} is too long");
    for (to, from) in ifr_name.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    let flags = libc::c_short::try_from(flags)?;
    Ok(libc::ifreq { ifr_name, ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: flags } })
}

/// Open the device of the macvtap with this index once for each queue.
pub(super) fn open_macvtap(index: u32, queues: u16) -> Result<Vec<OwnedFd>> {
    let path = format!("/dev/tap{index}");
    (0..queues).map(|_| Ok(open(&path).with_context(|| format!("open {path}"))?.into())).collect()
}

/// Open vhost-net once for each queue. Nothing where the host has none: the queues are then served by this process.
pub(super) fn open_vhost(queues: u16) -> Result<Vec<OwnedFd>> {
    let mut fds = Vec::new();
    for _ in 0..queues {
        match open(VHOST) {
            Ok(file) => fds.push(file.into()),
            Err(error) if absent(&error) => return Ok(Vec::new()),
            Err(error) => return Err(error).with_context(|| format!("open {VHOST}")),
        }
    }
    Ok(fds)
}

fn absent(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV | libc::ENXIO))
}

fn open(path: &str) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path)
}
