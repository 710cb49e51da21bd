// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! PCI functions, their configuration space, MSI-X, and the bridges they sit behind.
//!
//! PCI Local Bus Specification 3.0 and PCI Express Base Specification 2.0.

pub mod assign;
pub mod bridge;
pub mod cap;
pub mod config;
pub mod describe;
pub mod host;
pub mod intx;
pub mod msix;
pub mod place;
pub mod port_window;
#[cfg(test)]
pub(crate) mod testing;

use crate::bus::Access;

/// What one PCI function looks like from its bus. Bus and device numbers belong to the topology, base
/// addresses to the guest: a function knows neither.
pub trait PciFunction: Send {
    /// Read configuration space. `data` is 1, 2 or 4 bytes, naturally aligned.
    fn config_read(&mut self, offset: u16, data: &mut [u8]);

    /// Write configuration space. `data` is 1, 2 or 4 bytes, naturally aligned.
    fn config_write(&mut self, offset: u16, data: &[u8]);

    /// Where the guest has put the base address registers that decode at present.
    fn bars(&self) -> Vec<Bar>;

    /// The BAR decodes at a new address, or no longer (`None`). Called after the bus has been changed.
    fn bar_moved(&mut self, _index: u8, _address: Option<u64>) {}

    /// Read inside a BAR.
    fn bar_read(&mut self, index: u8, offset: u64, data: &mut [u8]) -> Access;

    /// Write inside a BAR.
    fn bar_write(&mut self, index: u8, offset: u64, data: &[u8]) -> Access;

    /// What the function forwards to the bus behind it. Only bridges have one.
    fn forwarding(&self) -> Option<bridge::Forwarding> {
        None
    }

    /// Back to the state after power-on.
    fn reset(&mut self);
}

/// A base address register that decodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bar {
    /// 0..=5; a 64-bit BAR counts as its lower half.
    pub index: u8,
    /// Which address space.
    pub space: BarSpace,
    /// First address.
    pub address: u64,
    /// Size in bytes, a power of two.
    pub size: u64,
}

/// The address space that a BAR decodes in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BarSpace {
    /// Memory space.
    Memory,
    /// I/O ports.
    Io,
}
