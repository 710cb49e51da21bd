// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! aarch64 `Image`, as it is or compressed: Linux `Documentation/arch/arm64/booting.rst`.
//!
//! From the kernel on, memory holds in this order: the kernel with all that it clears, the device tree, tables, the
//! initial RAM disk. So that one is always within reach of the kernel, which is a window of 32 GiB.

mod unpack;

use super::{BootError, BootFile, Load, ReadAt, file_size, guess, is_arm64, le64, read};
use crate::arm64::id::PageSize;
use crate::arm64::regs::BootRegs;
use crate::layout::{MIB, Range};

/// Offsets in the header, which is 64 bytes long.
mod header {
    pub(super) const TEXT_OFFSET: usize = 8;
    pub(super) const IMAGE_SIZE: usize = 16;
    pub(super) const FLAGS: usize = 24;
}
const FLAG_BIG_ENDIAN: u64 = 1;
const FLAGS_PAGE_SIZE_SHIFT: u32 = 1;
/// Before Linux 3.17 the header told neither the size nor a usable offset.
const LEGACY_TEXT_OFFSET: u64 = 0x8_0000;
/// What such a kernel may need behind its file.
const LEGACY_SLACK: u64 = 16 * MIB;
/// What the kernel's base is a multiple of, and what the device tree may not cross.
const BLOCK: u64 = 2 * MIB;
/// Room for the device tree, and with it for tables: one block.
const FDT_ROOM: u64 = 512 << 10;
/// aarch64 Linux's `COMMAND_LINE_SIZE`, without the terminating zero.
pub const CMDLINE_MAX: usize = 2047;

/// What is to be booted, and the memory it finds.
#[derive(Clone, Copy)]
pub struct BootRequest<'a> {
    /// The kernel.
    pub kernel: &'a dyn ReadAt,
    /// Size of the initial RAM disk in bytes, if there is one.
    pub initrd_size: Option<u64>,
    /// RAM.
    pub ram: Range,
    /// `ID_AA64MMFR0_EL1` of the processors.
    pub mmfr0: u64,
}

impl std::fmt::Debug for BootRequest<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BootRequest").field("ram", &self.ram).finish_non_exhaustive()
    }
}

/// What must be in place before the boot processor runs. Device tree and tables depend on where they are, so there is
/// room for them only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootPlan {
    /// Kernel and initial RAM disk.
    pub loads: Vec<Load>,
    /// The kernel is an EFI program as well: it understands EFI's tables.
    pub efi: bool,
    /// Where the device tree may lie.
    pub fdt: Range,
    /// Where tables may lie; a multiple of 64 KiB at a multiple of 64 KiB.
    pub tables: Range,
    /// Where the initial RAM disk is.
    pub initrd: Option<Range>,
    /// State of the boot processor.
    pub regs: BootRegs,
}

/// Plan how to boot `request.kernel`.
///
/// # Errors
/// It is no kernel, is damaged, does not fit, or needs another processor.
pub fn plan(request: &BootRequest<'_>) -> Result<BootPlan, BootError> {
    let unpacked = unpack::unpack(request.kernel, request.ram.size)?;
    let header = match &unpacked {
        Some(image) => Header::read(image)?,
        None => Header::read(request.kernel)?,
    };
    if let Some(pages) = header.page_size
        && !pages.is_in(request.mmfr0)
    {
        return Err(BootError::PageSize { kib: pages.kib() });
    }
    let base = request.ram.base.next_multiple_of(BLOCK);
    let (start, end) = (base.saturating_add(header.text_offset), request.ram.end());
    let kernel_end = start.saturating_add(header.memory);
    let block = round_up(kernel_end, BLOCK);
    let tables_end = block.saturating_add(BLOCK);
    if tables_end > end {
        let what = "the kernel, with its device tree,";
        return Err(BootError::TooLarge { what, base, end: tables_end, ram_end: end });
    }
    let initrd = place_initrd(request.initrd_size, tables_end, end)?;
    let kernel = match unpacked {
        Some(image) => Load::bytes("the kernel", start, image),
        None => Load::file(BootFile::Kernel, start, 0, header.file),
    };
    let initrd_load = initrd.map(|at| Load::file(BootFile::Initrd, at.base, 0, at.size));
    let tables = block + FDT_ROOM;
    Ok(BootPlan {
        loads: [kernel].into_iter().chain(initrd_load).collect(),
        efi: header.efi,
        fdt: Range::new(block, FDT_ROOM),
        tables: Range::new(tables, tables_end - tables),
        initrd,
        regs: BootRegs { pc: start, x0: block },
    })
}

fn place_initrd(size: Option<u64>, floor: u64, ceiling: u64) -> Result<Option<Range>, BootError> {
    match size {
        None => Ok(None),
        Some(0) => Err(BootError::EmptyInitrd),
        Some(size) if size > ceiling - floor => {
            Err(BootError::InitrdTooLarge { size, floor, ceiling })
        }
        Some(size) => Ok(Some(Range::new(floor, size))),
    }
}

fn round_up(value: u64, to: u64) -> u64 {
    value.checked_next_multiple_of(to).unwrap_or(u64::MAX)
}

/// What the header says.
#[derive(Debug)]
struct Header {
    /// Bytes in the file.
    file: u64,
    /// Bytes that it needs in memory.
    memory: u64,
    /// Offset from a base of 2 MiB.
    text_offset: u64,
    /// Unless the kernel is too old to say.
    page_size: Option<PageSize>,
    efi: bool,
}

impl Header {
    fn read(image: &dyn ReadAt) -> Result<Self, BootError> {
        let file = file_size(image)?;
        let mut head = [0; 64];
        let known = usize::try_from(file).map_or(head.len(), |size| size.min(head.len()));
        read(image, "the first bytes", 0, &mut head[..known])?;
        if !is_arm64(&head) {
            return Err(BootError::NotAKernel(guess(&head, "no aarch64 Image")));
        }
        let flags = le64(&head, header::FLAGS);
        if flags & FLAG_BIG_ENDIAN != 0 {
            return Err(BootError::NotAKernel("it is big-endian: use a little-endian one".into()));
        }
        let (image_size, text_offset) =
            (le64(&head, header::IMAGE_SIZE), le64(&head, header::TEXT_OFFSET));
        let legacy = image_size == 0;
        Ok(Self {
            file,
            memory: if legacy { file.saturating_add(LEGACY_SLACK) } else { image_size.max(file) },
            text_offset: if legacy { LEGACY_TEXT_OFFSET } else { text_offset },
            page_size: match flags >> FLAGS_PAGE_SIZE_SHIFT & 3 {
                1 => Some(PageSize::Small),
                2 => Some(PageSize::Medium),
                3 => Some(PageSize::Large),
                _ => None,
            },
            efi: head.starts_with(b"MZ"),
        })
    }
}

#[cfg(test)]
mod tests;
