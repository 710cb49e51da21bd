// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Single Debian packages of any suite, unpacked into the cache: containerd as several Debian releases have it.
//!
//! apt(8) works on lists and a cache of its own here, so the machine's own package state is neither read nor
//! changed, and no root is needed. Nothing is installed: a package's scripts do not run and its dependencies are
//! not fetched, so this is for programs that need little beyond a C library.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::arch::Arch;
use crate::{cache, mirror, tool};

/// Raised whenever this module makes something else of the same package.
const BUILDER: u32 = 1;
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// The containerds that tests run, by the names that they find them under, and the suites that have them.
pub const CONTAINERDS: [(&str, &str); 3] =
    [("containerd-1.6", "bookworm"), ("containerd-1.7", "trixie"), ("containerd-2", "sid")];

/// `package` of `suite` for `arch`, unpacked: from the cache, or fetched now.
///
/// # Errors
/// The suite cannot be reached or has no such package, or a tool is missing.
pub fn unpacked(suite: &str, package: &str, arch: Arch) -> Result<PathBuf> {
    let recipe = format!("builder {BUILDER}\n{suite}\n{package}\n{}\n", arch.debian());
    let name = format!("{package}-{suite}-{}", cache::key(&recipe));
    cache::entry(&cache::root()?.join("packages"), &name, |into| {
        eprintln!("testbed: fetching {package} of Debian {suite}");
        fetch(suite, package, arch, into)
            .with_context(|| format!("fetching {package} of Debian {suite}"))
    })
}

fn fetch(suite: &str, package: &str, arch: Arch, into: &Path) -> Result<()> {
    let apt = tempfile::Builder::new().prefix(".apt-").tempdir_in(into)?;
    let state = apt.path();
    for directory in ["lists/partial", "cache/archives/partial"] {
        fs::create_dir_all(state.join(directory))?;
    }
    fs::write(state.join("status"), "")?;
    // Only the main archive: the others have no packages of their own in every suite.
    let source = mirror::sources(suite).swap_remove(0);
    let signed = source.replacen("deb ", &format!("deb [signed-by={KEYRING}] "), 1);
    fs::write(state.join("sources.list"), format!("{signed}\n"))?;
    let apt_get = || {
        let mut command = tool::command("apt-get");
        command.current_dir(state);
        for option in [
            format!("Dir::Etc::SourceList={}", state.join("sources.list").display()),
            "Dir::Etc::SourceParts=-".to_owned(),
            format!("Dir::State={}", state.display()),
            format!("Dir::State::Lists={}", state.join("lists").display()),
            format!("Dir::State::Status={}", state.join("status").display()),
            format!("Dir::Cache={}", state.join("cache").display()),
            format!("APT::Architecture={}", arch.debian()),
            format!("APT::Architectures={}", arch.debian()),
            "APT::Sandbox::User=".to_owned(),
            "Acquire::Languages=none".to_owned(),
            "Acquire::Retries=3".to_owned(),
        ] {
            command.arg("-o").arg(option);
        }
        command
    };
    tool::run(apt_get().args(["-qq", "update"]), "apt")?;
    tool::run(apt_get().args(["-qq", "download", package]), "apt")?;
    let is_package = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "deb");
    let archive = fs::read_dir(state)?
        .flatten()
        .map(|entry| entry.path())
        .find(is_package)
        .context("apt-get download left no package")?;
    tool::run(tool::command("dpkg-deb").arg("-x").arg(archive).arg(into), "dpkg")?;
    // Manuals and the like: nobody reads them here.
    let _ = fs::remove_dir_all(into.join("usr/share"));
    Ok(())
}
