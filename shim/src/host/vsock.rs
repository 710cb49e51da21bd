// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The guest's context id (CID) on the host's vsock. Ids belong to the whole host, and there is nobody to ask for one:
//! a random one is tried, and while it is taken the next, upwards and then downwards, as Kata does. The kernel keeps an
//! id for as long as the descriptor that it was set on is open.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use nix::errno::Errno;

const DEVICE: &str = "/dev/vhost-vsock";
/// 0 to 2 are the hypervisor, loopback and the host; the highest is "any" (`linux/vm_sockets.h`).
const FIRST_CID: u32 = 3;
const LAST_CID: u32 = u32::MAX - 1;
/// After so many taken ids in a row something else is wrong.
const MAX_TRIES: u32 = 1 << 16;

nix::ioctl_write_ptr!(
    /// `VHOST_VSOCK_SET_GUEST_CID` of `linux/vhost.h`.
    set_guest_cid,
    0xaf,
    0x60,
    u64
);

/// An id, reserved for as long as this lives or the device is served.
#[derive(Debug)]
pub struct GuestCid {
    /// The opened vhost device, on which the id is set.
    pub device: OwnedFd,
    /// The id.
    pub cid: u32,
}

/// Reserve a context id; `None` when this host has no vhost-vsock.
pub fn allocate() -> Result<Option<GuestCid>> {
    let Some(device) = open(Path::new(DEVICE))? else {
        return Ok(None);
    };
    let cid = walk(random_cid()?, |cid| {
        let cid = u64::from(cid);
        // SAFETY: the argument points to a u64, which the kernel reads.
        unsafe { set_guest_cid(device.as_raw_fd(), &raw const cid) }.map(drop)
    })?;
    Ok(Some(GuestCid { device: device.into(), cid }))
}

/// The device node may be missing, or be there for a module that cannot be loaded.
fn open(path: &Path) -> Result<Option<File>> {
    match OpenOptions::new().read(true).write(true).open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if absent(&error) => Ok(None),
        Err(error) => Err(error).with_context(|| format!("open {}", path.display())),
    }
}

fn absent(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV | libc::ENXIO))
}

fn random_cid() -> Result<u32> {
    const PATH: &str = "/dev/urandom";
    let mut bytes = [0; 4];
    File::open(PATH).and_then(|mut file| file.read_exact(&mut bytes)).context(PATH)?;
    Ok(FIRST_CID + u32::from_ne_bytes(bytes) % (LAST_CID - FIRST_CID + 1))
}

/// The first id from `start` upwards, then downwards, that `reserve` does not call taken.
fn walk(start: u32, mut reserve: impl FnMut(u32) -> nix::Result<()>) -> Result<u32> {
    let candidates = (start..=LAST_CID).chain((FIRST_CID..start).rev());
    for cid in candidates.take(MAX_TRIES as usize) {
        match reserve(cid) {
            Ok(()) => return Ok(cid),
            Err(Errno::EADDRINUSE) => {}
            Err(errno) => {
                return Err(errno).with_context(|| format!("set vsock CID {cid} on {DEVICE}"));
            }
        }
    }
    bail!("no free vsock CID: {MAX_TRIES} from {start} on are taken")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn taken_ids_are_walked_over_upwards_then_downwards() {
        let mut tried = Vec::new();
        let cid = walk(LAST_CID - 1, |cid| {
            tried.push(cid);
            if cid >= LAST_CID - 2 { Err(Errno::EADDRINUSE) } else { Ok(()) }
        });
        assert_eq!(cid.unwrap(), LAST_CID - 3);
        assert_eq!(tried, [LAST_CID - 1, LAST_CID, LAST_CID - 2, LAST_CID - 3]);
    }

    #[test]
    fn other_errors_and_a_full_host_end_the_walk() {
        let error = walk(7, |_| Err(Errno::EPERM)).unwrap_err();
        assert!(format!("{error:#}").contains("set vsock CID 7"), "{error:#}");
        let mut tries = 0;
        let error = walk(3, |_| {
            tries += 1;
            Err(Errno::EADDRINUSE)
        });
        assert!(error.is_err());
        assert_eq!(tries, MAX_TRIES);
    }

    #[test]
    fn random_ids_are_valid() {
        for _ in 0..100 {
            assert!((FIRST_CID..=LAST_CID).contains(&random_cid().unwrap()));
        }
    }

    #[test]
    fn a_host_without_the_module_is_no_error() {
        assert!(open(Path::new("/dev/no-such-device")).unwrap().is_none());
        assert!(open(Path::new("/proc/self/mem/x")).is_err());
    }

    #[test]
    fn two_guests_get_two_ids() {
        match allocate().unwrap() {
            None => eprintln!("SKIPPED: this host has no {DEVICE}"),
            Some(first) => assert_ne!(first.cid, allocate().unwrap().unwrap().cid),
        }
    }
}
