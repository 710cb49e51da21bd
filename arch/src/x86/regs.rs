// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Register state of a vCPU at its first instruction: Intel SDM volume 3A, chapters 2 to 4.

/// A segment register.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Segment {
    /// Visible selector.
    pub selector: u16,
    /// Base address.
    pub base: u64,
    /// Limit in bytes, scaled.
    pub limit: u32,
    /// Access rights as in bits 55:40 of a descriptor: type 3:0, S 4, DPL 6:5, P 7, AVL 12, L 13, D/B 14, G 15.
    pub attributes: u16,
}

/// A descriptor table register.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DescriptorTable {
    /// Linear address.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u16,
}

/// State of the boot processor at its first instruction. Registers not named are zero; other
/// processors wait for INIT and SIPI.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BootRegs {
    /// Instruction pointer.
    pub rip: u64,
    /// RSI: `boot_params` for the Linux boot protocol.
    pub rsi: u64,
    /// RBX: `hvm_start_info` for PVH.
    pub rbx: u64,
    /// Flags.
    pub rflags: u64,
    /// Code segment.
    pub cs: Segment,
    /// All data segments and the stack.
    pub data: Segment,
    /// Task register.
    pub tr: Segment,
    /// Global descriptor table.
    pub gdt: DescriptorTable,
    /// CR0.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// EFER.
    pub efer: u64,
}

/// A model-specific register and its value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Msr {
    /// Its number.
    pub index: u32,
    /// Its value.
    pub value: u64,
}

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 of the flags is always set.
const RFLAGS_RESERVED: u64 = 1 << 1;

/// Access rights of present segments, accessed already.
const CODE_64: u16 = 0xA09B;
const CODE_32: u16 = 0xC09B;
const DATA_32: u16 = 0xC093;
const TSS_BUSY: u16 = 0x008B;

/// Selectors that the Linux boot protocol calls `__BOOT_CS` and `__BOOT_DS`.
const BOOT_CS: usize = 2;
const BOOT_DS: usize = 3;
const BOOT_TR: usize = 4;

/// Descriptor table for the 64-bit Linux boot protocol.
pub const GDT_64: [u64; 6] = [
    0,
    0,
    descriptor(CODE_64, u32::MAX),
    descriptor(DATA_32, u32::MAX),
    descriptor(TSS_BUSY, 0x67),
    0,
];
/// Descriptor table for PVH.
pub const GDT_32: [u64; 6] = [
    0,
    0,
    descriptor(CODE_32, u32::MAX),
    descriptor(DATA_32, u32::MAX),
    descriptor(TSS_BUSY, 0x67),
    0,
];

/// A segment descriptor with base 0. A limit of `u32::MAX` is counted in pages.
const fn descriptor(attributes: u16, limit: u32) -> u64 {
    let limit = if limit == u32::MAX { 0xF_FFFF } else { limit as u64 };
    (limit & 0xFFFF) | (limit & 0xF_0000) << 32 | (attributes as u64) << 40
}

/// A descriptor table as it lies in memory.
pub fn gdt_bytes(table: &[u64]) -> Vec<u8> {
    table.iter().flat_map(|entry| entry.to_le_bytes()).collect()
}

fn segment(index: usize, attributes: u16, limit: u32) -> Segment {
    Segment { selector: (index as u16) << 3, base: 0, limit, attributes }
}

impl BootRegs {
    /// 64-bit mode with paging: the descriptor table [`GDT_64`] lies at `gdt`, the page tables at `cr3`.
    pub fn long_mode(gdt: u64, cr3: u64) -> Self {
        Self {
            cs: segment(BOOT_CS, CODE_64, u32::MAX),
            cr0: CR0_PE | CR0_ET | CR0_PG,
            cr3,
            cr4: CR4_PAE,
            efer: EFER_LME | EFER_LMA,
            ..Self::protected_mode(gdt)
        }
    }

    /// 32-bit protected mode without paging: the descriptor table [`GDT_32`] lies at `gdt`.
    pub fn protected_mode(gdt: u64) -> Self {
        Self {
            rflags: RFLAGS_RESERVED,
            cs: segment(BOOT_CS, CODE_32, u32::MAX),
            data: segment(BOOT_DS, DATA_32, u32::MAX),
            tr: segment(BOOT_TR, TSS_BUSY, 0x67),
            gdt: DescriptorTable { base: gdt, limit: size_of_val(&GDT_32) as u16 - 1 },
            cr0: CR0_PE | CR0_ET,
            ..Self::default()
        }
    }
}

const PAGE_SIZE: u64 = 4096;
const ENTRIES: u64 = 512;
const PTE_PRESENT_WRITABLE: u64 = 0b11;
const PTE_LARGE: u64 = 1 << 7;
const LARGE_PAGE: u64 = 2 << 20;
/// Gigabytes that are mapped.
const MAPPED: u64 = 4;

/// Page tables that map the first 4 GiB to themselves with 2 MiB pages, to lie at `base`.
pub fn identity_page_tables(base: u64) -> Vec<u8> {
    let table = |n: u64| base + n * PAGE_SIZE;
    let mut entries = vec![0; ((2 + MAPPED) * ENTRIES) as usize];
    entries[0] = table(1) | PTE_PRESENT_WRITABLE;
    for (entry, n) in entries[ENTRIES as usize..].iter_mut().zip(0..MAPPED) {
        *entry = table(2 + n) | PTE_PRESENT_WRITABLE;
    }
    for (entry, n) in entries[2 * ENTRIES as usize..].iter_mut().zip(0..) {
        *entry = (n * LARGE_PAGE) | PTE_PRESENT_WRITABLE | PTE_LARGE;
    }
    gdt_bytes(&entries)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_those_of_the_boot_protocol() {
        assert_eq!(GDT_64[BOOT_CS], 0x00AF_9B00_0000_FFFF);
        assert_eq!(GDT_32[BOOT_CS], 0x00CF_9B00_0000_FFFF);
        assert_eq!(GDT_32[BOOT_DS], 0x00CF_9300_0000_FFFF);
        assert_eq!(BootRegs::long_mode(0, 0).cs.selector, 0x10);
        assert_eq!(BootRegs::long_mode(0, 0).data.selector, 0x18);
    }

    #[test]
    fn every_large_page_maps_to_itself() {
        let tables = identity_page_tables(0x9000);
        assert_eq!(tables.len(), 6 * 4096);
        let entry = |at: u64| {
            let at = usize::try_from(at - 0x9000).unwrap();
            u64::from_le_bytes(tables[at..at + 8].try_into().unwrap())
        };
        for address in [0, 0x0100_0000, 0x3FE0_0000, 0x4000_0000, 0xFFE0_0000u64] {
            let directory_pointer = entry(0x9000) & !0xFFF;
            let directory = entry(directory_pointer + (address >> 30) * 8) & !0xFFF;
            let page = entry(directory + ((address >> 21) & 511) * 8);
            assert_eq!(page, address | 0x83);
        }
    }
}
