// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Kernels of a few bytes: what the boot processor does after the PVH entry, in 32-bit protected mode.

use std::fs;
use std::path::{Path, PathBuf};

/// `cli; hlt; jmp`: for ever.
pub const IDLE: &[u8] = &[0xFA, 0xF4, 0xEB, 0xFD];
/// `mov dx, 0x604; mov ax, 0x3400; out dx, ax`, then idle: SLP_TYP 5 and SLP_EN (ACPI 6.5, 4.8.3.2.1).
pub const POWER_OFF: &[u8] =
    &[0x66, 0xBA, 0x04, 0x06, 0x66, 0xB8, 0x00, 0x34, 0x66, 0xEF, 0xFA, 0xF4, 0xEB, 0xFD];
/// `mov esi, 0x100800; mov ecx, 3000; mov dx, 0x3F8; rep outsb`, then [`POWER_OFF`]: that many characters on the
/// serial line at once, and the end.
pub const SAY_AND_POWER_OFF: &[u8] = &[
    0xBE, 0x00, 0x08, 0x10, 0x00, 0xB9, 0xB8, 0x0B, 0x00, 0x00, 0x66, 0xBA, 0xF8, 0x03, 0xF3, 0x6E,
    0x66, 0xBA, 0x04, 0x06, 0x66, 0xB8, 0x00, 0x34, 0x66, 0xEF, 0xFA, 0xF4, 0xEB, 0xFD,
];
/// How many characters that is.
pub const SAID: usize = 3000;
/// `mov dx, 0x505; mov al, 1; out dx, al`, then idle: pvpanic's PANICKED.
pub const PANIC: &[u8] = &[0x66, 0xBA, 0x05, 0x05, 0xB0, 0x01, 0xEE, 0xFA, 0xF4, 0xEB, 0xFD];
/// `mov dx, 0xCF9; mov al, 6; out dx, al`, then idle: the reset control register.
pub const RESET: &[u8] = &[0x66, 0xBA, 0xF9, 0x0C, 0xB0, 0x06, 0xEE, 0xFA, 0xF4, 0xEB, 0xFD];
/// `ud2` with no interrupt table.
pub const TRIPLE_FAULT: &[u8] = &[0x0F, 0x0B];

/// Where the code is loaded.
const ENTRY: u32 = 1 << 20;
/// Entry point of a PVH kernel (Xen's `elfnote.h`).
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;

/// Whether there are guests at all on this machine.
pub fn kvm() -> bool {
    if cfg!(not(target_arch = "x86_64")) {
        eprintln!("SKIPPED: the guests are of x86_64");
        return false;
    }
    let found = ecr_vmm::hypervisor::kvm::Kvm::open();
    if let Err(error) = &found {
        eprintln!("SKIPPED: {error}");
    }
    found.is_ok()
}

/// Write a kernel with `code` and return its path.
pub fn kernel(dir: &Path, code: &[u8]) -> PathBuf {
    const NOTE: usize = 0x100;
    const CODE: usize = 0x200;
    let mut image = vec![0; CODE + 0x1000];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    // An ELF file of class 64 for x86_64, with two program headers behind the file header.
    put(0, b"\x7fELF\x02\x01\x01");
    put(18, &62u16.to_le_bytes());
    put(32, &64u64.to_le_bytes());
    put(54, &56u16.to_le_bytes());
    put(56, &2u16.to_le_bytes());
    let (load, note) = (1u32, 4u32);
    for (at, kind, offset, address, size) in
        [(64, load, CODE as u64, u64::from(ENTRY), 0x1000u64), (120, note, NOTE as u64, 0, 20)]
    {
        put(at, &kind.to_le_bytes());
        put(at + 8, &offset.to_le_bytes());
        put(at + 24, &address.to_le_bytes());
        put(at + 32, &size.to_le_bytes());
        put(at + 40, &size.to_le_bytes());
    }
    for (at, value) in [(0, 4u32), (4, 4), (8, XEN_ELFNOTE_PHYS32_ENTRY), (16, ENTRY)] {
        put(NOTE + at, &value.to_le_bytes());
    }
    put(NOTE + 12, b"Xen\0");
    put(CODE, code);
    let path = dir.join("kernel");
    fs::write(&path, image).unwrap();
    path
}
