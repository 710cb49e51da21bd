// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Boot plans: what must lie where in guest memory, and in which state the boot processor starts.
//!
//! A plan only names byte ranges of files; the VMM reads them straight into guest memory.

pub mod arm64;
pub mod x86;

use std::io;

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

impl ReadAt for Vec<u8> {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let at = usize::try_from(offset).unwrap_or(usize::MAX);
        let end = at.checked_add(buf.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        buf.copy_from_slice(self.get(at..end).ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.len() as u64)
    }
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
    /// The kernel is compressed, and damaged.
    #[error("unpack the {method}-compressed kernel: {source}")]
    Unpack {
        /// How it is compressed.
        method: &'static str,
        /// What is wrong.
        source: io::Error,
    },
    /// The kernel is compressed, and does not fit into memory.
    #[error(
        "the {method}-compressed kernel has more than {limit} bytes when unpacked, and the guest has no more memory: give \
         it more"
    )]
    UnpackedTooLarge {
        /// How it is compressed.
        method: &'static str,
        /// The guest's memory in bytes.
        limit: u64,
    },
    /// The host's processors cannot run the kernel.
    #[error(
        "the kernel uses pages of {kib} KiB, which this host's processors do not have: use a kernel built for another page \
         size"
    )]
    PageSize {
        /// Size of a page in KiB.
        kib: u32,
    },
    /// The guest would not find something without ACPI, which it does not use.
    #[error(
        "this guest boots from a device tree alone, which does not tell it of {what}: {remedy}, or do without"
    )]
    NeedsAcpi {
        /// What it would not find, and what can be done instead.
        what: &'static str,
        /// What to do for it to use ACPI.
        remedy: &'static str,
    },
    /// A table for the guest is larger than the room for it.
    #[error("{what}: {problem}")]
    Table {
        /// Which.
        what: &'static str,
        /// What is wrong.
        problem: String,
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

/// Magic number of an aarch64 `Image`, in its first 64 bytes.
const ARM64_MAGIC: std::ops::Range<usize> = 56..60;

fn is_arm64(head: &[u8; 64]) -> bool {
    &head[ARM64_MAGIC] == b"ARMd"
}

/// What somebody probably gave instead of a kernel; `wanted` says what it is not.
fn guess(head: &[u8; 64], wanted: &str) -> String {
    let what = match head {
        [0x1f, 0x8b, ..] => "gzip-compressed: unpack it first",
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "zstd-compressed: unpack it first",
        [0xfd, b'7', b'z', b'X', b'Z', ..] => "xz-compressed: unpack it first",
        [0x04, 0x22, 0x4d, 0x18, ..] | [0x02, 0x21, 0x4c, 0x18, ..] => {
            "lz4-compressed: unpack it first"
        }
        [b'B', b'Z', b'h', ..] => "bzip2-compressed: unpack it first",
        [0x5d, 0, 0, ..] => "lzma-compressed: unpack it first",
        [0x89, b'L', b'Z', b'O', ..] => "lzo-compressed: unpack it first",
        [b'0', b'7', b'0', b'7', b'0', ..] => "a cpio archive; did you mean --initrd?",
        _ if is_arm64(head) => "an aarch64 Image",
        [b'M', b'Z', ..] => "an x86_64 bzImage, or another EFI program",
        [0x7f, b'E', b'L', b'F', ..] => "an ELF file",
        _ => wanted,
    };
    format!("it is {what}")
}

/// Size of the kernel file, which is not empty.
fn file_size(kernel: &dyn ReadAt) -> Result<u64, BootError> {
    match kernel.size().map_err(|source| BootError::Read { what: "the size", source })? {
        0 => Err(BootError::NotAKernel("the file is empty".into())),
        size => Ok(size),
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
