// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The initramfs: `ecr-testbed-init`, built here for the emulated host, and the image's modules.
//!
//! The program belongs to the checkout, not to the cached image, so it is built (cargo knows whether anything
//! changed) and packed for each boot. `ECR_TESTBED_INIT` names one that was built elsewhere.

use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::arch::Arch;
use crate::cpio::Archive;
use crate::image::Image;

const PROGRAM: &str = "ecr-testbed-init";

/// Writes the initramfs to `path`.
///
/// # Errors
/// The program cannot be built, or a file cannot be read or written.
pub fn write_initramfs(arch: Arch, image: &Image, path: &Path) -> Result<()> {
    let program = program(arch)?;
    let content = fs::read(&program).with_context(|| format!("reading {}", program.display()))?;
    let mut archive = Archive::new(BufWriter::new(File::create(path)?));
    // The kernel opens /dev/console for pid 1 before pid 1 can mount anything there; without it the messages of
    // pid 1 are lost. A kernel with devtmpfs makes the node when the initramfs has none, so only the place is needed.
    for directory in ["dev", "modules", "new-root", "proc", "sys"] {
        archive.directory(directory)?;
    }
    archive.file("init", 0o755, &content)?;
    let mut modules: Vec<PathBuf> =
        fs::read_dir(image.modules())?.flatten().map(|entry| entry.path()).collect();
    modules.sort();
    for module in modules {
        let name = module.file_name().unwrap_or_default().to_string_lossy();
        archive.file(&format!("modules/{name}"), 0o644, &fs::read(&module)?)?;
    }
    archive.finish().context("writing the initramfs")
}

fn program(arch: Arch) -> Result<PathBuf> {
    if let Some(given) = std::env::var_os("ECR_TESTBED_INIT") {
        return Ok(given.into());
    }
    let target = arch.static_target();
    // Set whenever cargo runs us; else the cargo that is found.
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml");
    let directory = target_directory()?;
    let linker = format!("CARGO_TARGET_{}_LINKER", target.to_uppercase().replace('-', "_"));
    let status = Command::new(cargo)
        .args(["build", "--quiet", "--bin", PROGRAM, "--target", target, "--manifest-path"])
        .arg(&manifest)
        .arg("--target-dir")
        .arg(&directory)
        // Rust's own linker needs no C tool chain for the other architecture.
        .env(linker, "rust-lld")
        .status()
        .with_context(|| format!("building {PROGRAM} for {target}"))?;
    ensure!(
        status.success(),
        "building {PROGRAM} for {target}: {status}. Is the target there? `rustup target add {target}`"
    );
    Ok(directory.join(target).join("debug").join(PROGRAM))
}

/// The target directory that we were built in: `<target>/<profile>/ecr-testbed`.
fn target_directory() -> Result<PathBuf> {
    let us = std::env::current_exe().context("finding our own program")?;
    us.ancestors()
        .find(|path| path.join("CACHEDIR.TAG").is_file())
        .map(Path::to_path_buf)
        .with_context(|| {
            format!(
                "{} is in no target directory; set ECR_TESTBED_INIT to a static {PROGRAM}",
                us.display()
            )
        })
}
