// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What an arm64 kernel must find to use ACPI without firmware: the tables of UEFI 2.10, as if firmware had left them
//! and its boot services had ended. There are no runtime services.
//!
//! Linux reads (`drivers/firmware/efi/efi-init.c`, `efi.c`): the system table (section 4.3), configuration tables (4.6)
//! and the memory map (7.2). The map shows where RAM is, in place of the device tree, and keeps all tables from being
//! used as free memory.

use crate::fdt::EfiTables;
use crate::layout::Range;

/// Bytes that the tables take.
pub const SIZE: u64 = 4096;
/// Largest page of any kernel: ranges of the memory map do not share one.
pub const GRANULE: u64 = 64 << 10;

/// Section 4.3.1: "IBI SYST", revision 2.70.
const SYSTEM_TABLE_SIGNATURE: u64 = 0x5453_5953_2049_4249;
const REVISION: u32 = 2 << 16 | 70;
const SYSTEM_TABLE_SIZE: u32 = 120;
const CRC_OFFSET: usize = 16;

/// Section 4.6.1.2: 8868e871-e4f1-11d3-bc22-0080c73c8881.
const ACPI_20: Guid =
    guid(0x8868_e871, 0xe4f1, 0x11d3, [0xbc, 0x22, 0, 0x80, 0xc7, 0x3c, 0x88, 0x81]);
/// Section 4.6.2, which runtime services there are: eb66918a-7eef-402a-842e-931d21c38ae9.
const RT_PROPERTIES: Guid =
    guid(0xeb66_918a, 0x7eef, 0x402a, [0x84, 0x2e, 0x93, 0x1d, 0x21, 0xc3, 0x8a, 0xe9]);
/// Linux's list of memory that outlives a kexec, `include/linux/efi.h`, which its driver of the GICv3 insists on:
/// 888eb0c6-8ede-4ff5-a8f0-9aee5cb977c2.
const LINUX_MEMRESERVE: Guid =
    guid(0x888e_b0c6, 0x8ede, 0x4ff5, [0xa8, 0xf0, 0x9a, 0xee, 0x5c, 0xb9, 0x77, 0xc2]);

/// Section 7.2.3: memory types, and the attribute of memory that can be cached.
const ACPI_RECLAIM_MEMORY: u32 = 9;
const CONVENTIONAL_MEMORY: u32 = 7;
const WRITE_BACK: u64 = 8;
const PAGE: u64 = 4096;
const DESCRIPTOR_SIZE: u32 = 48;
const DESCRIPTOR_VERSION: u32 = 1;

/// Where each table stands in the page, in bytes.
mod place {
    pub(super) const SYSTEM_TABLE: u64 = 0;
    pub(super) const CONFIGURATION: u64 = 0x100;
    pub(super) const VENDOR: u64 = 0x200;
    pub(super) const RT_PROPERTIES: u64 = 0x240;
    pub(super) const MEMRESERVE: u64 = 0x280;
    pub(super) const MEMORY_MAP: u64 = 0x300;
}

type Guid = [u8; 16];

const fn guid(a: u32, b: u16, c: u16, d: [u8; 8]) -> Guid {
    let (a, b, c) = (a.to_le_bytes(), b.to_le_bytes(), c.to_le_bytes());
    [a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], d[0], d[1], d[2], d[3], d[4], d[5], d[6], d[7]]
}

/// What the tables tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Description {
    /// Address of ACPI's root pointer.
    pub rsdp: u64,
    /// RAM, in multiples of [`GRANULE`].
    pub ram: Range,
    /// The part of it that holds tables, these ones among them, in multiples of [`GRANULE`].
    pub tables: Range,
}

/// Build the tables to lie at `base`, a multiple of 4096: [`SIZE`] bytes, and what the device tree says of them.
pub fn build(machine: &Description, base: u64) -> (Vec<u8>, EfiTables) {
    let mut page = vec![0; SIZE as usize];
    let configuration = [
        (ACPI_20, machine.rsdp),
        (RT_PROPERTIES, base + place::RT_PROPERTIES),
        (LINUX_MEMRESERVE, base + place::MEMRESERVE),
    ];
    put(&mut page, place::SYSTEM_TABLE, &system_table(base, configuration.len() as u64));
    let configuration =
        configuration.map(|(guid, table)| [&guid[..], &table.to_le_bytes()].concat());
    put(&mut page, place::CONFIGURATION, &configuration.concat());
    let vendor: Vec<u8> = "ecr\0".encode_utf16().flat_map(u16::to_le_bytes).collect();
    put(&mut page, place::VENDOR, &vendor);
    // Version 1, 8 bytes, no service. Linux's list is empty, so all of it is zero.
    put(&mut page, place::RT_PROPERTIES, &[1, 0, 8, 0, 0, 0, 0, 0]);
    let map = memory_map(machine);
    put(&mut page, place::MEMORY_MAP, &map);
    let tables = EfiTables {
        system_table: base + place::SYSTEM_TABLE,
        memory_map: Range::new(base + place::MEMORY_MAP, map.len() as u64),
        descriptor_size: DESCRIPTOR_SIZE,
        descriptor_version: DESCRIPTOR_VERSION,
    };
    (page, tables)
}

fn put(page: &mut [u8], at: u64, bytes: &[u8]) {
    page[at as usize..][..bytes.len()].copy_from_slice(bytes);
}

/// With `count` configuration tables.
fn system_table(base: u64, count: u64) -> Vec<u8> {
    let mut table = Vec::new();
    table.extend(SYSTEM_TABLE_SIGNATURE.to_le_bytes());
    // The checksum follows, then a reserved field.
    for field in [REVISION, SYSTEM_TABLE_SIZE, 0, 0] {
        table.extend(field.to_le_bytes());
    }
    // Firmware's vendor and revision; consoles, which end with the boot services; runtime and boot services.
    let vendor = base + place::VENDOR;
    for field in [vendor, 1, 0, 0, 0, 0, 0, 0, 0, 0, count, base + place::CONFIGURATION] {
        table.extend(field.to_le_bytes());
    }
    let mut crc = flate2::Crc::new();
    crc.update(&table);
    table[CRC_OFFSET..CRC_OFFSET + 4].copy_from_slice(&crc.sum().to_le_bytes());
    table
}

/// RAM below the tables, the tables, RAM above them.
fn memory_map(machine: &Description) -> Vec<u8> {
    let Description { ram, tables, .. } = machine;
    let below = Range::new(ram.base, tables.base.saturating_sub(ram.base));
    let above = Range::new(tables.end(), ram.end().saturating_sub(tables.end()));
    [(CONVENTIONAL_MEMORY, below), (ACPI_RECLAIM_MEMORY, *tables), (CONVENTIONAL_MEMORY, above)]
        .iter()
        .filter(|(_, range)| range.size != 0)
        .flat_map(|&(kind, range)| descriptor(kind, range))
        .collect()
}

/// A page is one of 4096 bytes, whatever pages the kernel uses.
fn descriptor(kind: u32, range: Range) -> [u8; DESCRIPTOR_SIZE as usize] {
    let mut bytes = [0; DESCRIPTOR_SIZE as usize];
    // Type, padding, physical address, virtual address, pages, attributes.
    let fields = [kind.into(), range.base, 0, range.size / PAGE, WRITE_BACK];
    for (place, field) in bytes.chunks_exact_mut(8).zip(fields) {
        place.copy_from_slice(&field.to_le_bytes());
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{GIB, MIB};

    const BASE: u64 = GIB + 20 * MIB + 0x8000;
    const MACHINE: Description = Description {
        rsdp: GIB + 20 * MIB,
        ram: Range::new(GIB, 256 * MIB),
        tables: Range::new(GIB + 20 * MIB, GRANULE),
    };

    fn qword(page: &[u8], at: u64) -> u64 {
        u64::from_le_bytes(page[at as usize..][..8].try_into().unwrap())
    }

    #[test]
    fn the_system_table_leads_to_the_root_pointer() {
        let (page, tables) = build(&MACHINE, BASE);
        assert_eq!(page.len() as u64, SIZE);
        let at = tables.system_table - BASE;
        assert_eq!(&page[at as usize..][..8], b"IBI SYST");
        let mut header = page[at as usize..][..SYSTEM_TABLE_SIZE as usize].to_vec();
        let crc = u32::from_le_bytes(header[CRC_OFFSET..][..4].try_into().unwrap());
        header[CRC_OFFSET..][..4].fill(0);
        let mut expected = flate2::Crc::new();
        expected.update(&header);
        assert_eq!(crc, expected.sum());
        let (count, configuration) = (qword(&page, at + 104), qword(&page, at + 112) - BASE);
        let root = (0..count).map(|n| configuration + 24 * n).find(|&entry| {
            page[entry as usize..][..16]
                == [
                    0x71, 0xe8, 0x68, 0x88, 0xf1, 0xe4, 0xd3, 0x11, 0xbc, 0x22, 0, 0x80, 0xc7,
                    0x3c, 0x88, 0x81,
                ]
        });
        assert_eq!(qword(&page, root.unwrap() + 16), MACHINE.rsdp);
    }

    #[test]
    fn the_memory_map_covers_ram_and_keeps_the_tables() {
        let (page, tables) = build(&MACHINE, BASE);
        let map = tables.memory_map;
        let descriptors: Vec<(u64, Range)> = (0..map.size / u64::from(tables.descriptor_size))
            .map(|n| map.base - BASE + n * u64::from(tables.descriptor_size))
            .map(|at| {
                assert_eq!(qword(&page, at + 32), WRITE_BACK);
                (qword(&page, at), Range::new(qword(&page, at + 8), qword(&page, at + 24) * PAGE))
            })
            .collect();
        let mut next = MACHINE.ram.base;
        for (_, range) in &descriptors {
            assert_eq!(range.base, next);
            assert_eq!((range.base % GRANULE, range.size % GRANULE), (0, 0));
            next = range.end();
        }
        assert_eq!(next, MACHINE.ram.end());
        assert_eq!(descriptors.iter().filter(|(kind, _)| *kind == 9).count(), 1);
        assert_eq!(descriptors[1], (9, MACHINE.tables));
        assert!(tables.memory_map.end() <= BASE + SIZE);
    }
}
