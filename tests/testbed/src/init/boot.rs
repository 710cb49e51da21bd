// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! From the initramfs to a Debian root file system with KVM, vhost and control groups.
//!
//! The disks are told apart by their serial number ([`ROOT_SERIAL`], [`FILES_SERIAL`]). What the host can do
//! without is a trouble in its report, not a failure.

use std::ffi::CStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::mount::MountFlags;

use crate::files::{COLLECT_DIRECTORY, FILES_DIRECTORY};
use crate::qemu::{FILES_SERIAL, ROOT_SERIAL};

const NEW_ROOT: &str = "/new-root";

/// Modules that tests need: KVM, vhost, what `containerd` and disk images want. `modprobe` skips built-in ones and
/// the aliases pick what the CPU has.
const MODULES: [&str; 6] = ["vhost_vsock", "vhost_net", "tun", "loop", "overlay", "fuse"];
#[cfg(target_arch = "x86_64")]
const KVM_MODULES: &[&str] = &["kvm_amd"];
#[cfg(not(target_arch = "x86_64"))]
const KVM_MODULES: &[&str] = &[]; // KVM is part of the aarch64 kernel.

/// `linux/module.h`: the file is compressed.
const MODULE_INIT_COMPRESSED_FILE: i32 = 4;

/// Brings the host up and returns its troubles.
pub(super) fn boot() -> Result<Vec<String>> {
    for (kind, at) in [("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys")] {
        mount(kind, kind, at, MountFlags::empty(), c"")?;
    }
    load_initramfs_modules()?;
    mount(disk(ROOT_SERIAL)?, "ext4", NEW_ROOT, MountFlags::NOATIME, c"")?;
    switch_root()?;
    mount_the_rest()?;
    Ok(load_modules().into_iter().chain(loopback_up()).collect())
}

/// The initramfs holds only what it takes to reach the root file system, in order of its names.
fn load_initramfs_modules() -> Result<()> {
    let mut paths: Vec<PathBuf> = fs::read_dir("/modules")
        .context("reading /modules of the initramfs")?
        .filter_map(|entry| entry.ok().map(|e| e.path()))
        .collect();
    paths.sort();
    for path in paths {
        let compressed = path.extension().is_some_and(|e| e != "ko");
        let flags = if compressed { MODULE_INIT_COMPRESSED_FILE } else { 0 };
        let file = File::open(&path)?;
        rustix::system::finit_module(&file, c"", flags)
            .with_context(|| format!("loading {}", path.display()))?;
    }
    Ok(())
}

/// The virtio disk with this serial number.
fn disk(serial: &str) -> Result<PathBuf> {
    let give_up = Instant::now() + Duration::from_secs(20);
    while Instant::now() < give_up {
        for entry in fs::read_dir("/sys/block")?.flatten() {
            if fs::read_to_string(entry.path().join("serial")).is_ok_and(|s| s.trim() == serial) {
                return Ok(Path::new("/dev").join(entry.file_name()));
            }
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    bail!("no disk with the serial number `{serial}` appeared")
}

fn switch_root() -> Result<()> {
    for at in ["/dev", "/proc", "/sys"] {
        let to = format!("{NEW_ROOT}{at}");
        rustix::mount::mount_move(at, &to).with_context(|| format!("moving {at} to {to}"))?;
    }
    std::env::set_current_dir(NEW_ROOT)?;
    rustix::mount::mount_move(".", "/").context("moving the root file system to /")?;
    rustix::process::chroot(".").context("entering the root file system")?;
    std::env::set_current_dir("/")?;
    Ok(())
}

fn mount_the_rest() -> Result<()> {
    mount("tmpfs", "tmpfs", "/run", MountFlags::empty(), c"mode=0755")?;
    mount("tmpfs", "tmpfs", "/tmp", MountFlags::empty(), c"mode=1777")?;
    mount("tmpfs", "tmpfs", "/dev/shm", MountFlags::empty(), c"mode=1777")?;
    mount("devpts", "devpts", "/dev/pts", MountFlags::empty(), c"mode=0620,ptmxmode=0666")?;
    mount("cgroup2", "cgroup2", "/sys/fs/cgroup", MountFlags::empty(), c"")?;
    let controllers = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers")?;
    let enable: Vec<String> = controllers.split_whitespace().map(|c| format!("+{c}")).collect();
    fs::write("/sys/fs/cgroup/cgroup.subtree_control", enable.join(" "))
        .context("enabling the cgroup controllers")?;
    mount(disk(FILES_SERIAL)?, "ext4", FILES_DIRECTORY, MountFlags::RDONLY, c"")?;
    fs::create_dir_all(COLLECT_DIRECTORY)?;
    // A guest's memory is reserved whole and touched little.
    fs::write("/proc/sys/vm/overcommit_memory", "1")?;
    rustix::system::sethostname(b"testbed")?;
    Ok(())
}

fn load_modules() -> Vec<String> {
    let missing = |module: &&&str| {
        !Command::new("/usr/sbin/modprobe")
            .arg(module)
            .status()
            .is_ok_and(|status| status.success())
    };
    KVM_MODULES
        .iter()
        .chain(&MODULES)
        .filter(missing)
        .map(|module| format!("the module {module} cannot be loaded"))
        .collect()
}

fn loopback_up() -> Option<String> {
    let up = Command::new("/usr/sbin/ip").args(["link", "set", "lo", "up"]).status();
    (!up.is_ok_and(|status| status.success())).then(|| "lo does not come up".to_owned())
}

fn mount(
    what: impl AsRef<Path>,
    kind: &str,
    at: &str,
    flags: MountFlags,
    options: &CStr,
) -> Result<()> {
    fs::create_dir_all(at).with_context(|| format!("making {at}"))?;
    rustix::mount::mount(what.as_ref(), at, kind, flags, options)
        .with_context(|| format!("mounting {} ({kind}) on {at}", what.as_ref().display()))
}
