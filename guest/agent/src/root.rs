// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! From the initial RAM disk to the root file system, for kernels whose disk drivers are modules: wait for the device,
//! mount it, free the RAM disk, and go on with the init that lives there.
//!
//! A guest that lives on its initial RAM disk stays there, but leaves the mount that the kernel made: nothing can take
//! that one's place (pivot_root(2)), which is how a container gets its own root.

use std::convert::Infallible;
use std::ffi::CString;
use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::mount::{MsFlags, mount};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::statfs::{FsType, TMPFS_MAGIC, statfs};
use nix::unistd::{chdir, chroot, execv};

use crate::options::Root;

/// linux/magic.h; the kernel takes ramfs rather than tmpfs for its RAM disk when `root=` is given.
const RAMFS_MAGIC: FsType = FsType(0x8584_58f6);
/// Drivers find their devices after their modules are loaded.
const DEVICE_LIMIT: Duration = Duration::from_secs(10);
const NEW_ROOT: &str = "/sysroot";
/// What the new root keeps of the old one.
const CARRIED_OVER: [&str; 4] = ["/dev", "/proc", "/sys", "/run"];

/// Whether `/` is the kernel's initial RAM disk.
pub fn on_initial_ram_disk() -> Result<bool> {
    let kind = statfs("/").context("look at the root file system")?.filesystem_type();
    Ok(kind == TMPFS_MAGIC || kind == RAMFS_MAGIC)
}

/// Make `root` the root and run its init. Returns only with an error.
pub fn switch(root: &Root) -> Result<Infallible> {
    wait_for(Path::new(&root.device))?;
    mount_new(root)?;
    carry_over(&CARRIED_OVER)?;
    free_ram_disk();
    enter_new_root()?;
    let init = CString::new(root.init.as_str()).context("init=")?;
    execv(&init, &[&init]).with_context(|| format!("run {} of {}", root.init, root.device))
}

/// Go on with the initial RAM disk as root, by another mount of it.
pub fn stay() -> Result<()> {
    fs::create_dir_all(NEW_ROOT).with_context(|| format!("create {NEW_ROOT}"))?;
    mount(Some("/"), NEW_ROOT, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .context("mount the initial RAM disk once more")?;
    carry_over(&CARRIED_OVER)?;
    carry_over(&["/tmp"])?;
    enter_new_root()?;
    // Nothing is mounted there any more, and nobody needs it.
    let _ = fs::remove_dir(NEW_ROOT);
    Ok(())
}

fn carry_over(paths: &[&str]) -> Result<()> {
    for path in paths {
        let target = format!("{NEW_ROOT}{path}");
        mount(Some(*path), target.as_str(), None::<&str>, MsFlags::MS_MOVE, None::<&str>)
            .with_context(|| format!("move {path} to the new root"))?;
    }
    Ok(())
}

fn enter_new_root() -> Result<()> {
    chdir(NEW_ROOT).context("enter the new root")?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)
        .and_then(|()| chroot("."))
        .and_then(|()| chdir("/"))
        .context("make it the root")
}

/// Wait for the device node, without polling: its directory is watched.
fn wait_for(device: &Path) -> Result<()> {
    let Some(directory) = device.parent().filter(|_| device.starts_with("/dev")) else {
        bail!("root={}: only a device node is understood, such as /dev/vda1", device.display());
    };
    let watch = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)
        .and_then(|watch| watch.add_watch(directory, AddWatchFlags::IN_CREATE).map(|_| watch))
        .with_context(|| format!("watch {}", directory.display()))?;
    let deadline = Instant::now() + DEVICE_LIMIT;
    while !device.exists() {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            bail!("root={}: no such device after {} s", device.display(), DEVICE_LIMIT.as_secs());
        }
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        poll(&mut [PollFd::new(watch.as_fd(), PollFlags::POLLIN)], timeout)
            .context("wait for the root device")?;
        // What was created does not matter: the loop looks again. Nothing to read after a time-out.
        let _ = watch.read_events();
    }
    Ok(())
}

fn mount_new(root: &Root) -> Result<()> {
    fs::create_dir_all(NEW_ROOT).with_context(|| format!("create {NEW_ROOT}"))?;
    let flags = if root.read_only { MsFlags::MS_RDONLY } else { MsFlags::empty() };
    mount(
        Some(root.device.as_str()),
        NEW_ROOT,
        Some(root.fstype.as_str()),
        flags,
        Some(root.flags.as_str()),
    )
    .with_context(|| format!("mount {} ({}, {:?})", root.device, root.fstype, root.flags))
}

/// Delete the initial RAM disk's files: nobody can reach them any more, and they are memory. This process goes on
/// running from its deleted file.
fn free_ram_disk() {
    if let Ok(root) = fs::metadata("/") {
        delete_below(Path::new("/"), root.dev());
    }
}

/// Delete what is below `directory` on the file system `device`; mounted file systems stay untouched.
pub fn delete_below(directory: &Path, device: u64) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    for entry in entries.flatten() {
        // Not followed: a symbolic link is deleted, not what it points to.
        let Ok(metadata) = entry.metadata() else { continue };
        if metadata.dev() != device {
            continue;
        }
        let path = entry.path();
        // Whatever stays costs memory and nothing else.
        let _ = if metadata.is_dir() {
            delete_below(&path, device);
            fs::remove_dir(&path)
        } else {
            fs::remove_file(&path)
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn links_are_deleted_and_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (inside, outside) = (dir.path().join("inside"), dir.path().join("outside"));
        fs::create_dir_all(inside.join("a/b")).unwrap();
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("kept"), "").unwrap();
        fs::write(inside.join("a/b/file"), "").unwrap();
        symlink(&outside, inside.join("a/link")).unwrap();
        delete_below(&inside, fs::metadata(&inside).unwrap().dev());
        assert_eq!(fs::read_dir(&inside).unwrap().count(), 0);
        assert!(outside.join("kept").exists());
    }

    #[test]
    fn other_file_systems_stay() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), "").unwrap();
        delete_below(dir.path(), fs::metadata(dir.path()).unwrap().dev() + 1);
        assert!(dir.path().join("file").exists());
    }

    #[test]
    fn a_root_that_is_no_device_node() {
        let error = wait_for(Path::new("UUID=1234")).unwrap_err().to_string();
        assert!(error.contains("UUID=1234"), "{error}");
    }
}
