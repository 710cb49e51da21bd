// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Where programs and guest files are.

use std::env;
use std::path::PathBuf;

use anyhow::{Context, Result};

/// The file of the built guest that is our kernel, in the form that boots fastest.
pub const KERNEL: &str = if cfg!(target_arch = "aarch64") { "Image" } else { "vmlinux" };
/// The same kernel, compressed.
pub const COMPRESSED_KERNEL: &str =
    if cfg!(target_arch = "aarch64") { "Image.gz" } else { "bzImage" };

/// Where programs and guest files are.
#[derive(Debug, Clone)]
pub struct Place {
    files: PathBuf,
}

/// How many of something are enough: `hardware` on a real host, and `emulated` where software plays one.
#[must_use]
pub fn enough(hardware: usize, emulated: usize) -> usize {
    if env::var_os("ECR_EMULATED").is_some() { emulated } else { hardware }
}

impl Place {
    /// The place that the testbed's program has prepared.
    ///
    /// # Errors
    /// This process was not started by it.
    pub fn from_environment() -> Result<Self> {
        let files = env::var_os("ECR_FILES").context(
            "ECR_FILES is not set: start this through tools/dev test or tools/dev bench",
        )?;
        Ok(Self { files: files.into() })
    }

    /// The program `ecr-vmm`.
    #[must_use]
    pub fn vmm(&self) -> PathBuf {
        self.files.join("vmm")
    }

    /// A file that was handed in under this name; it need not have been.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.files.join(name)
    }

    /// A file of the built guest, such as [`KERNEL`] or `rootfs.img`.
    #[must_use]
    pub fn guest(&self, name: &str) -> PathBuf {
        self.files.join("guest").join(name)
    }
}
