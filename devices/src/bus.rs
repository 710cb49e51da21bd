// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Address routing: which device answers an access to a guest-physical address or an I/O port.
//!
//! A [`Bus`] is a sorted map of ranges that do not overlap. vCPU threads look up under a read lock,
//! clone the device's handle and drop the lock before they call the device, so a device may itself
//! change the map (a BAR that moves) while it handles an access.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};

/// Whether somebody answered an access.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Access {
    /// The device answered.
    Done,
    /// Nothing answers here: a read yields ones, a write is lost, as on a real bus.
    Unclaimed,
}

/// A device's register block as a bus sees it. Offsets count from the start of the block.
pub trait IoDevice: Send {
    /// Fill `data` with what the guest reads at `offset`.
    fn read(&mut self, offset: u64, data: &mut [u8]) -> Access;
    /// Take what the guest writes at `offset`.
    fn write(&mut self, offset: u64, data: &[u8]) -> Access;
}

/// A device shared between the bus and whoever else controls it.
pub type SharedIoDevice = Arc<Mutex<dyn IoDevice>>;

/// Why a range could not be put on, or taken off, a bus.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    /// The range is empty or passes the end of the address space.
    #[error("range {base:#x}+{size:#x} is empty or wraps around")]
    InvalidRange {
        /// First address.
        base: u64,
        /// Size in bytes.
        size: u64,
    },
    /// Another device already answers part of the range.
    #[error("range {base:#x}+{size:#x} overlaps {other_base:#x}+{other_size:#x}")]
    Overlap {
        /// First address asked for.
        base: u64,
        /// Size asked for, in bytes.
        size: u64,
        /// First address of the range in the way.
        other_base: u64,
        /// Size of the range in the way, in bytes.
        other_size: u64,
    },
    /// No range starts at this address.
    #[error("no device starts at {base:#x}")]
    NotFound {
        /// The address.
        base: u64,
    },
}

struct Entry {
    size: u64,
    device: SharedIoDevice,
}

/// An address space and the devices in it.
#[derive(Default)]
pub struct Bus {
    ranges: RwLock<BTreeMap<u64, Entry>>,
}

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ranges = self.ranges.read();
        f.debug_map().entries(ranges.iter().map(|(base, e)| (base, e.size))).finish()
    }
}

impl Bus {
    /// An empty address space.
    pub fn new() -> Self {
        Self::default()
    }

    /// Let `device` answer `size` bytes from `base` on.
    ///
    /// # Errors
    /// [`BusError::InvalidRange`] or [`BusError::Overlap`]; the bus is then unchanged.
    pub fn insert(&self, base: u64, size: u64, device: SharedIoDevice) -> Result<(), BusError> {
        let last = base
            .checked_add(size.wrapping_sub(1))
            .filter(|_| size != 0)
            .ok_or(BusError::InvalidRange { base, size })?;
        let mut ranges = self.ranges.write();
        if let Some((&other_base, other)) = ranges.range(..=last).next_back()
            && other_base + (other.size - 1) >= base
        {
            return Err(BusError::Overlap { base, size, other_base, other_size: other.size });
        }
        ranges.insert(base, Entry { size, device });
        Ok(())
    }

    /// Take off the range that starts at `base`.
    ///
    /// # Errors
    /// [`BusError::NotFound`] where no range starts there.
    pub fn remove(&self, base: u64) -> Result<(), BusError> {
        self.ranges.write().remove(&base).map(drop).ok_or(BusError::NotFound { base })
    }

    /// Take everything off. A device that knows the bus it is on is freed in no other way.
    pub fn clear(&self) {
        // Devices are freed without the lock: they may call back.
        let ranges = std::mem::take(&mut *self.ranges.write());
        drop(ranges);
    }

    /// Read `data.len()` bytes at `address`; where nothing answers `data` is all ones.
    pub fn read(&self, address: u64, data: &mut [u8]) -> Access {
        let access = match self.find(address, data.len()) {
            Some((offset, device)) => device.lock().read(offset, data),
            None => Access::Unclaimed,
        };
        if access == Access::Unclaimed {
            data.fill(0xff);
        }
        access
    }

    /// Write `data` at `address`; where nothing answers it is lost.
    pub fn write(&self, address: u64, data: &[u8]) -> Access {
        match self.find(address, data.len()) {
            Some((offset, device)) => device.lock().write(offset, data),
            None => Access::Unclaimed,
        }
    }

    /// The device that answers all of `address..address + len`, and the offset into its range.
    fn find(&self, address: u64, len: usize) -> Option<(u64, SharedIoDevice)> {
        let ranges = self.ranges.read();
        let (base, entry) = ranges.range(..=address).next_back()?;
        let offset = address - base;
        let end = offset.checked_add(len as u64)?;
        (end <= entry.size).then(|| (offset, Arc::clone(&entry.device)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Scratch([u8; 16]);

    impl IoDevice for Scratch {
        fn read(&mut self, offset: u64, data: &mut [u8]) -> Access {
            let at = usize::try_from(offset).unwrap();
            data.copy_from_slice(&self.0[at..at + data.len()]);
            Access::Done
        }
        fn write(&mut self, offset: u64, data: &[u8]) -> Access {
            let at = usize::try_from(offset).unwrap();
            self.0[at..at + data.len()].copy_from_slice(data);
            Access::Done
        }
    }

    fn scratch() -> SharedIoDevice {
        Arc::new(Mutex::new(Scratch::default()))
    }

    #[test]
    fn accesses_reach_the_device_at_their_offset() {
        let bus = Bus::new();
        bus.insert(0x1000, 16, scratch()).unwrap();
        assert_eq!(bus.write(0x1004, &[1, 2]), Access::Done);
        let mut data = [0; 4];
        assert_eq!(bus.read(0x1003, &mut data), Access::Done);
        assert_eq!(data, [0, 1, 2, 0]);
    }

    #[test]
    fn unclaimed_reads_are_all_ones() {
        let bus = Bus::new();
        bus.insert(0x1000, 16, scratch()).unwrap();
        for address in [0xfff, 0x100e, 0x1010, u64::MAX] {
            let mut data = [0; 4];
            assert_eq!(bus.read(address, &mut data), Access::Unclaimed, "{address:#x}");
            assert_eq!(data, [0xff; 4]);
        }
    }

    #[test]
    fn ranges_never_overlap() {
        let bus = Bus::new();
        bus.insert(0x1000, 16, scratch()).unwrap();
        for (base, size) in [(0x1000, 1), (0xff8, 16), (0x100f, 1), (0xf00, 0x1000)] {
            let refused = bus.insert(base, size, scratch());
            assert!(matches!(refused, Err(BusError::Overlap { .. })), "{base:#x}");
        }
        bus.insert(0xff0, 16, scratch()).unwrap();
        bus.insert(0x1010, 16, scratch()).unwrap();
        bus.insert(u64::MAX, 1, scratch()).unwrap();
    }

    #[test]
    fn empty_and_wrapping_ranges_are_refused() {
        let bus = Bus::new();
        for (base, size) in [(0, 0), (u64::MAX, 2)] {
            assert_eq!(
                bus.insert(base, size, scratch()),
                Err(BusError::InvalidRange { base, size })
            );
        }
    }

    #[test]
    fn a_cleared_bus_frees_a_device_that_knows_it() {
        struct Knows(Arc<Bus>);
        impl IoDevice for Knows {
            fn read(&mut self, _offset: u64, _data: &mut [u8]) -> Access {
                Access::Unclaimed
            }
            fn write(&mut self, _offset: u64, _data: &[u8]) -> Access {
                Access::Unclaimed
            }
        }
        impl Drop for Knows {
            fn drop(&mut self) {
                assert_eq!(self.0.read(0, &mut [0]), Access::Unclaimed);
            }
        }
        let bus = Arc::new(Bus::new());
        bus.insert(0, 1, Arc::new(Mutex::new(Knows(Arc::clone(&bus))))).unwrap();
        bus.clear();
        assert_eq!(Arc::strong_count(&bus), 1);
    }

    #[test]
    fn a_removed_device_no_longer_answers() {
        let bus = Bus::new();
        bus.insert(0x1000, 16, scratch()).unwrap();
        bus.remove(0x1000).unwrap();
        assert_eq!(bus.write(0x1000, &[1]), Access::Unclaimed);
        assert_eq!(bus.remove(0x1000), Err(BusError::NotFound { base: 0x1000 }));
    }
}
