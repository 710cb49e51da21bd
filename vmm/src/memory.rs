// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Guest memory: where it comes from, where the guest sees it, and who is told.
//!
//! RAM is anonymous or comes from a memfd or a file; an image shown as persistent memory is mapped
//! privately, so that all VMs share one page cache. Nothing is touched until the guest touches it, so starting
//! a VM costs the same whatever its size.

mod backing;

use std::fmt;
use std::io;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError};

use ecr_arch::layout::Range;
use ecr_devices::memory::{
    GuestMemory, GuestMemoryHandle, MemoryListener, MemoryRegion, SharedFile,
};
use vm_memory::{
    GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap,
};

use crate::hypervisor::{MemorySlot, Vm};
pub use backing::{Backing, RamBacking};

/// Why guest memory could not be had.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The host cannot have it.
    #[error(
        "{size} bytes of guest memory were asked for, but this host has {present} bytes of memory and swap: use less"
    )]
    TooMuch {
        /// How many bytes.
        size: u64,
        /// What there is.
        present: u64,
    },
    /// The host has not got it.
    #[error("get {size} bytes of guest memory from {from}: {source}")]
    Allocate {
        /// How many.
        size: u64,
        /// Where from.
        from: String,
        /// Why not.
        source: io::Error,
    },
    /// An image cannot be shown as persistent memory.
    #[error("use {path} as persistent memory: {problem}", path = path.display())]
    Image {
        /// The image.
        path: PathBuf,
        /// Why not.
        problem: String,
    },
    /// Somebody who must know the memory map refused a region.
    #[error("{listener} refused guest memory at {base:#x} ({size:#x} bytes): {problem}")]
    Refused {
        /// Who.
        listener: &'static str,
        /// Where.
        base: u64,
        /// Size in bytes.
        size: u64,
        /// Why.
        problem: String,
    },
}

/// Owns guest memory and tells the listeners, in order, before the guest hears of a change.
pub struct MemoryManager {
    /// Dropped before the mappings: none of them refers to memory that is gone.
    listeners: Vec<Box<dyn MemoryListener>>,
    /// What the listeners know.
    regions: Vec<MemoryRegion>,
    handle: GuestMemoryHandle,
    /// Regions whose pages must never be missing.
    preallocated: Vec<Arc<GuestRegionMmap>>,
}

impl fmt::Debug for MemoryManager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryManager").field("listeners", &self.listeners).finish_non_exhaustive()
    }
}

impl MemoryManager {
    /// No memory yet; `vm` hears of every region first.
    pub fn new(vm: Arc<dyn Vm>) -> Self {
        let slots = Slots { vm, used: Vec::new() };
        Self {
            listeners: vec![Box::new(slots)],
            regions: Vec::new(),
            handle: GuestMemoryHandle::new(GuestMemory::new()),
            preallocated: Vec::new(),
        }
    }

    /// The handle that devices use.
    pub fn handle(&self) -> GuestMemoryHandle {
        self.handle.clone()
    }

    /// The present view.
    pub fn view(&self) -> Arc<GuestMemory> {
        GuestAddressSpace::memory(&self.handle).into_inner()
    }

    /// From now on tell `listener` too, and at once of what is there.
    ///
    /// # Errors
    /// It refused a region, and has forgotten the others.
    pub fn subscribe(&mut self, mut listener: Box<dyn MemoryListener>) -> Result<(), MemoryError> {
        self.listeners.retain(|listener| !listener.has_ended());
        for (index, region) in self.regions.iter().enumerate() {
            if let Err(error) = listener.add(region) {
                let refusal = refusal(&*listener, region, &*error);
                self.regions[..index].iter().rev().for_each(|known| listener.remove(known));
                return Err(refusal);
            }
        }
        self.listeners.push(listener);
        Ok(())
    }

    /// Put RAM at each of `ranges`, all from one backing.
    ///
    /// # Errors
    /// The host has not got it, or a listener refused; nothing has changed then.
    pub fn add_ram(&mut self, ranges: &[Range], ram: &RamBacking) -> Result<(), MemoryError> {
        let mut backing = ram.open(ranges)?;
        let regions: Vec<_> = ranges
            .iter()
            .map(|range| backing.map(*range).map(Arc::new))
            .collect::<Result<_, _>>()?;
        if !ram.prealloc {
            return self.add(&regions, false);
        }
        regions.iter().try_for_each(|region| backing::populate(region))?;
        self.add(&regions, false)?;
        self.preallocated.extend(regions);
        Ok(())
    }

    /// Show `image` at `range`, for the guest to read only.
    ///
    /// # Errors
    /// The image cannot be mapped, or a listener refused; nothing has changed then.
    pub fn add_image(&mut self, range: Range, image: &Backing) -> Result<(), MemoryError> {
        self.add(&[Arc::new(image.map_image(range)?)], true)
    }

    fn add(&mut self, new: &[Arc<GuestRegionMmap>], read_only: bool) -> Result<(), MemoryError> {
        let described: Vec<_> = new.iter().map(|region| describe(region, read_only)).collect();
        let mut next = (*self.view()).clone();
        for (region, described) in new.iter().zip(&described) {
            next = next.insert_region(Arc::clone(region)).map_err(|e| overlap(described, &e))?;
        }
        for (told, region) in described.iter().enumerate() {
            if let Err(error) = self.tell(region) {
                described[..told].iter().rev().for_each(|region| self.take_back(region));
                return Err(error);
            }
        }
        self.regions.extend(described);
        // Only a panic of another holder could poison the lock, and none of them leaves half a view.
        self.handle.lock().unwrap_or_else(PoisonError::into_inner).replace(next);
        Ok(())
    }

    /// Tell all listeners of `region`, or none.
    fn tell(&mut self, region: &MemoryRegion) -> Result<(), MemoryError> {
        for index in 0..self.listeners.len() {
            if let Err(error) = self.listeners[index].add(region) {
                let refusal = refusal(&*self.listeners[index], region, &*error);
                self.listeners[..index].iter_mut().rev().for_each(|told| told.remove(region));
                return Err(refusal);
            }
        }
        Ok(())
    }

    fn take_back(&mut self, region: &MemoryRegion) {
        self.listeners.iter_mut().rev().for_each(|listener| listener.remove(region));
    }

    /// Throw all contents away: RAM is zero again, private mappings of files are as on disk.
    ///
    /// # Errors
    /// The host refused.
    pub fn discard(&self) -> Result<(), MemoryError> {
        self.view().iter().try_for_each(backing::discard)?;
        self.preallocated.iter().try_for_each(|region| backing::populate(region))
    }
}

fn describe(region: &GuestRegionMmap, read_only: bool) -> MemoryRegion {
    let file = region.file_offset().filter(|_| region.flags() & libc::MAP_SHARED != 0);
    MemoryRegion {
        guest: region.start_addr(),
        size: region.len(),
        host: region.as_ptr() as u64,
        read_only,
        shared: file.map(|file| SharedFile { fd: file.file().as_raw_fd(), offset: file.start() }),
    }
}

fn overlap(region: &MemoryRegion, problem: &impl fmt::Display) -> MemoryError {
    MemoryError::Refused {
        listener: "the memory map",
        base: region.guest.0,
        size: region.size,
        problem: problem.to_string(),
    }
}

fn refusal(
    listener: &dyn MemoryListener,
    region: &MemoryRegion,
    error: &(dyn std::error::Error + Send + Sync),
) -> MemoryError {
    MemoryError::Refused {
        listener: listener.name(),
        base: region.guest.0,
        size: region.size,
        problem: error.to_string(),
    }
}

/// The hypervisor's memory slots.
struct Slots {
    vm: Arc<dyn Vm>,
    /// Guest address of the region in each slot; `None` is free.
    used: Vec<Option<GuestAddress>>,
}

impl MemoryListener for Slots {
    fn name(&self) -> &'static str {
        "the hypervisor"
    }

    fn add(
        &mut self,
        region: &MemoryRegion,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let slot = self.used.iter().position(Option::is_none).unwrap_or_else(|| {
            self.used.push(None);
            self.used.len() - 1
        });
        // SAFETY: the region is part of the memory map that the manager publishes, and that is dropped only
        // after this listener, which takes its slots back when it is dropped. Guest memory is accessed
        // through volatile pointers only.
        unsafe {
            self.vm.add_memory_slot(MemorySlot {
                slot: u32::try_from(slot)?,
                guest: region.guest.0,
                size: region.size,
                host: region.host,
                read_only: region.read_only,
            })?;
        }
        self.used[slot] = Some(region.guest);
        Ok(())
    }

    fn remove(&mut self, region: &MemoryRegion) {
        let Some(slot) = self.used.iter().position(|used| *used == Some(region.guest)) else {
            return;
        };
        match self.vm.remove_memory_slot(slot as u32) {
            Ok(()) => self.used[slot] = None,
            Err(error) => log::error!("{error}"),
        }
    }
}

impl Drop for Slots {
    /// Before the memory is unmapped the VM must not refer to it.
    fn drop(&mut self) {
        for (slot, used) in self.used.iter_mut().enumerate() {
            if used.take().is_some()
                && let Err(error) = self.vm.remove_memory_slot(slot as u32)
            {
                log::error!("{error}");
            }
        }
    }
}

#[cfg(test)]
mod tests;
