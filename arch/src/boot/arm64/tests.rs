// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

use std::io::Write;

use proptest::prelude::*;

use super::*;
use crate::boot::{Source, put};
use crate::layout::GIB;

const RAM: Range = Range::new(GIB, 256 * MIB);
const ALL_PAGES: u64 = 1 << 20;

fn request(kernel: &dyn ReadAt) -> BootRequest<'_> {
    BootRequest { kernel, initrd_size: None, ram: RAM, mmfr0: ALL_PAGES }
}

/// An EFI kernel of `size` bytes that needs 20 MiB, with pages of 4 KiB.
fn image(size: usize) -> Vec<u8> {
    let mut image: Vec<u8> = (0..size).map(|at| (at % 251) as u8).collect();
    image[..64].fill(0);
    put(&mut image, 0, b"MZ");
    put(&mut image, header::IMAGE_SIZE, &(20 * MIB).to_le_bytes());
    put(&mut image, header::FLAGS, &0b1010u64.to_le_bytes());
    put(&mut image, 56, b"ARMd");
    image
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest)
}

fn zboot(method: &str, packed: &[u8]) -> Vec<u8> {
    let mut program = vec![0; 128];
    put(&mut program, 0, b"MZ");
    put(&mut program, 4, b"zimg");
    put(&mut program, 8, &128u32.to_le_bytes());
    put(&mut program, 12, &(packed.len() as u32).to_le_bytes());
    put(&mut program, 24, method.as_bytes());
    program.extend(packed);
    // What follows is none of the payload.
    program.extend([0; 4]);
    program
}

fn error(kernel: &Vec<u8>) -> String {
    plan(&request(kernel)).unwrap_err().to_string()
}

#[test]
fn all_lies_behind_the_kernel() {
    let kernel = image(4096);
    let plan = plan(&BootRequest { initrd_size: Some(5000), ..request(&kernel) }).unwrap();
    assert!(plan.efi);
    assert_eq!(plan.regs, BootRegs { pc: GIB, x0: GIB + 20 * MIB });
    assert_eq!(plan.fdt, Range::new(GIB + 20 * MIB, FDT_ROOM));
    assert_eq!(plan.tables, Range::new(plan.fdt.end(), BLOCK - FDT_ROOM));
    assert_eq!(plan.initrd, Some(Range::new(GIB + 22 * MIB, 5000)));
    assert_eq!(plan.loads[0], Load::file(BootFile::Kernel, GIB, 0, 4096));
    assert_eq!(plan.loads[1], Load::file(BootFile::Initrd, GIB + 22 * MIB, 0, 5000));
}

#[test]
fn an_old_kernel_tells_neither_its_size_nor_its_offset() {
    let mut kernel = image(4096);
    put(&mut kernel, 0, &[0; 32]);
    let plan = plan(&request(&kernel)).unwrap();
    assert!(!plan.efi);
    assert_eq!(plan.regs.pc, GIB + 0x8_0000);
    assert_eq!(plan.fdt.base, GIB + 18 * MIB);
}

#[test]
fn compressed_kernels_are_unpacked() {
    let kernel = image(100_000);
    for packed in [
        gzip(&kernel),
        zstd(&kernel),
        zboot("gzip", &gzip(&kernel)),
        zboot("zstd22", &zstd(&kernel)),
    ] {
        let plan = plan(&request(&packed)).unwrap();
        assert_eq!(plan.loads, [Load::bytes("the kernel", GIB, kernel.clone())]);
    }
}

#[test]
fn unpacking_is_bounded_and_damage_is_told() {
    let kernel = image(3 << 20);
    let packed = gzip(&kernel);
    let small = BootRequest { ram: Range::new(GIB, 2 * MIB), ..request(&packed) };
    let refused = plan(&small).unwrap_err();
    assert!(matches!(refused, BootError::UnpackedTooLarge { limit: 0x20_0000, .. }), "{refused}");
    for packed in [&packed[..packed.len() / 2], &zstd(&kernel)[..100]] {
        let text = error(&packed.to_vec());
        assert!(text.starts_with("unpack the"), "{text}");
    }
    let text = error(&zboot("lzma", b"x"));
    assert!(
        text.contains("\"lzma\"") && text.contains("use one compressed by gzip or zstd"),
        "{text}"
    );
}

#[test]
fn other_files_are_refused_by_what_they_are() {
    for (head, words) in [
        (&b"\x7fELF"[..], "an ELF file"),
        (b"\xfd7zXZ\0", "xz-compressed"),
        (b"\x04\x22\x4d\x18", "lz4-compressed"),
        (b"MZ", "bzImage"),
        (b"070701", "--initrd"),
        (b"#!/bin/sh", "no aarch64 Image"),
    ] {
        let text = error(&head.to_vec());
        assert!(text.contains(words), "{text}");
    }
    assert!(error(&Vec::new()).contains("empty"));
    let mut big = image(4096);
    big[header::FLAGS] |= 1;
    assert!(error(&big).contains("big-endian"));
}

#[test]
fn pages_must_be_the_processors() {
    let mut kernel = image(4096);
    put(&mut kernel, header::FLAGS, &0b100u64.to_le_bytes());
    let without_16k = BootRequest { mmfr0: 0, ..request(&kernel) };
    assert!(plan(&without_16k).unwrap_err().to_string().contains("pages of 16 KiB"));
    assert!(plan(&request(&kernel)).is_ok());
}

#[test]
fn what_does_not_fit_is_told() {
    let kernel = image(4096);
    let small = BootRequest { ram: Range::new(GIB, 21 * MIB), ..request(&kernel) };
    assert!(matches!(plan(&small), Err(BootError::TooLarge { .. })));
    let large = BootRequest { initrd_size: Some(RAM.size), ..request(&kernel) };
    assert!(matches!(plan(&large), Err(BootError::InitrdTooLarge { .. })));
    let empty = BootRequest { initrd_size: Some(0), ..request(&kernel) };
    assert!(matches!(plan(&empty), Err(BootError::EmptyInitrd)));
}

proptest! {
    #[test]
    fn no_header_makes_it_panic_or_leave_memory(
        mut head in prop::collection::vec(any::<u8>(), 64..200), initrd in any::<Option<u64>>(), ram in 1u64..1 << 40,
        magic in any::<bool>(),
    ) {
        if magic {
            put(&mut head, 56, b"ARMd");
        }
        let ram = Range::new(GIB, ram);
        let request = BootRequest { initrd_size: initrd, ram, ..request(&head) };
        let Ok(plan) = plan(&request) else { return Ok(()) };
        for load in &plan.loads {
            let size = match &load.source {
                Source::Bytes(bytes) => bytes.len() as u64,
                Source::File { size, .. } => *size,
            };
            prop_assert!(load.address >= ram.base && load.address + size <= ram.end());
        }
        prop_assert!(plan.fdt.base / BLOCK == (plan.tables.end() - 1) / BLOCK && plan.tables.end() <= ram.end());
    }
}
