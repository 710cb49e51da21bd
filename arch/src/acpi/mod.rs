// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! ACPI tables, from a description of the machine. ACPI Specification 6.5.
//!
//! What the board can put somewhere else is an argument; nothing here knows an address of its own.

mod aml;
mod nfit;
mod pci;
mod pcihp;
pub mod q35;
#[cfg(test)]
mod testing;
pub mod virt;

use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink, mcfg::MCFG, rsdp::Rsdp, xsdt::XSDT};

use crate::layout::Range;

/// A range of persistent memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Nvdimm {
    /// Where.
    pub range: Range,
    /// The guest may only read it.
    pub read_only: bool,
}

/// The PCI host bridge.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PciHost {
    /// Configuration space, one MiB for each bus.
    pub ecam: Range,
    /// Memory windows, each below or above 4 GiB.
    pub memory: Vec<Range>,
    /// I/O ports for base address registers.
    pub io: Range,
    /// Where port 0 lies in memory, for processors that have no others.
    pub io_in_memory: Option<u64>,
    /// Configuration address and data ports, if there are any.
    pub config_ports: Option<Range>,
    /// The operating system must not give other addresses to what is there: bridges have room for what may come.
    pub keep_addresses: bool,
    /// Interrupt pins that are wired.
    pub interrupts: Vec<PciInterrupt>,
    /// How devices are added to a running machine; `None` if they cannot be.
    pub hotplug: Option<PciHotplug>,
}

/// How PCI devices are added to a running machine and removed from it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PciHotplug {
    /// The register block.
    pub registers: Registers,
    /// Device number on the root bus of each bridge, in the order in which the block selects them.
    pub bridges: Vec<u8>,
    /// Slots of each bridge that devices can have.
    pub slots: std::ops::RangeInclusive<u8>,
}

/// Where registers are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Registers {
    /// On I/O ports.
    Ports(Range),
    /// In memory.
    Memory(Range),
}

/// An interrupt pin of a device on the root bus.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PciInterrupt {
    /// Device number.
    pub slot: u8,
    /// 0 for INTA.
    pub pin: u8,
    /// Input of the interrupt controller.
    pub gsi: u32,
}

/// Tables as they lie in guest memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AcpiTables {
    /// Address of the first byte, which is that of the root pointer.
    pub base: u64,
    /// Root pointer and tables.
    pub bytes: Vec<u8>,
    /// Where each table stands in `bytes`.
    pub tables: Vec<std::ops::Range<usize>>,
}

const OEM_ID: [u8; 6] = *b"ECR   ";
const OEM_TABLE_ID: [u8; 8] = *b"ECRVM   ";
const OEM_REVISION: u32 = 1;
/// FACS needs the largest alignment of all.
const ALIGNMENT: usize = 64;
const ROOT_POINTER_SIZE: usize = 64;

impl AcpiTables {
    /// With room for the root pointer.
    fn new(base: u64) -> Self {
        Self { base, bytes: vec![0; ROOT_POINTER_SIZE], tables: Vec::new() }
    }

    /// Let the root pointer lead to the tables at these addresses.
    fn finish(mut self, entries: &[u64]) -> Self {
        let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
        entries.iter().for_each(|&entry| xsdt.add_entry(entry));
        let xsdt = self.add(&xsdt);
        let root = to_bytes(&Rsdp::new(OEM_ID, xsdt));
        self.bytes[..root.len()].copy_from_slice(&root);
        self
    }

    /// Append a table; returns its address.
    fn add(&mut self, table: &dyn Aml) -> u64 {
        let start = self.bytes.len().next_multiple_of(ALIGNMENT);
        self.bytes.resize(start, 0);
        self.bytes.extend(to_bytes(table));
        self.tables.push(start..self.bytes.len());
        self.base + start as u64
    }
}

fn mcfg(pci: &PciHost) -> MCFG {
    let mut table = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    let last_bus = u8::try_from((pci.ecam.size >> 20).saturating_sub(1)).unwrap_or(u8::MAX);
    table.add_ecam(pci.ecam.base, 0, 0, last_bus);
    table
}

fn to_bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// A table of `body` behind the common header.
fn table(signature: &[u8; 4], revision: u8, body: &[u8]) -> Sdt {
    let mut table = Sdt::new(*signature, 36, revision, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.append_slice(body);
    table
}

/// Little-endian fields behind one another.
trait Fields: AmlSink {
    fn fields8(&mut self, values: &[u8]) {
        values.iter().for_each(|&value| self.byte(value));
    }
    fn fields16(&mut self, values: &[u16]) {
        values.iter().for_each(|&value| self.word(value));
    }
    fn fields32(&mut self, values: &[u32]) {
        values.iter().for_each(|&value| self.dword(value));
    }
    fn fields64(&mut self, values: &[u64]) {
        values.iter().for_each(|&value| self.qword(value));
    }
}

impl Fields for Vec<u8> {}
