// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Taps: network interfaces of the host whose cable ends in this process (Linux, drivers/net/tun.c; macvtap
//! speaks the same language). Each descriptor is one queue of the interface.
//!
//! A frame is read and written whole, behind a `struct virtio_net_hdr` of 12 bytes, which the kernel
//! understands: checksums and segmentation are left to whoever comes last.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicBool, Ordering};

use libc::{TUN_F_CSUM, TUN_F_TSO_ECN, TUN_F_TSO4, TUN_F_TSO6, TUN_F_UFO, TUN_F_USO4, TUN_F_USO6};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};

/// Bytes in front of a frame: `struct virtio_net_hdr_v1`, virtio 1.2 section 5.1.6.
pub const HEADER_SIZE: usize = 12;

const CLONE_DEVICE: &str = "/dev/net/tun";
const KIND: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// What a kernel may be able to do, the most that any can first.
const OFFLOADS: [u32; 4] =
    [TCP_OFFLOADS | TUN_F_UFO | TUN_F_USO4 | TUN_F_USO6, TCP_OFFLOADS | TUN_F_UFO, TCP_OFFLOADS, 0];
const TCP_OFFLOADS: u32 = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN;

/// One queue of whatever carries the frames of a network device. Frames are read from and written to its
/// descriptor, which does not block, one at a time and each behind a header of [`HEADER_SIZE`] bytes.
pub trait NetBackend: AsRawFd + fmt::Debug + Send + Sync {
    /// What [`Self::set_offloads`] can take.
    fn offloads(&self) -> u32;

    /// What frames the reader accepts unfinished: `TUN_F_*`.
    ///
    /// # Errors
    /// The host refused.
    fn set_offloads(&self, offloads: u32) -> io::Result<()>;

    /// Whether frames are to arrive in this queue, or only in others.
    ///
    /// # Errors
    /// The host refused.
    fn set_enabled(&self, enabled: bool) -> io::Result<()>;
}

/// Why a descriptor cannot be used as a tap, or one cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// It is something else.
    #[error("descriptor {fd} is no tap: {source}")]
    NoTap {
        /// The descriptor.
        fd: RawFd,
        /// What the kernel said.
        source: io::Error,
    },
    /// It was opened in another way.
    #[error(
        "tap {name} was opened with flags {flags:#x}: use IFF_TAP, IFF_NO_PI and IFF_VNET_HDR ({KIND:#x})"
    )]
    Flags {
        /// The interface.
        name: String,
        /// How it was opened.
        flags: libc::c_int,
    },
    /// The kernel refused a step.
    #[error("{attempted} tap {name}: {source}")]
    Refused {
        /// What was attempted.
        attempted: &'static str,
        /// The interface.
        name: String,
        /// Why not.
        source: io::Error,
    },
}

/// One queue of a tap.
#[derive(Debug)]
pub struct Tap {
    // Configuration.
    name: String,
    multi_queue: bool,
    offloads: u32,
    // Wiring.
    file: File,
    // State.
    enabled: AtomicBool,
}

impl Tap {
    /// Use an open descriptor.
    ///
    /// # Errors
    /// See [`TapError`].
    pub fn new(fd: OwnedFd) -> Result<Self, TapError> {
        let file = File::from(fd);
        let mut request = InterfaceRequest::default();
        // SAFETY: the kernel fills the structure, which has the size that it expects.
        if unsafe { ioctl_with_mut_ref(&file, libc::TUNGETIFF as _, &mut request) } != 0 {
            let source = io::Error::last_os_error();
            return Err(TapError::NoTap { fd: file.as_raw_fd(), source });
        }
        let (name, flags) = (request.name(), request.flags());
        if flags & KIND != KIND {
            return Err(TapError::Flags { name, flags });
        }
        let multi_queue = flags & libc::IFF_MULTI_QUEUE != 0;
        let mut tap = Self { name, multi_queue, offloads: 0, file, enabled: AtomicBool::new(true) };
        tap.set_non_blocking().map_err(tap.refused("set O_NONBLOCK on"))?;
        tap.set_header_size().map_err(tap.refused("set the size of headers of"))?;
        tap.offloads = tap.probe_offloads().map_err(tap.refused("turn off the offloads of"))?;
        Ok(tap)
    }

    /// Open `queues` queues of the interface `name`, which is made if it is not there and lasts as long as
    /// one of them then.
    ///
    /// # Errors
    /// See [`TapError`].
    pub fn open(name: &str, queues: u16) -> Result<Vec<Self>, TapError> {
        (0..queues).map(|_| Self::new(open_queue(name, queues > 1)?)).collect()
    }

    /// Name of the interface.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn refused(&self, attempted: &'static str) -> impl FnOnce(io::Error) -> TapError + use<> {
        let name = self.name.clone();
        move |source| TapError::Refused { attempted, name, source }
    }

    fn set_non_blocking(&self) -> io::Result<()> {
        // SAFETY: fcntl takes numbers only.
        let flags = unsafe { libc::fcntl(self.as_raw_fd(), libc::F_GETFL) };
        let result = match flags {
            -1 => -1,
            // SAFETY: as above.
            flags => unsafe {
                libc::fcntl(self.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK)
            },
        };
        if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    fn set_header_size(&self) -> io::Result<()> {
        let size = HEADER_SIZE as libc::c_int;
        // SAFETY: the kernel reads an int from the pointer, which the reference keeps valid.
        check(unsafe { ioctl_with_ref(&self.file, libc::TUNSETVNETHDRSZ as _, &size) })
    }

    /// There is no other way to ask than to try.
    fn probe_offloads(&self) -> io::Result<u32> {
        let supported = OFFLOADS.into_iter().find(|&offloads| self.try_offloads(offloads).is_ok());
        self.try_offloads(0)?;
        Ok(supported.unwrap_or(0))
    }

    fn try_offloads(&self, offloads: u32) -> io::Result<()> {
        // SAFETY: the argument is a number.
        check(unsafe { ioctl_with_val(&self.file, libc::TUNSETOFFLOAD as _, offloads.into()) })
    }
}

impl NetBackend for Tap {
    fn offloads(&self) -> u32 {
        self.offloads
    }

    fn set_offloads(&self, offloads: u32) -> io::Result<()> {
        self.try_offloads(offloads)
    }

    fn set_enabled(&self, enabled: bool) -> io::Result<()> {
        // The kernel refuses what is so already, and the question where there are no other queues.
        if !self.multi_queue || self.enabled.load(Ordering::Acquire) == enabled {
            return Ok(());
        }
        let flag = if enabled { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
        let request = InterfaceRequest::new("", flag);
        // SAFETY: the kernel reads the structure, which has the size that it expects.
        check(unsafe { ioctl_with_ref(&self.file, libc::TUNSETQUEUE as _, &request) })?;
        self.enabled.store(enabled, Ordering::Release);
        Ok(())
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn open_queue(name: &str, multi_queue: bool) -> Result<OwnedFd, TapError> {
    let refused =
        |attempted| move |source| TapError::Refused { attempted, name: name.to_owned(), source };
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK)
        .open(CLONE_DEVICE)
        .map_err(refused("open /dev/net/tun for"))?;
    let attach = |flags| {
        let request = InterfaceRequest::new(name, flags);
        // SAFETY: the kernel reads the structure, which has the size that it expects.
        check(unsafe { ioctl_with_ref(&file, libc::TUNSETIFF as _, &request) })
    };
    let several = KIND | libc::IFF_MULTI_QUEUE;
    let attached = match attach(if multi_queue { several } else { KIND }) {
        // An interface that is there may have been made for several queues.
        Err(error) if !multi_queue && error.raw_os_error() == Some(libc::EINVAL) => attach(several),
        attached => attached,
    };
    attached.map_err(refused("attach to"))?;
    Ok(file.into())
}

/// `struct ifreq` with flags in its union.
#[repr(C)]
#[derive(Default)]
struct InterfaceRequest {
    name: [u8; libc::IFNAMSIZ],
    flags: u16,
    rest: [u8; 22],
}

impl InterfaceRequest {
    fn new(name: &str, flags: libc::c_int) -> Self {
        let mut request = Self { flags: flags as u16, ..Self::default() };
        // The last byte stays zero.
        for (to, from) in request.name[..libc::IFNAMSIZ - 1].iter_mut().zip(name.bytes()) {
            *to = from;
        }
        request
    }

    fn name(&self) -> String {
        let name = self.name.split(|byte| *byte == 0).next().unwrap_or_default();
        String::from_utf8_lossy(name).into_owned()
    }

    fn flags(&self) -> libc::c_int {
        self.flags.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_request_is_as_large_as_the_kernels() {
        assert_eq!(size_of::<InterfaceRequest>(), 40);
        let request = InterfaceRequest::new("a-name-that-is-too-long", KIND);
        assert_eq!((request.name().as_str(), request.flags()), ("a-name-that-is-", KIND));
    }

    #[test]
    fn what_is_no_tap_is_refused() {
        let file = tempfile::tempfile().unwrap();
        let text = Tap::new(file.into()).unwrap_err().to_string();
        assert!(text.contains(" is no tap: "), "{text}");
    }

    /// Root may make one, and only where the host has the driver.
    fn open(queues: u16) -> Option<Vec<Tap>> {
        Tap::open("", queues).inspect_err(|error| eprintln!("skipped: {error}")).ok()
    }

    #[test]
    fn queues_of_one_tap_come_and_go() {
        let Some(first) = open(2) else { return };
        // With no name given, each is an interface of its own.
        let name = first[0].name().to_owned();
        let second = Tap::new(open_queue(&name, true).unwrap()).unwrap();
        assert_eq!(second.name(), name);
        for enabled in [false, false, true, true, false] {
            second.set_enabled(enabled).unwrap();
        }
        assert!(Tap::new(open_queue(&name, false).unwrap()).unwrap().multi_queue);
    }

    #[test]
    fn a_tap_does_what_it_says() {
        let Some(mut taps) = open(1) else { return };
        let tap = taps.remove(0);
        tap.set_enabled(false).unwrap();
        assert_ne!(tap.offloads() & TUN_F_CSUM, 0);
        tap.set_offloads(tap.offloads()).unwrap();
        tap.set_offloads(0).unwrap();
        assert!(tap.set_offloads(TUN_F_TSO4).is_err(), "no segments without checksums");
        let error = io::Read::read(&mut &tap.file, &mut [0; 100]).unwrap_err();
        // A tap that is down says so instead.
        assert!(matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EIO)), "{error}");
    }

    #[test]
    fn flags_of_another_kind_are_named() {
        let Some(tap) = open(1) else { return };
        drop(tap);
        let file = OpenOptions::new().read(true).write(true).open(CLONE_DEVICE).unwrap();
        let request = InterfaceRequest::new("", libc::IFF_TAP | libc::IFF_NO_PI);
        // SAFETY: as in `open_queue`.
        check(unsafe { ioctl_with_ref(&file, libc::TUNSETIFF as _, &request) }).unwrap();
        let text = Tap::new(file.into()).unwrap_err().to_string();
        assert!(text.contains("IFF_VNET_HDR"), "{text}");
    }
}
