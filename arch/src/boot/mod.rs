// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Boot plans: what must lie where in guest memory, and in which state the boot processor starts.
//!
//! A plan only names byte ranges of files; the VMM reads them straight into guest memory.

use crate::x86::regs::BootRegs;

/// Random access to a file's bytes: the kernel's headers are looked at, its body is not.
pub trait ReadAt {
    /// Fill `buf` from `offset` on.
    ///
    /// # Errors
    /// The file ends before, or cannot be read.
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<()>;

    /// Size in bytes.
    ///
    /// # Errors
    /// The file cannot be asked.
    fn len(&self) -> std::io::Result<u64>;

    /// Whether it has no bytes.
    ///
    /// # Errors
    /// The file cannot be asked.
    fn is_empty(&self) -> std::io::Result<bool> {
        Ok(self.len()? == 0)
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

/// All that must be in place before the boot processor runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootPlan {
    /// In any order; they do not overlap.
    pub loads: Vec<Load>,
    /// State of the boot processor.
    pub regs: BootRegs,
}
