// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! x86_64: [`plan`] tells a bzImage, which unpacks itself, from an ELF kernel with a PVH note, which runs as it is.

mod bzimage;
pub mod e820;
mod pvh;

use super::{BootError, BootFile, Load, ReadAt, file_size, guess, read};
use crate::layout::Range;
use crate::x86::regs::BootRegs;
use e820::E820Entry;

/// All that must be in place before the boot processor runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootPlan {
    /// In any order; they do not overlap.
    pub loads: Vec<Load>,
    /// State of the boot processor.
    pub regs: BootRegs,
}

/// What is to be booted, and the memory it finds.
#[derive(Clone, Copy)]
pub struct BootRequest<'a> {
    /// The kernel.
    pub kernel: &'a dyn ReadAt,
    /// Size of the initial RAM disk in bytes, if there is one.
    pub initrd_size: Option<u64>,
    /// Kernel command line, without its terminating zero.
    pub cmdline: &'a str,
    /// RAM from address 0 on.
    pub low_ram: Range,
    /// The memory map to hand over.
    pub memory_map: &'a [E820Entry],
    /// Guest-physical address of the ACPI root pointer.
    pub rsdp: u64,
}

impl std::fmt::Debug for BootRequest<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BootRequest").field("cmdline", &self.cmdline).finish_non_exhaustive()
    }
}

/// Where the small things lie that the VMM hands to the kernel, all in the first 640 KiB.
mod place {
    pub(super) const GDT: u64 = 0x500;
    pub(super) const START_INFO: u64 = 0x6000;
    pub(super) const ZERO_PAGE: u64 = 0x7000;
    pub(super) const PAGE_TABLES: u64 = 0x9000;
    pub(super) const CMDLINE: u64 = 0x2_0000;
    /// Kernels begin here at the earliest.
    pub(super) const HIGH_MEMORY: u64 = 0x10_0000;
}

/// x86 Linux's `COMMAND_LINE_SIZE`, without the terminating zero.
const CMDLINE_MAX: usize = 2047;
const PAGE: u64 = 4096;

/// Plan how to boot `request.kernel`.
///
/// # Errors
/// It is no kernel, is damaged, or does not fit.
pub fn plan(request: &BootRequest<'_>) -> Result<BootPlan, BootError> {
    let size = file_size(request.kernel)?;
    let mut head = [0; 64];
    let known = usize::try_from(size).map_or(head.len(), |size| size.min(head.len()));
    read(request.kernel, "the first bytes", 0, &mut head[..known])?;
    if head.starts_with(b"\x7fELF") {
        pvh::plan(request)
    } else if head.starts_with(b"MZ") && !super::is_arm64(&head)
        || has_setup_header(request.kernel, size)?
    {
        bzimage::plan(request, size)
    } else {
        Err(BootError::NotAKernel(guess(&head, "neither a bzImage nor an ELF file")))
    }
}

fn has_setup_header(kernel: &dyn ReadAt, size: u64) -> Result<bool, BootError> {
    let mut magic = [0; 4];
    if size < bzimage::MAGIC_OFFSET + 4 {
        return Ok(false);
    }
    read(kernel, "the setup header", bzimage::MAGIC_OFFSET, &mut magic)?;
    Ok(&magic == bzimage::MAGIC)
}

/// The command line with its terminating zero.
fn cmdline(request: &BootRequest<'_>, limit: usize) -> Result<Load, BootError> {
    let length = request.cmdline.len();
    if length > limit {
        return Err(BootError::CmdlineTooLong { length, limit });
    }
    let mut bytes = request.cmdline.as_bytes().to_vec();
    bytes.push(0);
    Ok(Load::bytes("the command line", place::CMDLINE, bytes))
}

/// Place the initial RAM disk as high as `ceiling` allows, above the kernel's end at `floor`.
fn initrd(
    request: &BootRequest<'_>,
    floor: u64,
    ceiling: u64,
) -> Result<Option<(Load, u64)>, BootError> {
    let Some(size) = request.initrd_size else { return Ok(None) };
    if size == 0 {
        return Err(BootError::EmptyInitrd);
    }
    let ceiling = ceiling.min(request.low_ram.end());
    match ceiling.checked_sub(size).map(|base| base & !(PAGE - 1)) {
        Some(base) if base >= floor => {
            Ok(Some((Load::file(BootFile::Initrd, base, 0, size), size)))
        }
        _ => Err(BootError::InitrdTooLarge { size, floor, ceiling }),
    }
}

#[cfg(test)]
mod tests;
