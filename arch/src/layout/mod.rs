// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Guest-physical address maps: pure functions of what a machine is given.

mod cursor;
pub mod q35;
pub mod virt;

pub use cursor::DoesNotFit;

/// One mebibyte.
pub const MIB: u64 = 1 << 20;
/// One gibibyte.
pub const GIB: u64 = 1 << 30;

/// A range of addresses that does not wrap around.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// First address.
    pub base: u64,
    /// Size in bytes.
    pub size: u64,
}

impl Range {
    /// `size` bytes from `base` on.
    pub const fn new(base: u64, size: u64) -> Self {
        Self { base, size }
    }

    /// The address after the last one.
    pub const fn end(&self) -> u64 {
        self.base + self.size
    }

    /// Whether the two share an address.
    pub const fn overlaps(&self, other: &Self) -> bool {
        self.base < other.end() && other.base < self.end()
    }
}
