// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Devices that come: the kernel's announcements (uevents), and waiting for a device.
//!
//! There is no udev in the guest, so the agent listens to the kernel itself (netlink(7), `NETLINK_KOBJECT_UEVENT`). An
//! event is a reason to look again and nothing more; whether a device is there is read from sysfs. So it does not matter
//! whether the event came before somebody waited, before the agent listened, or was lost in a full socket.
//!
//! Memory blocks are put online as soon as they are announced.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recvfrom, socket,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};

/// The kernel's own announcements; group 2 would be udev's.
const KERNEL_GROUP: u32 = 1;
/// More than any uevent: lib/kobject_uevent.c has a buffer of 2 KiB.
const LARGEST: usize = 8 << 10;
const SYS: &str = "/sys";
const MEMORY_BLOCKS: &str = "/devices/system/memory/";

/// What the agent makes of an announcement.
#[derive(Debug, Default, PartialEq, Eq)]
struct Uevent<'a> {
    action: &'a str,
    /// Below `/sys`.
    device: &'a str,
}

/// Wakes those who wait for a device whenever the kernel announces one.
#[derive(Debug)]
pub struct Uevents {
    heard: watch::Sender<()>,
    /// How long a device may take to show up.
    limit: Duration,
}

impl Uevents {
    /// Nobody listens yet: [`Self::listen`] does.
    pub fn new(limit: Duration) -> Self {
        Uevents { heard: watch::Sender::new(()), limit }
    }

    /// Listen for ever. Without a socket every wait ends only with its time limit, and an error says why.
    pub async fn listen(&self) -> Result<()> {
        // SAFETY: the descriptor is owned, and nothing replaces or closes it while it is registered.
        let socket =
            unsafe { AsyncFd::register_with_interest(kernel_socket()?, Interest::READABLE) }
                .context("watch the uevent socket")?;
        let mut buffer = vec![0; LARGEST];
        loop {
            let mut ready = socket.readable().await.context("wait for uevents")?;
            match ready.try_io(|socket| receive(socket.get_ref(), &mut buffer)) {
                Ok(Ok(Some(length))) => self.hear(&buffer[..length]),
                // Not the kernel's.
                Ok(Ok(None)) => {}
                // The kernel dropped some, which may have been the awaited ones.
                Ok(Err(error)) if error.raw_os_error() == Some(libc::ENOBUFS) => self.wake(),
                Ok(Err(error)) => return Err(error).context("read uevents"),
                Err(_would_block) => {}
            }
        }
    }

    fn hear(&self, datagram: &[u8]) {
        let event = parse(datagram);
        log::trace!("uevent: {} {}", event.action, event.device);
        if event.action == "add" && event.device.starts_with(MEMORY_BLOCKS) {
            put_online(Path::new(&format!("{SYS}{}", event.device)));
        }
        self.wake();
    }

    fn wake(&self) {
        self.heard.send_replace(());
    }

    /// Look for `what` now and after every event, until `look` finds it or the limit is over: then the last thing that
    /// `look` complained of is the error.
    pub async fn wait<T>(&self, what: &str, mut look: impl FnMut() -> Result<T>) -> Result<T> {
        let mut wait = self.start_wait();
        loop {
            match look() {
                Ok(found) => return Ok(found),
                Err(error) if !wait.again().await => {
                    let limit = self.limit.as_secs_f32();
                    return Err(error.context(format!("{what} did not show up within {limit} s")));
                }
                Err(_) => {}
            }
        }
    }

    /// For a search that [`Self::wait`] cannot do, such as an asynchronous one.
    pub fn start_wait(&self) -> Wait {
        Wait { heard: self.heard.subscribe(), deadline: Instant::now() + self.limit }
    }
}

/// A search under way: every event since its start, or since the last look, is a reason to look again.
#[derive(Debug)]
pub struct Wait {
    heard: watch::Receiver<()>,
    deadline: Instant,
}

impl Wait {
    /// Wait for the next event; false when the time is over.
    pub async fn again(&mut self) -> bool {
        matches!(timeout_at(self.deadline, self.heard.changed()).await, Ok(Ok(())))
    }
}

fn kernel_socket() -> Result<OwnedFd> {
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        SockProtocol::NetlinkKObjectUEvent,
    )
    .context("open a socket for uevents")?;
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, KERNEL_GROUP)).context("listen for uevents")?;
    Ok(socket)
}

/// The length of a datagram of the kernel, or none if a process sent it.
fn receive(socket: &OwnedFd, buffer: &mut [u8]) -> io::Result<Option<usize>> {
    loop {
        match recvfrom::<NetlinkAddr>(socket.as_raw_fd(), buffer) {
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
            Ok((length, sender)) => {
                return Ok(sender.is_some_and(|sender| sender.pid() == 0).then_some(length));
            }
        }
    }
}

/// lib/kobject_uevent.c: `ACTION@DEVPATH`, then `KEY=VALUE` lines, each with a NUL at its end. What is not understood
/// stays empty.
fn parse(datagram: &[u8]) -> Uevent<'_> {
    let mut event = Uevent::default();
    for line in datagram.split(|&byte| byte == 0) {
        match str::from_utf8(line).unwrap_or_default().split_once('=') {
            Some(("ACTION", value)) => event.action = value,
            Some(("DEVPATH", value)) => event.device = value,
            _ => {}
        }
    }
    event
}

/// Put a memory block, or a CPU, online; true if it was not.
pub fn put_online(device: &Path) -> bool {
    let file = device.join("online");
    match fs::read_to_string(&file) {
        Ok(state) if state.trim() == "0" => {}
        // Online, or it cannot be switched.
        _ => return false,
    }
    match fs::write(&file, "1") {
        Ok(()) => true,
        Err(error) => {
            log::warn!("put {} online: {error}", device.display());
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::bail;
    use std::cell::Cell;

    const LIMIT: Duration = Duration::from_millis(50);

    #[test]
    fn an_announcement_as_linux_writes_it() {
        let datagram = b"add@/devices/pci0000:00/0000:00:02.0/virtio1/block/vda\0ACTION=add\0\
            DEVPATH=/devices/pci0000:00/0000:00:02.0/virtio1/block/vda\0SUBSYSTEM=block\0SEQNUM=7\0";
        let event = parse(datagram);
        assert_eq!(event.action, "add");
        assert_eq!(event.device, "/devices/pci0000:00/0000:00:02.0/virtio1/block/vda");
        assert_eq!(parse(b"libudev\0\xfe\xed\xca\xfe"), Uevent::default());
        assert_eq!(parse(b""), Uevent::default());
    }

    #[tokio::test(flavor = "current_thread")]
    async fn what_is_there_is_found_without_an_event() {
        let uevents = Uevents::new(Duration::ZERO);
        assert_eq!(uevents.wait("it", || Ok(7)).await.unwrap(), 7);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn an_event_makes_the_search_go_on() {
        let uevents = Uevents::new(Duration::from_secs(60));
        let looks = Cell::new(0);
        let search = uevents.wait("it", || {
            looks.set(looks.get() + 1);
            if looks.get() < 3 { bail!("not yet") } else { Ok(()) }
        });
        let events = async {
            // One of them between two looks, one while the search waits.
            while looks.get() < 3 {
                uevents.hear(b"add@/x\0ACTION=add\0DEVPATH=/x\0");
                tokio::task::yield_now().await;
            }
        };
        let (found, ()) = tokio::join!(search, events);
        found.unwrap();
    }

    #[tokio::test(flavor = "current_thread")]
    async fn what_never_comes_is_named_with_the_last_complaint() {
        let uevents = Uevents::new(LIMIT);
        let never = uevents.wait("disk 02/01", || -> Result<()> { bail!("no bridge") });
        let error = never.await.unwrap_err();
        assert_eq!(format!("{error:#}"), "disk 02/01 did not show up within 0.05 s: no bridge");
    }

    #[test]
    fn only_what_is_offline_is_put_online() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!put_online(dir.path()), "no switch");
        fs::write(dir.path().join("online"), "1\n").unwrap();
        assert!(!put_online(dir.path()));
        fs::write(dir.path().join("online"), "0\n").unwrap();
        assert!(put_online(dir.path()));
        assert_eq!(fs::read_to_string(dir.path().join("online")).unwrap(), "1");
    }
}
