// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The files that a configuration names.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha512};

use super::check::refuse;
use super::{Config, Table, sources};
use crate::error::{Error, Kind, Result};

const MIB: u64 = 1 << 20;

impl Config {
    /// Resolve the files that the machine is made of, and refuse those that are missing or empty.
    pub(super) fn check_assets(&mut self) -> Result<()> {
        self.hypervisor.kernel = self.present("kernel", &self.hypervisor.kernel)?;
        self.hypervisor.image = self.present_if_set("image", self.hypervisor.image.as_deref())?;
        self.hypervisor.initrd =
            self.present_if_set("initrd", self.hypervisor.initrd.as_deref())?;
        let firmware = self.hypervisor.firmware.as_deref();
        self.hypervisor.firmware = self.present_if_set("firmware", firmware)?;
        let volume = self.hypervisor.firmware_volume.as_deref();
        self.hypervisor.firmware_volume = self.present_if_set("firmware_volume", volume)?;
        let flashes = self.hypervisor.pflashes.iter();
        self.hypervisor.pflashes =
            flashes.map(|path| self.present("pflashes", path)).collect::<Result<_>>()?;
        self.check_sizes()?;
        self.check_bind_mounts()
    }

    fn present_if_set(&self, key: &str, path: Option<&Path>) -> Result<Option<PathBuf>> {
        path.map(|path| self.present(key, path)).transpose()
    }

    fn present(&self, name: &str, path: &Path) -> Result<PathBuf> {
        sources::resolve(path).map_err(|error| {
            let origin = Table::Hypervisor.key(name).map(|key| self.origin(key).to_string());
            error.context(format!("{name} ({})", origin.unwrap_or_default()))
        })
    }

    fn check_sizes(&self) -> Result<()> {
        let machine = &self.hypervisor;
        let memory = machine.default_memory;
        for (kind, path) in [("image", &machine.image), ("initrd", &machine.initrd)] {
            let Some(path) = path else { continue };
            let size = std::fs::metadata(path).map_err(|error| unreadable(path, &error))?.len();
            if size == 0 {
                return refuse(format!("{kind} {path:?} is empty"));
            }
            if memory.saturating_mul(MIB) > size {
                continue;
            }
            let text =
                format!("VM memory ({memory}MB) <= size of {kind} {path:?} ({}MB)", size / MIB);
            if kind == "initrd" {
                return refuse(text);
            }
            log::warn!("{text}");
        }
        Ok(())
    }

    /// They are told apart in the guest by the last parts of their paths.
    fn check_bind_mounts(&self) -> Result<()> {
        let mut names = HashSet::new();
        for path in &self.runtime.sandbox_bind_mounts {
            sources::resolve(path).map_err(|error| {
                error.context(format!(
                    "sandbox-bindmounts: Failed to resolve path: {}",
                    path.display()
                ))
            })?;
            let Some(name) = path.file_name() else {
                return refuse(format!("sandbox-bindmounts: {} has no name", path.display()));
            };
            if !names.insert(name) {
                let name = name.display();
                return refuse(format!("sandbox-bindmounts: two paths end in {name}"));
            }
        }
        Ok(())
    }
}

fn unreadable(path: &Path, error: &io::Error) -> Error {
    Error::new(Kind::FailedPrecondition, format!("read {}: {error}", path.display()))
}

/// Refuse a file whose SHA-512 is not `expected`, in hexadecimal.
pub(super) fn check_hash(path: &Path, expected: &str) -> Result<()> {
    let attempt = || -> io::Result<String> {
        let mut file = File::open(path)?;
        let mut digest = Sha512::new();
        let mut buffer = vec![0; 1 << 16];
        loop {
            let count = file.read(&mut buffer)?;
            if count == 0 {
                break;
            }
            digest.update(&buffer[..count]);
        }
        Ok(digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    };
    let found = attempt().map_err(|error| unreadable(path, &error))?;
    if found.eq_ignore_ascii_case(expected) {
        return Ok(());
    }
    let path = path.display();
    refuse(format!("Invalid hash for {path}: computed hash: {found}, expecting hash: {expected}"))
}

/// Whether `path` is one of those that `patterns` stand for on this host.
pub(super) fn is_listed(path: &str, patterns: &[String]) -> bool {
    let wanted = Path::new(path);
    patterns.iter().any(|pattern| match glob::glob(pattern) {
        Ok(mut paths) => paths.any(|found| found.is_ok_and(|found| found == wanted)),
        Err(error) => {
            log::warn!("configuration: {pattern:?} is no pattern of paths: {error}");
            false
        }
    })
}
