// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! `ecr-image`: from a list of files to an initial RAM disk, or to a root file system image.
//!
//! The same list and the same files give the same bytes, whoever builds and when: owner, time and order come from
//! here and not from the build machine. Nothing needs root.

mod cpio;
mod disk;
mod ext4;
mod manifest;
mod modules;

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

use manifest::Manifest;

/// Build initial RAM disks and root file system images, bit for bit the same every time.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Write an initial RAM disk: a cpio archive, not compressed.
    Initrd {
        /// What goes in.
        manifest: PathBuf,
        /// The archive.
        output: PathBuf,
    },
    /// Write a root file system image that boots as a disk and as persistent memory.
    Rootfs {
        /// What goes in.
        manifest: PathBuf,
        /// The image; its size is a multiple of 128 MiB.
        output: PathBuf,
    },
    /// Print manifest lines for kernel modules, what they depend on first, and for the list that the agent loads.
    Modules {
        /// The kernel's directory: lib/modules/VERSION.
        directory: PathBuf,
        /// Where to put decompressed modules and the list.
        scratch: PathBuf,
        /// Modules by name; those built into the kernel are passed over.
        #[arg(required = true)]
        names: Vec<String>,
    },
}

fn main() -> Result<()> {
    match Arguments::parse().command {
        Command::Initrd { manifest, output } => {
            let manifest = Manifest::read(&manifest)?;
            replace(&output, |partial| {
                let mut archive = BufWriter::new(File::create(partial)?);
                cpio::write(&manifest, &mut archive)?;
                Ok(archive.flush()?)
            })
        }
        Command::Rootfs { manifest, output } => {
            let manifest = Manifest::read(&manifest)?;
            replace(&output, |partial| {
                let size = disk::image_size(manifest.content_size()?);
                disk::create(partial, size)?;
                ext4::write(&manifest, partial, disk::PARTITION, size)
            })
        }
        Command::Modules { directory, scratch, names } => {
            print!("{}", modules::manifest(&directory, &scratch, &names)?);
            Ok(())
        }
    }
}

/// Make a file under another name, and give it its own only when it is whole.
fn replace(output: &Path, make: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let mut partial = output.to_path_buf().into_os_string();
    partial.push(format!(".partial-{}", std::process::id()));
    let partial = PathBuf::from(partial);
    make(&partial)
        .and_then(|()| Ok(fs::rename(&partial, output)?))
        .inspect_err(|_| drop(fs::remove_file(&partial)))
        .with_context(|| format!("write {}", output.display()))
}
