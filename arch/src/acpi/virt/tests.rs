// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

use super::*;
use crate::acpi::testing::{checksum, disassemble, golden_tables};
use crate::acpi::{PciHotplug, PciInterrupt, Registers};
use crate::layout::virt::{self, Request, VirtMap, interrupt};
use crate::layout::{GIB, MIB};

const BASE: u64 = 0x4148_0000;

fn machine(cpus: u32, gic: Gic) -> Description {
    let map = map(cpus);
    let spi = |number: u32| interrupt::SHARED + number;
    Description {
        cpus,
        nvdimms: vec![Nvdimm { range: map.nvdimms[0], read_only: true }],
        gic,
        timers: interrupt::TIMERS.map(|number| interrupt::PRIVATE + number),
        uart: Some(Device { at: virt::UART, interrupt: spi(interrupt::UART) }),
        ged: Device { at: virt::GED, interrupt: spi(interrupt::GED) },
        pci: PciHost {
            ecam: Range::new(map.ecam.base, 3 * MIB),
            memory: vec![virt::PCI_WINDOW_32, map.pci_window_64],
            io: Range::new(0, virt::PCI_WINDOW_IO.size),
            io_in_memory: Some(virt::PCI_WINDOW_IO.base),
            keep_addresses: true,
            config_ports: None,
            interrupts: (1..4)
                .map(|slot| PciInterrupt { slot, pin: 0, gsi: spi(3 + u32::from(slot) % 4) })
                .collect(),
            hotplug: Some(PciHotplug {
                registers: Registers::Memory(Range::new(virt::PCI_HOTPLUG, 0x18)),
                bridges: vec![2, 3],
                slots: 1..=30,
            }),
        },
    }
}

fn map(max_cpus: u32) -> VirtMap {
    VirtMap::new(&Request {
        ram: GIB,
        max_ram: GIB,
        nvdimms: vec![128 * MIB],
        max_cpus,
        address_bits: 48,
        ..Request::default()
    })
    .unwrap()
}

fn gic_v3(cpus: u32) -> Gic {
    Gic::V3 {
        distributor: virt::GIC_DISTRIBUTOR.base,
        redistributors: map(cpus).redistributors,
        its: Some(virt::GIC_ITS.base),
        maintenance: interrupt::PRIVATE + interrupt::GIC_MAINTENANCE,
    }
}

const GIC_V2: Gic = Gic::V2 {
    distributor: virt::GIC_DISTRIBUTOR.base,
    cpu_interface: virt::GIC_CPU_INTERFACE.base,
    frame: virt::GIC_V2M.base,
};

fn signatures(tables: &AcpiTables) -> Vec<String> {
    let tables = tables.tables.iter().map(|range| &tables.bytes[range.clone()]);
    tables
        .inspect(|table| assert_eq!(checksum(table), 0))
        .map(|table| String::from_utf8_lossy(&table[..4]).into_owned())
        .collect()
}

#[test]
fn tables_are_the_golden_ones() {
    golden_tables("virt/gicv3", &build(&machine(2, gic_v3(2)), BASE));
    golden_tables("virt/gicv2", &build(&machine(2, GIC_V2), BASE));
}

#[test]
fn iasl_disassembles_every_table_without_a_warning() {
    disassemble(&build(&machine(2, gic_v3(2)), BASE));
    disassemble(&build(&machine(200, gic_v3(200)), BASE));
    disassemble(&build(&machine(2, GIC_V2), BASE));
}

#[test]
fn there_is_a_table_for_what_there_is() {
    let all = ["DSDT", "FACP", "APIC", "GTDT", "MCFG", "IORT", "SPCR", "NFIT", "XSDT"];
    assert_eq!(signatures(&build(&machine(1, gic_v3(1)), BASE)), all);
    let mut small = machine(1, GIC_V2);
    small.uart = None;
    small.nvdimms.clear();
    small.pci.hotplug = None;
    let tables = build(&small, BASE);
    assert_eq!(signatures(&tables), ["DSDT", "FACP", "APIC", "GTDT", "MCFG", "XSDT"]);
    let text = String::from_utf8_lossy(&tables.bytes);
    assert!(!text.contains("PCST") && !text.contains("ARMH0011") && !text.contains("ACPI0012"));
}

#[test]
fn the_largest_machine_fits_its_room() {
    let mut machine = machine(512, gic_v3(512));
    machine.pci.hotplug.as_mut().unwrap().bridges = (2..7).collect();
    let size = build(&machine, BASE).bytes.len();
    assert!(size < 512 << 10, "{size} bytes");
}
