// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The frame around the root file system: one file that boots as a disk (`/dev/vda1`) and as persistent memory with
//! direct access (`/dev/pmem0p1`).
//!
//! ```text
//! 0        first MBR: partition 1 at 3 MiB               seen by a disk driver
//! 4 KiB    info block "NVDIMM_PFN_INFO"                  tells the pmem driver that data begins at 2 MiB
//! 2 MiB    second MBR: partition 1 at 1 MiB from here    seen by the pmem driver
//! 3 MiB    the file system, to the end
//! ```
//!
//! The info block says that the kernel keeps its page structures in RAM, so that nothing is ever written here; without
//! one the pmem driver has no page structures and no DAX. Its layout is Linux's `struct nd_pfn_sb`
//! (drivers/nvdimm/pfn.h), version 1.2, checked as `nd_pfn_validate` does.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const SECTOR: u64 = 512;

/// Where the file system begins.
pub const PARTITION: u64 = 3 * MIB;
/// Persistent memory is hot-plugged in blocks of this size.
const SIZE_UNIT: u64 = 128 * MIB;
const DATA: u64 = 2 * MIB;
const INFO_BLOCK: u64 = 4 * KIB;

/// The size of an image that has room for `content` bytes: for the file system's own needs a quarter more, and some.
pub fn image_size(content: u64) -> u64 {
    (PARTITION + content + content / 4 + 16 * MIB).next_multiple_of(SIZE_UNIT)
}

/// Create the image file, empty but for its frame.
pub fn create(path: &Path, size: u64) -> Result<()> {
    let file = File::create(path).with_context(|| format!("create {}", path.display()))?;
    file.set_len(size)?;
    file.write_all_at(&mbr(PARTITION, size - PARTITION)?, 0)?;
    file.write_all_at(&info_block(size), INFO_BLOCK)?;
    file.write_all_at(&mbr(PARTITION - DATA, size - PARTITION)?, DATA)?;
    Ok(())
}

/// A master boot record with one Linux partition; offsets and sizes in bytes, multiples of a sector.
fn mbr(start: u64, size: u64) -> Result<[u8; SECTOR as usize]> {
    const DISK_SIGNATURE: [u8; 4] = *b"ecr\x01";
    const LINUX: u8 = 0x83;
    /// "Not addressable by cylinder, head and sector."
    const NO_CHS: [u8; 3] = [0xfe, 0xff, 0xff];

    let sectors =
        |bytes: u64| u32::try_from(bytes / SECTOR).context("an MBR holds less than 2 TiB");
    let mut record = [0; SECTOR as usize];
    record[440..444].copy_from_slice(&DISK_SIGNATURE);
    let entry = &mut record[446..462];
    entry[1..4].copy_from_slice(&NO_CHS);
    entry[4] = LINUX;
    entry[5..8].copy_from_slice(&NO_CHS);
    entry[8..12].copy_from_slice(&sectors(start)?.to_le_bytes());
    entry[12..16].copy_from_slice(&sectors(size)?.to_le_bytes());
    record[510..].copy_from_slice(&[0x55, 0xaa]);
    Ok(record)
}

/// `struct nd_pfn_sb` for an image of `size` bytes.
fn info_block(size: u64) -> [u8; 4096] {
    const SIGNATURE: [u8; 16] = *b"NVDIMM_PFN_INFO\0";
    /// Random, once: the block's own UUID. Its parent, a namespace without label, has none.
    const UUID: [u8; 16] = [
        0x8c, 0x4f, 0x1d, 0x52, 0x6b, 0x0e, 0x4a, 0x39, 0x9d, 0x57, 0x21, 0xe8, 0xb3, 0x70, 0xc6,
        0x14,
    ];
    const VERSION_MAJOR: u16 = 1;
    const VERSION_MINOR: u16 = 2;
    const PAGE: u64 = 4096;
    const MODE_RAM: u32 = 1;
    const ALIGN: u32 = 2 * MIB as u32;

    let mut block = [0; 4096];
    let mut put = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &SIGNATURE);
    put(16, &UUID);
    // 32: parent_uuid, 48: flags: zero.
    put(52, &VERSION_MAJOR.to_le_bytes());
    put(54, &VERSION_MINOR.to_le_bytes());
    put(56, &DATA.to_le_bytes());
    put(64, &((size - DATA) / PAGE).to_le_bytes());
    put(72, &MODE_RAM.to_le_bytes());
    // 76: start_pad, 80: end_trunc: zero.
    put(84, &ALIGN.to_le_bytes());
    let checksum = fletcher64(&block);
    block[4088..].copy_from_slice(&checksum.to_le_bytes());
    block
}

/// Linux's `nd_fletcher64` over little-endian words; the checksum's own place must be zero.
fn fletcher64(block: &[u8]) -> u64 {
    let (mut low, mut high) = (0_u32, 0_u64);
    for word in block.as_chunks().0 {
        low = low.wrapping_add(u32::from_le_bytes(*word));
        high = high.wrapping_add(u64::from(low));
    }
    high << 32 | u64::from(low)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn le<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
        bytes[at..at + N].try_into().unwrap()
    }

    #[test]
    fn fletcher64_by_hand() {
        // Words 1, 2, 0xffffffff: low = 1, 3, 2; high = 1, 4, 6.
        let bytes = [1, 0, 0, 0, 2, 0, 0, 0, 0xff, 0xff, 0xff, 0xff];
        assert_eq!(fletcher64(&bytes), 6 << 32 | 2);
        assert_eq!(fletcher64(&[0; 64]), 0);
    }

    /// Offsets written out from the C structure, not taken from the code above.
    #[test]
    fn info_block_fields() {
        let size = 256 * MIB;
        let block = info_block(size);
        assert_eq!(&block[..16], b"NVDIMM_PFN_INFO\0");
        assert_ne!(block[16..32], [0; 16], "the kernel refuses a block without UUID");
        assert_eq!(block[32..52], [0; 20]);
        assert_eq!(u16::from_le_bytes(le(&block, 52)), 1);
        assert_eq!(u16::from_le_bytes(le(&block, 54)), 2);
        assert_eq!(u64::from_le_bytes(le(&block, 56)), 0x20_0000);
        assert_eq!(u64::from_le_bytes(le(&block, 64)), (256 - 2) * 256);
        assert_eq!(u32::from_le_bytes(le(&block, 72)), 1);
        assert_eq!(block[76..84], [0; 8]);
        assert_eq!(u32::from_le_bytes(le(&block, 84)), 0x20_0000);
        assert_eq!(block[88..4088], [0; 4000]);
        let mut zeroed = block;
        zeroed[4088..].fill(0);
        assert_eq!(u64::from_le_bytes(le(&block, 4088)), fletcher64(&zeroed));
    }

    #[test]
    fn both_partition_tables_point_at_the_same_place() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        create(&path, SIZE_UNIT).unwrap();
        let image = std::fs::read(&path).unwrap();
        for base in [0, DATA as usize] {
            let record = &image[base..base + 512];
            assert_eq!(record[510..], [0x55, 0xaa]);
            assert_eq!(record[446], 0, "not active: nobody boots from it");
            assert_eq!(record[450], 0x83);
            assert_eq!(record[462..510], [0; 48], "one partition");
            let start = u64::from(u32::from_le_bytes(le(record, 454))) * 512 + base as u64;
            let length = u64::from(u32::from_le_bytes(le(record, 458))) * 512;
            assert_eq!((start, start + length), (3 * MIB, 128 * MIB));
        }
    }

    #[test]
    fn sizes_are_whole_units() {
        assert_eq!(image_size(0), 128 * MIB);
        assert_eq!(image_size(100 * MIB), 256 * MIB);
        assert!(image_size(u64::from(u32::MAX)).is_multiple_of(SIZE_UNIT));
    }
}
