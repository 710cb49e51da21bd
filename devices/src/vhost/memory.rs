// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The kernel's copy of the memory map.

use std::error::Error;
use std::fs::File;
use std::sync::{Arc, Weak};

use vhost::{VhostBackend, VhostUserMemoryRegionInfo};

use super::kernel::{Kernel, io_error};
use crate::memory::{MemoryListener, MemoryRegion};

/// Keeps one vhost device's table of guest memory up to date; ends to have an effect with the device.
///
/// The kernel replaces its table in one step and looks addresses up in it at each access, so this may
/// happen while the guest runs.
#[derive(Debug)]
pub struct VhostMemory {
    name: &'static str,
    device: Weak<File>,
    regions: Vec<MemoryRegion>,
}

impl VhostMemory {
    pub(super) fn new(name: &'static str, device: &Arc<File>) -> Self {
        Self { name, device: Arc::downgrade(device), regions: Vec::new() }
    }

    fn tell(&self, regions: &[MemoryRegion]) -> Result<(), std::io::Error> {
        let Some(device) = self.device.upgrade() else { return Ok(()) };
        let table: Vec<_> = regions
            .iter()
            .map(|region| VhostUserMemoryRegionInfo {
                guest_phys_addr: region.guest.0,
                memory_size: region.size,
                userspace_addr: region.host,
                // Only another process would have to map it.
                mmap_offset: 0,
                mmap_handle: -1,
            })
            .collect();
        let told = Kernel::without_rings(device).set_mem_table(&table);
        told.map(drop).map_err(io_error)
    }
}

impl MemoryListener for VhostMemory {
    fn name(&self) -> &'static str {
        self.name
    }

    fn add(&mut self, region: &MemoryRegion) -> Result<(), Box<dyn Error + Send + Sync>> {
        let mut regions = self.regions.clone();
        regions.push(*region);
        self.tell(&regions).map_err(|error| {
            let count = regions.len();
            format!(
                "give the kernel a table of {count} memory regions: {error} \
                 (/sys/module/vhost/parameters/max_mem_regions says how many it takes)"
            )
        })?;
        self.regions = regions;
        Ok(())
    }

    fn remove(&mut self, region: &MemoryRegion) {
        self.regions.retain(|known| known.guest != region.guest);
        // An empty table cannot be set; the device is on its way out then.
        if !self.regions.is_empty()
            && let Err(error) = self.tell(&self.regions)
        {
            log::error!("{}: remove memory at {:#x}: {error}", self.name, region.guest.0);
        }
    }

    fn has_ended(&self) -> bool {
        self.device.strong_count() == 0
    }
}
