// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Kernel modules for a kernel that has its drivers as modules: the initial RAM disk lists the files to load, in the
//! order that their dependencies ask for, so that no module index has to be read at boot. What the runtime asks for
//! later, by name, is modprobe's business.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::kmod::{ModuleInitFlags, finit_module};

use crate::exec::{find_program, run_to_end};
use crate::reaper::Reaper;

/// One absolute path per line.
const LIST: &str = "/etc/ecr-agent/modules";
/// Modules, and those built-in drivers that have something to set.
const KNOWN: &str = "/sys/module";

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

/// Load the module `name` with `parameters`, and what it depends on. A driver that the kernel has already is left as it
/// is, as modprobe leaves it.
pub async fn load_named(name: &str, parameters: &[String], reaper: &Reaper) -> Result<()> {
    if name.is_empty() || name.starts_with('-') || name.contains('/') {
        bail!("{name:?} cannot be the name of a kernel module");
    }
    if Path::new(KNOWN).join(name.replace('-', "_")).exists() {
        return Ok(());
    }
    let attempt = || format!("load kernel module {name:?} {parameters:?}");
    let modprobe = find_program("modprobe").with_context(attempt)?;
    let arguments: Vec<&str> =
        ["-v", name].into_iter().chain(parameters.iter().map(String::as_str)).collect();
    let finished =
        run_to_end(&modprobe, &arguments, Vec::new(), reaper).await.with_context(attempt)?;
    finished.check("modprobe").with_context(attempt)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn names_that_are_none() {
        let reaper = Reaper::that_never_collects();
        for name in ["", "-r", "../../tmp/x"] {
            assert!(load_named(name, &[], &reaper).await.is_err(), "{name}");
        }
    }
}
