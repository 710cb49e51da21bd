// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

use super::*;
use crate::acpi::testing::{checksum, disassemble, golden_tables};
use crate::acpi::{PciHotplug, PciInterrupt, Registers};
use crate::layout::q35::{self, Q35Map, Request};
use crate::layout::{GIB, MIB};

fn machine(max_cpus: u32, nvdimms: Vec<u64>) -> Description {
    let map = Q35Map::new(&Request {
        ram: 4 * GIB,
        max_ram: 8 * GIB,
        slots: 2,
        nvdimms,
        address_bits: 40,
    })
    .unwrap();
    Description {
        cpus: 2.min(max_cpus),
        max_cpus,
        ram: map.ram().collect(),
        module_window: map.module_window,
        nvdimms: map.nvdimms.iter().map(|&range| Nvdimm { range, read_only: true }).collect(),
        local_apic: q35::LOCAL_APIC,
        io_apic: q35::IO_APIC,
        pci: PciHost {
            ecam: q35::ECAM,
            memory: vec![q35::PCI_WINDOW_32, map.pci_window_64],
            io: q35::PCI_WINDOW_IO,
            io_in_memory: None,
            keep_addresses: false,
            config_ports: Some(Range::new(0xCF8, 8)),
            interrupts: (1..4)
                .map(|slot| PciInterrupt { slot, pin: 0, gsi: 16 + u32::from(slot) })
                .collect(),
            hotplug: Some(PciHotplug {
                registers: Registers::Ports(Range::new(0xCC0, 0x18)),
                bridges: vec![2, 3],
                slots: 1..=30,
            }),
        },
        hotplug_event: 1,
        pm: PowerManagement { base: 0x600, sci: 9, reset_port: 0xCF9, reset_value: 6 },
        legacy: vec![
            LegacyDevice {
                name: "COM1",
                hid: "PNP0501",
                ports: Range::new(0x3F8, 8),
                irq: Some(4),
            },
            LegacyDevice { name: "RTC_", hid: "PNP0B00", ports: Range::new(0x70, 2), irq: Some(8) },
            LegacyDevice { name: "PEVT", hid: "QEMU0001", ports: Range::new(0x505, 1), irq: None },
        ],
    }
}

#[test]
fn the_root_pointer_leads_to_every_table() {
    let tables = build(&machine(4, vec![128 * MIB]), 0xE_0000);
    assert_eq!(&tables.bytes[..8], b"RSD PTR ");
    assert_eq!((checksum(&tables.bytes[..20]), checksum(&tables.bytes[..36])), (0, 0));
    let at = |address: u64| &tables.bytes[usize::try_from(address - tables.base).unwrap()..];
    let qword = |bytes: &[u8], at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    let length = |table: &[u8]| u32::from_le_bytes(table[4..8].try_into().unwrap()) as usize;
    let xsdt = at(qword(&tables.bytes, 24));
    let mut signatures = Vec::new();
    for entry in (36..length(xsdt)).step_by(8) {
        let table = at(qword(xsdt, entry));
        assert_eq!(checksum(&table[..length(table)]), 0);
        signatures.push(&table[..4]);
        if &table[..4] == b"FACP" {
            assert_eq!(&at(qword(table, 132))[..4], b"FACS");
            assert_eq!(&at(qword(table, 140))[..4], b"DSDT");
        }
    }
    assert_eq!(signatures, [b"FACP", b"APIC", b"MCFG", b"SRAT", b"NFIT"]);
}

#[test]
fn the_largest_machine_fits_its_place() {
    let mut machine = machine(1024, vec![128 * MIB; 8]);
    machine.pci.hotplug.as_mut().unwrap().bridges = (2..7).collect();
    let tables = build(&machine, q35::ACPI_TABLES.base);
    assert!((tables.bytes.len() as u64) < q35::ACPI_TABLES.size, "{} bytes", tables.bytes.len());
}

#[test]
fn processors_beyond_254_are_x2apics() {
    let tables = build(&machine(257, vec![]), 0xE_0000);
    let madt = tables
        .tables
        .iter()
        .map(|t| &tables.bytes[t.clone()])
        .find(|t| t.starts_with(b"APIC"))
        .unwrap();
    let (mut at, mut kinds) = (44, Vec::new());
    while at < madt.len() {
        kinds.push(madt[at]);
        at += usize::from(madt[at + 1]);
    }
    assert_eq!(kinds.iter().filter(|&&kind| kind == 0).count(), 255);
    assert_eq!(kinds.iter().filter(|&&kind| kind == 9).count(), 2);
}

/// Every byte of every table, as a dump that a reviewer can read.
#[test]
fn tables_are_the_golden_ones() {
    golden_tables("q35", &build(&machine(4, vec![128 * MIB]), 0xE_0000));
}

/// Without bridges the name space is as small as it can be.
#[test]
fn hot_plug_costs_nothing_where_there_is_none() {
    let mut without = machine(4, vec![]);
    without.pci.hotplug = None;
    let tables = build(&without, 0xE_0000);
    let text = String::from_utf8_lossy(&tables.bytes);
    assert!(!text.contains("_GPE") && !text.contains("PCST"));
}

/// `iasl` must neither warn nor refuse, and must compile its own text of the AML again.
#[test]
fn iasl_disassembles_every_table_without_a_warning() {
    disassemble(&build(&machine(4, vec![128 * MIB]), 0xE_0000));
}
