// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Boot plans: what must lie where in guest memory, and in which state the boot processor starts.
//!
//! A plan only names byte ranges of files; the VMM reads them straight into guest memory. [`plan`] tells a
//! bzImage, which unpacks itself, from an ELF kernel with a PVH note, which runs as it is.

mod bzimage;
pub mod e820;
mod pvh;

use std::io;

use crate::layout::Range;
use crate::x86::regs::BootRegs;
use e820::E820Entry;

/// Random access to a file's bytes: the kernel's headers are looked at, its body is not.
pub trait ReadAt {
    /// Fill `buf` from `offset` on.
    ///
    /// # Errors
    /// The file ends before, or cannot be read.
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;

    /// Size in bytes.
    ///
    /// # Errors
    /// The file cannot be asked.
    fn size(&self) -> io::Result<u64>;
}

/// Which file a [`Source::File`] means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BootFile {
    /// The kernel.
    Kernel,
    /// The initial RAM disk.
    Initrd,
}

/// Where the bytes of a [`Load`] come from. Guest memory is zero before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// These bytes.
    Bytes(Vec<u8>),
    /// `size` bytes of a file from `offset` on.
    File {
        /// Which file.
        file: BootFile,
        /// First byte.
        offset: u64,
        /// How many.
        size: u64,
    },
}

/// Bytes to put into guest memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Load {
    /// What it is, for error messages.
    pub what: &'static str,
    /// Guest-physical address of the first byte.
    pub address: u64,
    /// Where the bytes come from.
    pub source: Source,
}

impl Load {
    fn bytes(what: &'static str, address: u64, bytes: Vec<u8>) -> Self {
        Self { what, address, source: Source::Bytes(bytes) }
    }

    fn file(file: BootFile, address: u64, offset: u64, size: u64) -> Self {
        let what = match file {
            BootFile::Kernel => "the kernel",
            BootFile::Initrd => "the initrd",
        };
        Self { what, address, source: Source::File { file, offset, size } }
    }
}

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

/// Why a guest cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The kernel file cannot be read.
    #[error("read {what} of the kernel: {source}")]
    Read {
        /// Which part.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The kernel file is something else, or damaged.
    #[error("not a bootable kernel: {0}")]
    NotAKernel(String),
    /// It does not fit into memory.
    #[error(
        "{what} needs guest memory from {base:#x} to {end:#x}, but RAM ends at {ram_end:#x}: give the guest more memory"
    )]
    TooLarge {
        /// What.
        what: &'static str,
        /// Where it begins.
        base: u64,
        /// Where it would end.
        end: u64,
        /// Where RAM ends.
        ram_end: u64,
    },
    /// The initrd has no bytes.
    #[error("the initrd is empty: give a cpio archive, or none")]
    EmptyInitrd,
    /// The initrd does not fit between the kernel and the end of memory.
    #[error(
        "the initrd of {size} bytes does not fit between the kernel's end at {floor:#x} and {ceiling:#x}: give the guest \
         more memory"
    )]
    InitrdTooLarge {
        /// Its size in bytes.
        size: u64,
        /// Where the kernel ends.
        floor: u64,
        /// The end of where it may be.
        ceiling: u64,
    },
    /// The kernel takes no command line of this length.
    #[error("the kernel command line has {length} bytes, but this kernel takes at most {limit}")]
    CmdlineTooLong {
        /// Its length in bytes.
        length: usize,
        /// The limit in bytes.
        limit: usize,
    },
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
    let size =
        request.kernel.size().map_err(|source| BootError::Read { what: "the size", source })?;
    if size == 0 {
        return Err(BootError::NotAKernel("the file is empty".into()));
    }
    let mut head = [0; 64];
    let known = usize::try_from(size).map_or(head.len(), |size| size.min(head.len()));
    read(request.kernel, "the first bytes", 0, &mut head[..known])?;
    if head.starts_with(b"\x7fELF") {
        pvh::plan(request)
    } else if head.starts_with(b"MZ") || has_setup_header(request.kernel, size)? {
        bzimage::plan(request, size)
    } else {
        Err(BootError::NotAKernel(guess(&head).into()))
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

/// What somebody probably gave instead of a kernel.
fn guess(head: &[u8; 64]) -> &'static str {
    match head {
        [0x1f, 0x8b, ..] => "it is gzip-compressed: unpack it first",
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "it is zstd-compressed: unpack it first",
        [0xfd, b'7', b'z', b'X', b'Z', ..] => "it is xz-compressed: unpack it first",
        [b'0', b'7', b'0', b'7', b'0', ..] => "it is a cpio archive; did you mean --initrd?",
        _ if &head[56..60] == b"ARMd" => "it is an aarch64 Image",
        _ => "it is neither a bzImage nor an ELF file",
    }
}

fn read(
    kernel: &dyn ReadAt,
    what: &'static str,
    offset: u64,
    buf: &mut [u8],
) -> Result<(), BootError> {
    kernel.read_exact_at(buf, offset).map_err(|source| match source.kind() {
        io::ErrorKind::UnexpectedEof => {
            BootError::NotAKernel(format!("it ends inside {what}: the file is truncated"))
        }
        _ => BootError::Read { what, source },
    })
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

/// Fields of little-endian structures at fixed offsets.
fn le16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from(le16(bytes, at)) | u32::from(le16(bytes, at + 2)) << 16
}

fn le64(bytes: &[u8], at: usize) -> u64 {
    u64::from(le32(bytes, at)) | u64::from(le32(bytes, at + 4)) << 32
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

#[cfg(test)]
mod tests;
