// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! bzImage through its 64-bit entry: Linux `Documentation/arch/x86/boot.rst`, "64-bit BOOT PROTOCOL".

use super::{
    BootError, BootFile, BootPlan, BootRequest, CMDLINE_MAX, Load, cmdline, initrd, place, read,
};
use crate::boot::{le16, le32, le64, put};
use crate::x86::regs::{self, BootRegs};

/// Magic number of the setup header, and where it stands in file and zero page alike.
pub(super) const MAGIC: &[u8; 4] = b"HdrS";
pub(super) const MAGIC_OFFSET: u64 = 0x202;

/// "The Real-Mode Kernel Header": offsets in the file and in `boot_params`.
mod header {
    pub(super) const START: usize = 0x1F1;
    pub(super) const SETUP_SECTS: usize = 0x1F1;
    pub(super) const LENGTH: usize = 0x201;
    pub(super) const VERSION: usize = 0x206;
    pub(super) const TYPE_OF_LOADER: usize = 0x210;
    pub(super) const RAMDISK_IMAGE: usize = 0x218;
    pub(super) const RAMDISK_SIZE: usize = 0x21C;
    pub(super) const CMD_LINE_PTR: usize = 0x228;
    pub(super) const INITRD_ADDR_MAX: usize = 0x22C;
    pub(super) const KERNEL_ALIGNMENT: usize = 0x230;
    pub(super) const XLOADFLAGS: usize = 0x236;
    pub(super) const CMDLINE_SIZE: usize = 0x238;
    pub(super) const PREF_ADDRESS: usize = 0x258;
    pub(super) const INIT_SIZE: usize = 0x260;
    pub(super) const END: usize = 0x268;
}

/// `boot_params`, `Documentation/arch/x86/zero-page.rst`.
mod zero_page {
    pub(super) const SIZE: usize = 4096;
    pub(super) const ACPI_RSDP_ADDR: usize = 0x70;
    pub(super) const E820_ENTRIES: usize = 0x1E8;
    pub(super) const E820_TABLE: usize = 0x2D0;
}

const VERSION_2_12: u16 = 0x020C;
const XLF_KERNEL_64: u16 = 1;
/// A boot loader without an id of its own.
const LOADER_UNDEFINED: u8 = 0xFF;
const SECTOR: u64 = 512;
/// The 64-bit entry point, from where the kernel is loaded.
const ENTRY_64: u64 = 0x200;

pub(super) fn plan(request: &BootRequest<'_>, size: u64) -> Result<BootPlan, BootError> {
    let mut head = [0; header::END];
    read(request.kernel, "the setup header", 0, &mut head)?;
    check(&head)?;
    let setup = (u64::from(match head[header::SETUP_SECTS] {
        0 => 4,
        sectors => sectors,
    }) + 1)
        * SECTOR;
    let body = size.checked_sub(setup).filter(|&body| body != 0).ok_or_else(|| {
        BootError::NotAKernel("it ends inside the real-mode code: the file is truncated".into())
    })?;
    let (base, end) = place_kernel(request, &head, body)?;

    let limit = (le32(&head, header::CMDLINE_SIZE) as usize).min(CMDLINE_MAX);
    let mut loads = vec![Load::file(BootFile::Kernel, base, setup, body), cmdline(request, limit)?];
    let mut params = boot_params(request, &head);
    let ceiling = u64::from(le32(&head, header::INITRD_ADDR_MAX)) + 1;
    if let Some((load, size)) = initrd(request, end, ceiling)? {
        put(&mut params, header::RAMDISK_IMAGE, &low32(load.address));
        put(&mut params, header::RAMDISK_SIZE, &low32(size));
        loads.push(load);
    }
    loads.push(Load::bytes("the zero page", place::ZERO_PAGE, params));
    loads.push(Load::bytes("the descriptor table", place::GDT, regs::gdt_bytes(&regs::GDT_64)));
    loads.push(Load::bytes(
        "the page tables",
        place::PAGE_TABLES,
        regs::identity_page_tables(place::PAGE_TABLES),
    ));
    let regs = BootRegs {
        rip: base + ENTRY_64,
        rsi: place::ZERO_PAGE,
        ..BootRegs::long_mode(place::GDT, place::PAGE_TABLES)
    };
    Ok(BootPlan { loads, regs })
}

fn check(head: &[u8; header::END]) -> Result<(), BootError> {
    let magic_at = MAGIC_OFFSET as usize;
    if &head[magic_at..magic_at + 4] != MAGIC {
        return Err(BootError::NotAKernel(
            if &head[56..60] == b"ARMd" {
                "it is an aarch64 Image"
            } else {
                "its setup header lacks the magic number HdrS"
            }
            .into(),
        ));
    }
    let version = le16(head, header::VERSION);
    if version < VERSION_2_12 || le16(head, header::XLOADFLAGS) & XLF_KERNEL_64 == 0 {
        return Err(BootError::NotAKernel(format!(
            "it has no 64-bit entry (boot protocol {}.{}, 2.12 is needed)",
            version >> 8,
            version & 0xFF
        )));
    }
    Ok(())
}

/// Where the kernel is loaded and where the memory that it works in ends. Even a relocatable kernel moves
/// itself up to the address that it prefers, so there is no use in loading it below.
fn place_kernel(
    request: &BootRequest<'_>,
    head: &[u8; header::END],
    body: u64,
) -> Result<(u64, u64), BootError> {
    let preferred = le64(head, header::PREF_ADDRESS).max(place::HIGH_MEMORY);
    let align = u64::from(le32(head, header::KERNEL_ALIGNMENT)).max(1);
    let base = preferred.checked_next_multiple_of(align).unwrap_or(u64::MAX);
    let end = base.saturating_add(body.max(le32(head, header::INIT_SIZE).into()));
    let ram_end = request.low_ram.end();
    if end > ram_end {
        return Err(BootError::TooLarge { what: "the kernel", base, end, ram_end });
    }
    Ok((base, end))
}

fn boot_params(request: &BootRequest<'_>, head: &[u8; header::END]) -> Vec<u8> {
    let mut params = vec![0; zero_page::SIZE];
    let end =
        (header::LENGTH + 1 + usize::from(head[header::LENGTH])).clamp(header::START, header::END);
    put(&mut params, header::START, &head[header::START..end]);
    params[header::TYPE_OF_LOADER] = LOADER_UNDEFINED;
    put(&mut params, header::CMD_LINE_PTR, &low32(place::CMDLINE));
    put(&mut params, zero_page::ACPI_RSDP_ADDR, &request.rsdp.to_le_bytes());
    let mut at = zero_page::E820_TABLE;
    for entry in request.memory_map {
        put(&mut params, at, &entry.range.base.to_le_bytes());
        put(&mut params, at + 8, &entry.range.size.to_le_bytes());
        put(&mut params, at + 16, &(entry.kind as u32).to_le_bytes());
        at += 20;
        params[zero_page::E820_ENTRIES] += 1;
    }
    params
}

/// An address or a size that lies below 4 GiB, because all of low RAM does.
fn low32(value: u64) -> [u8; 4] {
    let [a, b, c, d, ..] = value.to_le_bytes();
    [a, b, c, d]
}
