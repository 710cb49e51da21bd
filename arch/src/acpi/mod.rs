// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! ACPI tables, from a description of the machine. ACPI Specification 6.5.
//!
//! Hardware is fixed, as on a real q35: PM1 and GPE0 blocks, SCI, power button. What the board can put
//! somewhere else is an argument; nothing here knows an address of its own.

mod dsdt;
mod fixed;
mod madt;
mod nfit;
mod pcihp;
mod srat;

use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink, facs::FACS, mcfg::MCFG, rsdp::Rsdp, xsdt::XSDT};

use crate::layout::Range;

/// A machine as ACPI sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    /// Processors that are there.
    pub cpus: u32,
    /// Processors that there can be.
    pub max_cpus: u32,
    /// RAM at boot.
    pub ram: Vec<Range>,
    /// Where memory can be added; empty if it cannot.
    pub module_window: Range,
    /// Persistent memory.
    pub nvdimms: Vec<Nvdimm>,
    /// Local APICs.
    pub local_apic: u64,
    /// I/O APIC.
    pub io_apic: u64,
    /// The PCI host bridge.
    pub pci: PciHost,
    /// Power management.
    pub pm: PowerManagement,
    /// Devices on I/O ports.
    pub legacy: Vec<LegacyDevice>,
}

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
    /// Configuration address and data ports.
    pub config_ports: Range,
    /// Interrupt pins that are wired.
    pub interrupts: Vec<PciInterrupt>,
    /// How devices are added to a running machine; `None` if they cannot be.
    pub hotplug: Option<PciHotplug>,
}

/// How PCI devices are added to a running machine and removed from it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PciHotplug {
    /// The register block.
    pub ports: Range,
    /// The general-purpose event that is raised.
    pub event: u8,
    /// Device number on the root bus of each bridge, in the order in which the block selects them.
    pub bridges: Vec<u8>,
    /// Slots of each bridge that devices can have.
    pub slots: std::ops::RangeInclusive<u8>,
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

/// ICH9 power management.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PowerManagement {
    /// First port of the block: PM1 event, PM1 control at 4, timer at 8, GPE0 at 0x20.
    pub base: u16,
    /// System control interrupt.
    pub sci: u8,
    /// Reset control register.
    pub reset_port: u16,
    /// What to write there.
    pub reset_value: u8,
}

/// A device on I/O ports, as a table row of the board.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LegacyDevice {
    /// Four characters.
    pub name: &'static str,
    /// Hardware id: an EISA id (`PNP0501`) or an ACPI id (`QEMU0001`).
    pub hid: &'static str,
    /// First port and how many.
    pub ports: Range,
    /// Interrupt, edge-triggered.
    pub irq: Option<u32>,
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
const OEM_TABLE_ID: [u8; 8] = *b"ECRQ35  ";
const OEM_REVISION: u32 = 1;
/// FACS needs the largest alignment of all.
const ALIGNMENT: usize = 64;
const ROOT_POINTER_SIZE: usize = 64;

/// Build all tables to lie at `base`.
pub fn build(machine: &Description, base: u64) -> AcpiTables {
    let mut tables = AcpiTables { base, bytes: vec![0; ROOT_POINTER_SIZE], tables: Vec::new() };
    let facs = tables.add(&FACS::new());
    let dsdt = tables.add(&dsdt::dsdt(machine));
    let mut entries = vec![
        tables.add(&fixed::fadt(&machine.pm, facs, dsdt)),
        tables.add(&madt::madt(machine)),
        tables.add(&mcfg(&machine.pci)),
        tables.add(&srat::srat(machine)),
    ];
    if !machine.nvdimms.is_empty() {
        entries.push(tables.add(&nfit::nfit(&machine.nvdimms)));
    }
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for entry in entries {
        xsdt.add_entry(entry);
    }
    let xsdt = tables.add(&xsdt);
    let root = to_bytes(&Rsdp::new(OEM_ID, xsdt));
    tables.bytes[..root.len()].copy_from_slice(&root);
    tables
}

impl AcpiTables {
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

#[cfg(test)]
mod tests;
