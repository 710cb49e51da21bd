// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Guest memory as devices see it, and who must be told when it changes.

use std::fmt;
use std::os::fd::RawFd;

use vm_memory::{GuestAddress, GuestMemoryAtomic, GuestMemoryMmap};

/// One consistent view of all of guest memory.
pub type GuestMemory = GuestMemoryMmap<()>;

/// A handle from which a device takes the present view, once per batch of work. Hotplug replaces the
/// view; nobody keeps one across a wait.
pub type GuestMemoryHandle = GuestMemoryAtomic<GuestMemory>;

/// One piece of guest-physical memory backed by host memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryRegion {
    /// Guest-physical address of its first byte.
    pub guest: GuestAddress,
    /// Size in bytes.
    pub size: u64,
    /// Address of its first byte in this process.
    pub host: u64,
    /// Whether the guest may only read it.
    pub read_only: bool,
    /// How another process can map it, if it can.
    pub shared: Option<SharedFile>,
}

/// Where a region lies in a file that processes share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SharedFile {
    /// The file. It is open at least until the listeners have removed the region.
    pub fd: RawFd,
    /// Offset of the region's first byte.
    pub offset: u64,
}

/// Somebody who keeps a copy of the memory map: the hypervisor, vhost, vhost-user, VFIO.
///
/// Listeners are called in the order of their registration, and only when all have accepted a new
/// region does the guest hear of it. If one refuses, those before it are told to remove it again.
pub trait MemoryListener: Send {
    /// A name for error messages.
    fn name(&self) -> &'static str;

    /// Make `region` usable.
    ///
    /// # Errors
    /// What was attempted and why it failed.
    fn add(
        &mut self,
        region: &MemoryRegion,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>>;

    /// Forget `region`. It is no longer used by the guest.
    fn remove(&mut self, region: &MemoryRegion);

    /// Whether nobody is there any more who would have to know.
    fn has_ended(&self) -> bool {
        false
    }
}

impl fmt::Debug for dyn MemoryListener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
