// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Kernel modules for a kernel that has its drivers as modules: the initial RAM disk lists the files to load, in the
//! order that their dependencies ask for, so that no module index has to be read at boot.

use std::fs::{self, File};
use std::io::ErrorKind;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::kmod::{ModuleInitFlags, finit_module};

/// One absolute path per line.
const LIST: &str = "/etc/ecr-agent/modules";

/// Load the listed modules. Without a list there is nothing to load.
///
/// A module that the kernel refuses is skipped with a warning: its device may not be there, and the guest of use
/// without it.
pub fn load_listed() -> Result<()> {
    let list = match fs::read_to_string(LIST) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        list => list.with_context(|| format!("read {LIST}"))?,
    };
    for path in list.lines().filter(|line| !line.is_empty()) {
        if let Err(error) = load(path) {
            log::warn!("{error:#}");
        }
    }
    Ok(())
}

fn load(path: &str) -> Result<()> {
    let file = File::open(path).with_context(|| format!("open kernel module {path}"))?;
    match finit_module(&file, c"", ModuleInitFlags::empty()) {
        Ok(()) | Err(Errno::EEXIST) => Ok(()),
        Err(error) => Err(error).with_context(|| format!("load kernel module {path}")),
    }
}
