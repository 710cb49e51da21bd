// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The other process's map of guest memory.

use std::error::Error;
use std::sync::{Arc, Weak};

use vhost::vhost_user::Frontend;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};

use super::VhostUserError;
use super::connection::Connection;
use crate::memory::{MemoryListener, MemoryRegion};

/// Keeps the map of one device up to date; ends to have an effect with the device, or its daemon.
///
/// Memory that is not shared is left out: images that are mapped privately, whose changes another process
/// cannot see. Nothing of a driver's lies there.
#[derive(Debug)]
pub(super) struct UserMemory {
    connection: Weak<Connection>,
    /// Whether the daemon says when it is done with a message.
    acknowledges: bool,
    regions: Vec<MemoryRegion>,
}

impl UserMemory {
    pub(super) fn new(connection: &Arc<Connection>, acknowledges: bool) -> Self {
        Self { connection: Arc::downgrade(connection), acknowledges, regions: Vec::new() }
    }

    fn connection(&self) -> Option<Arc<Connection>> {
        self.connection.upgrade().filter(|connection| !connection.is_lost())
    }

    /// Give the daemon the whole table, and wait until it has it.
    fn tell(&self, regions: &[MemoryRegion]) -> Result<(), VhostUserError> {
        let Some(connection) = self.connection().filter(|_| !regions.is_empty()) else {
            return Ok(());
        };
        let table: Vec<_> = regions.iter().filter_map(describe).collect();
        let attempted = format!("give it a table of {} memory regions", table.len());
        connection.exchange(&attempted, |frontend: &mut Frontend| {
            frontend.set_mem_table(&table)?;
            if !self.acknowledges {
                // Messages are worked off in order: what is answered now comes after the table.
                frontend.get_features()?;
            }
            Ok(())
        })
    }
}

fn describe(region: &MemoryRegion) -> Option<VhostUserMemoryRegionInfo> {
    region.shared.map(|file| VhostUserMemoryRegionInfo {
        guest_phys_addr: region.guest.0,
        memory_size: region.size,
        userspace_addr: region.host,
        mmap_offset: file.offset,
        mmap_handle: file.fd,
    })
}

impl MemoryListener for UserMemory {
    fn name(&self) -> &'static str {
        "a vhost-user daemon"
    }

    fn add(&mut self, region: &MemoryRegion) -> Result<(), Box<dyn Error + Send + Sync>> {
        if region.shared.is_none() {
            return Ok(());
        }
        let mut regions = self.regions.clone();
        regions.push(*region);
        if let Err(error) = self.tell(&regions) {
            // What it has kept of the table that it refused is not known.
            if let Err(error) = self.tell(&self.regions) {
                log::error!("{error}");
            }
            return Err(error.into());
        }
        self.regions = regions;
        Ok(())
    }

    fn remove(&mut self, region: &MemoryRegion) {
        let count = self.regions.len();
        self.regions.retain(|known| known.guest != region.guest);
        if self.regions.len() != count
            && let Err(error) = self.tell(&self.regions)
        {
            log::error!("remove memory at {:#x}: {error}", region.guest.0);
        }
    }

    fn has_ended(&self) -> bool {
        self.connection.strong_count() == 0
    }
}
