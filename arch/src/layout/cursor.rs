// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What lies above the fixed part of a map, one behind the other.

use super::{GIB, MIB, Range};

/// What Linux adds or removes as one piece of memory.
pub(super) const SECTION: u64 = 128 * MIB;
/// Slack for each module, so that it can be aligned to a gibibyte.
const MODULE_ALIGNMENT: u64 = GIB;

/// Why there is no map.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{what} of {size:#x} bytes does not fit below {limit:#x}, the end of this host's {bits}-bit guest address \
     space: {needed} bits would be needed, so use less memory or a smaller maximum"
)]
pub struct DoesNotFit {
    /// What.
    pub what: &'static str,
    /// Its size in bytes.
    pub size: u64,
    /// End of the address space.
    pub limit: u64,
    /// Width of an address.
    pub bits: u8,
    /// Width that would do for this.
    pub needed: u8,
}

/// Bytes of the window for modules, of which there can be `slots`, in a machine that begins with `ram` bytes.
pub(super) fn module_room(ram: u64, max_ram: u64, slots: u32) -> u64 {
    match max_ram.saturating_sub(ram) {
        0 => 0,
        modules => modules.saturating_add(u64::from(slots).saturating_mul(MODULE_ALIGNMENT)),
    }
}

/// Bits of an address that reach all below `end`.
pub(super) fn bits_for(end: u64) -> u8 {
    (u64::BITS - end.saturating_sub(1).leading_zeros()) as u8
}

fn next_multiple(value: u64, of: u64) -> u64 {
    value.checked_next_multiple_of(of).unwrap_or(u64::MAX)
}

/// Hands out ascending ranges.
#[derive(Debug, Clone)]
pub(super) struct Cursor {
    next: u64,
    limit: u64,
    bits: u8,
}

impl Cursor {
    /// From `start` on, in an address space of `bits` bits.
    pub(super) fn new(start: u64, bits: u8) -> Self {
        Self { next: start, limit: 1u64.checked_shl(bits.into()).unwrap_or(u64::MAX), bits }
    }

    /// Where it stands.
    pub(super) fn end(&self) -> u64 {
        self.next
    }

    /// Nothing is handed out below `start` any more.
    pub(super) fn skip_to(&mut self, start: u64) {
        self.next = self.next.max(start);
    }

    /// What comes next begins at a multiple of `align`.
    pub(super) fn align(&mut self, align: u64) {
        self.next = next_multiple(self.next, align);
    }

    /// `size` bytes, aligned to `align`.
    pub(super) fn take(
        &mut self,
        what: &'static str,
        size: u64,
        align: u64,
    ) -> Result<Range, DoesNotFit> {
        if size == 0 {
            return Ok(Range::new(self.next, 0));
        }
        let base = next_multiple(self.next, align);
        match base.checked_add(size) {
            Some(end) if end <= self.limit => {
                self.next = end;
                Ok(Range::new(base, size))
            }
            end => {
                let needed = end.map_or(u64::BITS as u8, bits_for);
                Err(DoesNotFit { what, size, limit: self.limit, bits: self.bits, needed })
            }
        }
    }

    /// A range for each image of persistent memory, in sections of its own.
    pub(super) fn images(&mut self, sizes: &[u64]) -> Result<Vec<Range>, DoesNotFit> {
        let take = |&size: &u64| {
            let room = next_multiple(size, SECTION);
            let room = self.take("a persistent memory image", room, GIB)?;
            Ok(Range::new(room.base, size))
        };
        sizes.iter().map(take).collect()
    }

    /// The largest window of a power of two that still fits, aligned to its size: between the two sizes given.
    pub(super) fn largest(
        &mut self,
        what: &'static str,
        (largest, smallest): (u64, u64),
    ) -> Result<Range, DoesNotFit> {
        let mut size = largest;
        loop {
            match self.take(what, size, size) {
                Err(_) if size > smallest => size /= 2,
                found => return found,
            }
        }
    }
}
