// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The emulated host's kernel and disk, from Debian 13 packages alone.
//!
//! `mke2fs -d` makes the disk, so nothing is mounted. What packages' own scripts would have done and the host needs is
//! done here: users, module dependencies.
//!
//! The result is cached by its recipe: suite, architecture, packages and `BUILDER`.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};

use crate::arch::Arch;
use crate::files::{Space, make_ext4};
use crate::tree::{LEFT_OUT, SUITE};
use crate::{cache, tool, tree};

/// Raised whenever this module makes something else of the same packages.
const BUILDER: u32 = 2;

/// `extract` takes no package for granted, so the essential ones that a test or a person may want are named.
const PACKAGES: [&str; 22] = [
    "bash",
    "busybox-static",
    "containerd",
    "containernetworking-plugins",
    "coreutils",
    "dash",
    "diffutils",
    "e2fsprogs",
    "findutils",
    "grep",
    "gzip",
    "iproute2",
    "iptables",
    "kmod",
    "mount",
    "nftables",
    "procps",
    "runc",
    "sed",
    "strace",
    "util-linux",
    "virtiofsd",
];

/// What the initramfs must load to reach the root file system; the rest of virtio is part of Debian's kernels.
const INITRAMFS_MODULE: &str = "virtio_blk";

/// Free space on the disk, for what tests write.
const FREE_SPACE: u64 = 4 << 30;

/// A built host image.
#[derive(Debug, Clone)]
pub struct Image(PathBuf);

impl Image {
    /// The kernel, in the format that QEMU loads.
    #[must_use]
    pub fn kernel(&self) -> PathBuf {
        self.0.join("kernel")
    }

    /// The root file system, ext4.
    #[must_use]
    pub fn disk(&self) -> PathBuf {
        self.0.join("disk.ext4")
    }

    /// Modules for the initramfs, to be loaded in the order of their names.
    #[must_use]
    pub fn modules(&self) -> PathBuf {
        self.0.join("modules")
    }

    /// The image for `arch`: from the cache, or built now, which takes about half a minute and says so.
    ///
    /// # Errors
    /// A tool is missing, packages cannot be fetched, or the cache cannot be written.
    pub fn get(arch: Arch) -> Result<Self> {
        let recipe = recipe(arch);
        let name = format!("{arch}-{}", cache::key(&recipe));
        cache::entry(&cache::root()?.join("testbed"), &name, |directory| {
            fs::write(directory.join("recipe"), &recipe)?;
            build(arch, directory)
        })
        .map(Self)
    }
}

fn packages(arch: Arch) -> Vec<String> {
    let mut all: Vec<String> = PACKAGES.iter().map(|p| (*p).to_owned()).collect();
    all.push(format!("linux-image-cloud-{}", arch.debian()));
    all.push(arch.emulator().1.to_owned());
    all
}

fn recipe(arch: Arch) -> String {
    format!(
        "builder {BUILDER}\nsuite {SUITE}\narchitecture {}\npackages {}\nleft out {}\n",
        arch.debian(),
        packages(arch).join(" "),
        LEFT_OUT.join(" ")
    )
}

fn build(arch: Arch, into: &Path) -> Result<()> {
    let started = Instant::now();
    let progress = |what: &str| {
        eprintln!("testbed: {arch} host image: [{:5.1} s] {what}", started.elapsed().as_secs_f64());
    };
    progress(&format!("fetching and unpacking Debian {SUITE} packages"));
    let root = tempfile::Builder::new().prefix(".root-").tempdir_in(into)?;
    tree::unpack(arch, &packages(arch), into, root.path())?;
    progress("preparing its kernel");
    take_kernel(root.path(), into)?;
    configure(root.path())?;
    progress("making its disk");
    make_ext4(root.path(), &into.join("disk.ext4"), Space::AndFree(FREE_SPACE))?;
    progress("done");
    Ok(())
}

fn take_kernel(root: &Path, into: &Path) -> Result<()> {
    let boot = root.join("boot");
    let kernel = fs::read_dir(&boot)?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.file_name().is_some_and(|n| n.to_string_lossy().starts_with("vmlinuz-")))
        .context("the kernel package has no /boot/vmlinuz-*")?;
    let name = kernel.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let release = name.trim_start_matches("vmlinuz-");
    fs::copy(&kernel, into.join("kernel"))?;
    tool::run(tool::command("depmod").arg("-b").arg(root).arg(release), "kmod")?;
    take_modules(&root.join("lib/modules").join(release), &into.join("modules"))
}

/// Copies the initramfs's module with what it depends on, numbered in the order of loading.
fn take_modules(from: &Path, to: &Path) -> Result<()> {
    let dependencies = fs::read_to_string(from.join("modules.dep"))?;
    let paths = load_order(&dependencies, INITRAMFS_MODULE)
        .with_context(|| format!("the kernel has no module {INITRAMFS_MODULE}"))?;
    fs::create_dir(to)?;
    for (number, path) in paths.iter().enumerate() {
        let name = path.rsplit('/').next().unwrap_or(path);
        fs::copy(from.join(path), to.join(format!("{number:02}-{name}")))?;
    }
    Ok(())
}

/// From modules.dep(5): "PATH: DEPENDENCIES", those to be loaded first standing last.
fn load_order<'a>(dependencies: &'a str, module: &str) -> Option<Vec<&'a str>> {
    let file = format!("/{module}.ko");
    let (path, needed) = dependencies
        .lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(path, _)| path.contains(&file))?;
    Some(needed.split_whitespace().rev().chain([path]).collect())
}

fn configure(root: &Path) -> Result<()> {
    let etc = root.join("etc");
    fs::write(
        etc.join("passwd"),
        "root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534::/:/usr/sbin/nologin\n",
    )?;
    fs::write(etc.join("group"), "root:x:0:\ntty:x:5:\nkvm:x:104:\nnogroup:x:65534:\n")?;
    fs::write(etc.join("hosts"), "127.0.0.1 localhost testbed\n")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_loaded_after_what_they_need() {
        let dependencies = "kernel/a/virtio_blk.ko.xz: kernel/b/ring.ko.xz kernel/c/virtio.ko.xz\nkernel/c/virtio.ko.xz:\n";
        assert_eq!(
            load_order(dependencies, "virtio_blk").unwrap(),
            ["kernel/c/virtio.ko.xz", "kernel/b/ring.ko.xz", "kernel/a/virtio_blk.ko.xz"]
        );
        assert_eq!(load_order(dependencies, "virtio_net"), None);
    }

    #[test]
    fn the_recipe_tells_architectures_apart() {
        assert_ne!(cache::key(&recipe(Arch::X86_64)), cache::key(&recipe(Arch::Aarch64)));
    }
}
