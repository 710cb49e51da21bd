// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The part of the kernel's interface that all vhost devices share: rings.
//!
//! Ring errors (`VHOST_SET_VRING_ERR`) are not listened to: the kernel stops the ring, and the guest
//! notices.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vhost::vhost_kern::VhostKernBackend;
use vhost::{VhostBackend, VringConfigData};
use virtio_queue::QueueT;
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryBackend};
use vmm_sys_util::eventfd::EventFd;

use crate::memory::{GuestMemory, GuestMemoryHandle};
use crate::virtio::ActiveQueue;

/// Why the kernel's driver could not be set up.
#[derive(Debug, thiserror::Error)]
#[error("{attempted}: {source}")]
pub struct VhostError {
    /// What was attempted, with its value.
    pub attempted: String,
    /// Why it failed.
    pub source: io::Error,
}

/// For `map_err`: name what was attempted.
pub(super) fn failed(attempted: impl Into<String>) -> impl FnOnce(vhost::Error) -> VhostError {
    move |error| VhostError { attempted: attempted.into(), source: io_error(error) }
}

/// The system's error, where there is one.
pub(super) fn io_error(error: vhost::Error) -> io::Error {
    match error {
        vhost::Error::IoctlError(error)
        | vhost::Error::IOError(error)
        | vhost::Error::VhostOpen(error) => error,
        error => io::Error::other(error),
    }
}

/// An open vhost device and the guest memory that its rings lie in.
#[derive(Debug)]
pub(super) struct Kernel {
    fd: Arc<File>,
    memory: GuestMemoryHandle,
}

impl Kernel {
    pub(super) fn new(fd: Arc<File>, memory: GuestMemoryHandle) -> Self {
        Self { fd, memory }
    }

    /// For requests that have nothing to do with rings.
    pub(super) fn without_rings(fd: Arc<File>) -> Self {
        Self { fd, memory: GuestMemoryHandle::new(GuestMemory::default()) }
    }

    /// Guest memory.
    pub(super) fn memory(&self) -> &GuestMemoryHandle {
        &self.memory
    }

    /// Hand ring number `index` over to the kernel, which begins to serve it when the device runs.
    /// `call` must live as long as the kernel has the ring.
    pub(super) fn give_ring(
        &self,
        index: usize,
        ring: &ActiveQueue,
        call: &EventFd,
    ) -> Result<(), VhostError> {
        let queue = &ring.queue;
        let attempt = |what: &str| failed(format!("give {what} of queue {index} to the kernel"));
        let config = VringConfigData {
            queue_max_size: queue.max_size(),
            queue_size: queue.size(),
            flags: 0,
            desc_table_addr: queue.desc_table(),
            used_ring_addr: queue.used_ring(),
            avail_ring_addr: queue.avail_ring(),
            log_addr: None,
        };
        if !lies_in_single_regions(&config, &self.memory) {
            return Err(attempt("the addresses")(vhost::Error::InvalidQueue));
        }
        self.set_vring_num(index, queue.size()).map_err(attempt("the size"))?;
        self.set_vring_base(index, queue.next_avail()).map_err(attempt("the index"))?;
        self.set_vring_addr(index, &config).map_err(attempt("the addresses"))?;
        self.set_vring_call(index, call).map_err(attempt("the interrupt"))?;
        self.set_vring_kick(index, &ring.kick).map_err(attempt("the doorbell"))
    }

    /// Take ring number `index` back, with where the kernel has come to; the device must not run.
    pub(super) fn take_ring(&self, index: usize, ring: &mut ActiveQueue) -> Result<(), VhostError> {
        let attempt = || failed(format!("take queue {index} back from the kernel"));
        let base = self.get_vring_base(index).map_err(attempt())?;
        let base = u16::try_from(base).map_err(|_| attempt()(vhost::Error::InvalidQueue))?;
        ring.queue.set_next_avail(base);
        // The kernel keeps its used index in the ring only.
        let used = ring.queue.used_idx(&*self.memory.memory(), Ordering::Acquire);
        let used = used.map_err(|_| attempt()(vhost::Error::UsedAddress))?;
        ring.queue.set_next_used(used.0);
        Ok(())
    }
}

/// The kernel is given host addresses, so each part of a ring must lie in one region: what follows a
/// region in the guest need not follow it in this process, and the kernel would write there.
fn lies_in_single_regions(config: &VringConfigData, memory: &GuestMemoryHandle) -> bool {
    let memory = memory.memory();
    ring_parts(config)
        .into_iter()
        .all(|(address, length)| memory.get_slice(GuestAddress(address), length).is_ok())
}

/// Address and size of a ring's parts: descriptors, available ring, used ring; sections 2.7.5, 2.7.6 and 2.7.8.
pub(super) fn ring_parts(config: &VringConfigData) -> [(u64, usize); 3] {
    let size = usize::from(config.queue_size);
    [
        (config.desc_table_addr, 16 * size),
        (config.avail_ring_addr, 6 + 2 * size),
        (config.used_ring_addr, 6 + 8 * size),
    ]
}

impl AsRawFd for Kernel {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl VhostKernBackend for Kernel {
    type AS = GuestMemoryHandle;

    fn mem(&self) -> &Self::AS {
        &self.memory
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_may_not_run_out_of_its_region() {
        // Neighbours in the guest, and two mappings here.
        let ranges = [(GuestAddress(0), 0x10000), (GuestAddress(0x10000), 0x10000)];
        let memory = GuestMemoryHandle::new(GuestMemory::from_ranges(&ranges).unwrap());
        let good = VringConfigData {
            queue_max_size: 128,
            queue_size: 128,
            flags: 0,
            desc_table_addr: 0x10000 - 2048,
            avail_ring_addr: 0x10000,
            used_ring_addr: 0x20000 - 1030,
            log_addr: None,
        };
        assert!(lies_in_single_regions(&good, &memory));
        for bad in [
            VringConfigData { desc_table_addr: 0x10000 - 2047, ..good },
            VringConfigData { avail_ring_addr: 0x10000 - 2, ..good },
            VringConfigData { used_ring_addr: 0x20000 - 1029, ..good },
            VringConfigData { desc_table_addr: u64::MAX - 5, ..good },
        ] {
            assert!(!lies_in_single_regions(&bad, &memory));
        }
    }
}
