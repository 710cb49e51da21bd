// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Debian packages with all that they depend on, unpacked into a directory.
//!
//! `mmdebstrap --variant=extract` runs nothing of theirs, so a foreign architecture needs no emulation.

use std::fs::{self, File};
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context, Result, bail};

use crate::arch::Arch;
use crate::{mirror, tool};

/// Debian 13.
pub const SUITE: &str = "trixie";

/// Not needed to run anything, and a third of the size.
pub const LEFT_OUT: [&str; 6] = [
    "/usr/share/doc/*",
    "/usr/share/man/*",
    "/usr/share/locale/*",
    "/usr/share/i18n/*",
    "/usr/share/info/*",
    "/usr/share/gtk-doc/*",
];

/// Unpacks `packages` of [`SUITE`] for `arch` into `root`, without [`LEFT_OUT`]; `scratch` is for files on the way. It
/// goes through a tar archive, so that one who is not root can do it too.
///
/// # Errors
/// A tool is missing, or packages cannot be fetched; the error has the last words of mmdebstrap.
pub fn unpack(arch: Arch, packages: &[String], scratch: &Path, root: &Path) -> Result<()> {
    let archive = scratch.join("root.tar");
    let log = scratch.join("mmdebstrap.log");
    let mut mmdebstrap = tool::command("mmdebstrap");
    mmdebstrap
        .args(["--variant=extract", "--skip=check/qemu", "--format=tar"])
        .arg(format!("--architectures={}", arch.debian()))
        .arg(format!("--include={}", packages.join(",")))
        .arg("--aptopt=Acquire::Languages \"none\"")
        .args(LEFT_OUT.iter().map(|pattern| format!("--dpkgopt=path-exclude={pattern}")))
        .arg(SUITE)
        .arg(&archive)
        .args(mirror::sources(SUITE))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::create(&log)?);
    let status = mmdebstrap.status().context("running mmdebstrap (Debian: mmdebstrap)")?;
    if !status.success() {
        let text = fs::read_to_string(&log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        bail!(
            "mmdebstrap: {status}. It needs root or user namespaces (Debian: uidmap), and a \
             debian-archive-keyring that knows {SUITE}. It said last:\n{}",
            lines[lines.len().saturating_sub(12)..].join("\n")
        );
    }
    // Device nodes are devtmpfs's business, and only root could make them.
    tool::run(
        tool::command("tar").args(["--exclude=./dev/*", "-xf"]).arg(&archive).arg("-C").arg(root),
        "tar",
    )?;
    fs::remove_file(archive)?;
    fs::remove_file(log)?;
    Ok(())
}
