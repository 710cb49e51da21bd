// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The tables of a `virt`: hardware-reduced ACPI (ACPI 6.5, section 4.1). What a processor does alone, such as power-off, is
//! PSCI's business.

mod dsdt;
mod fixed;
mod iort;
mod madt;
mod spcr;

use super::{AcpiTables, Nvdimm, PciHost, mcfg, nfit};
use crate::layout::Range;

/// A `virt` as ACPI sees it. All interrupts are INTIDs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    /// Processors.
    pub cpus: u32,
    /// Persistent memory.
    pub nvdimms: Vec<Nvdimm>,
    /// Interrupt controller.
    pub gic: Gic,
    /// Interrupts of the timers: secure, non-secure, virtual, hypervisor's.
    pub timers: [u32; 4],
    /// Serial port, a PL011.
    pub uart: Option<Device>,
    /// The event selector.
    pub ged: Device,
    /// The PCI host bridge.
    pub pci: PciHost,
}

/// A device in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Device {
    /// Where.
    pub at: Range,
    /// Its interrupt.
    pub interrupt: u32,
}

/// An interrupt controller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Gic {
    /// GICv2 with a GICv2m, which says itself which interrupts it hands out.
    V2 {
        /// The distributor.
        distributor: u64,
        /// The CPU interface.
        cpu_interface: u64,
        /// The frame to which messages are sent.
        frame: u64,
    },
    /// GICv3.
    V3 {
        /// The distributor.
        distributor: u64,
        /// Redistributors of the processors.
        redistributors: Vec<Range>,
        /// Interrupt translation service.
        its: Option<u64>,
        /// Interrupt of the maintenance of virtualization.
        maintenance: u32,
    },
}

/// Events of the selector (QEMU's `docs/specs/acpi_hw_reduced_hotplug.rst`).
pub mod event {
    /// The power button was pressed.
    pub const POWER_BUTTON: u32 = 1 << 1;
    /// PCI devices have come, or are to go.
    pub const PCI: u32 = 1 << 4;
}

/// Build all tables to lie at `base`.
pub fn build(machine: &Description, base: u64) -> AcpiTables {
    let mut tables = AcpiTables::new(base);
    let dsdt = tables.add(&dsdt::dsdt(machine));
    let mut entries = vec![
        tables.add(&fixed::fadt(dsdt)),
        tables.add(&madt::madt(machine)),
        tables.add(&fixed::gtdt(machine.timers)),
        tables.add(&mcfg(&machine.pci)),
    ];
    if let Gic::V3 { its: Some(_), .. } = machine.gic {
        entries.push(tables.add(&iort::iort()));
    }
    if let Some(uart) = &machine.uart {
        entries.push(tables.add(&spcr::spcr(uart)));
    }
    if !machine.nvdimms.is_empty() {
        entries.push(tables.add(&nfit::nfit(&machine.nvdimms)));
    }
    tables.finish(&entries)
}

#[cfg(test)]
mod tests;
