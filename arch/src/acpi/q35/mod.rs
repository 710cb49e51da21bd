// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The tables of a q35. Hardware is fixed, as on a real one: PM1 and GPE0 blocks, SCI, power button.

mod dsdt;
mod fixed;
mod madt;
mod srat;

use acpi_tables::facs::FACS;

use super::{AcpiTables, Nvdimm, PciHost, mcfg, nfit};
use crate::layout::Range;

/// A q35 as ACPI sees it.
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
    /// The general-purpose event that is raised when PCI devices come or are to go.
    pub hotplug_event: u8,
    /// Power management.
    pub pm: PowerManagement,
    /// Devices on I/O ports.
    pub legacy: Vec<LegacyDevice>,
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

/// Build all tables to lie at `base`.
pub fn build(machine: &Description, base: u64) -> AcpiTables {
    let mut tables = AcpiTables::new(base);
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
    tables.finish(&entries)
}

#[cfg(test)]
mod tests;
