// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The file systems that every Linux program expects, and their way down.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

struct System {
    kind: &'static str,
    target: &'static str,
    flags: MsFlags,
    data: &'static str,
}

const NOSUID: MsFlags = MsFlags::MS_NOSUID;
const NOSUID_NODEV: MsFlags = NOSUID.union(MsFlags::MS_NODEV);
const NOSUID_NOEXEC: MsFlags = NOSUID.union(MsFlags::MS_NOEXEC);
const NOSUID_NODEV_NOEXEC: MsFlags = NOSUID_NODEV.union(MsFlags::MS_NOEXEC);

/// In the order of mounting.
#[rustfmt::skip] // A table.
const SYSTEM: [System; 9] = [
    System { kind: "proc",     target: "/proc",          flags: NOSUID_NODEV_NOEXEC, data: "" },
    System { kind: "sysfs",    target: "/sys",           flags: NOSUID_NODEV_NOEXEC, data: "" },
    System { kind: "devtmpfs", target: "/dev",           flags: NOSUID,              data: "mode=0755" },
    System { kind: "devpts",   target: "/dev/pts",       flags: NOSUID_NOEXEC,       data: "gid=5,mode=0620,ptmxmode=0666" },
    System { kind: "tmpfs",    target: "/dev/shm",       flags: NOSUID_NODEV,        data: "mode=1777" },
    System { kind: "mqueue",   target: "/dev/mqueue",    flags: NOSUID_NODEV_NOEXEC, data: "" },
    System { kind: "tmpfs",    target: "/run",           flags: NOSUID_NODEV,        data: "mode=0755" },
    System { kind: "tmpfs",    target: "/tmp",           flags: NOSUID_NODEV,        data: "mode=1777" },
    System { kind: "cgroup2",  target: "/sys/fs/cgroup", flags: NOSUID_NODEV_NOEXEC, data: "nsdelegate" },
];

/// Names that programs expect in `/dev` and the kernel does not make.
const DEV_LINKS: [(&str, &str); 4] = [
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
];

/// Mount what is not mounted yet: the kernel, or the agent on the initial RAM disk, may have been there before.
pub fn mount_system() -> Result<()> {
    let mut present = mounted();
    for system in &SYSTEM {
        if present.iter().any(|path| path == system.target) {
            continue;
        }
        // On a read-only root this cannot be made, and the mount says so if it was needed.
        let _ = fs::create_dir_all(system.target);
        mount(Some(system.kind), system.target, Some(system.kind), system.flags, Some(system.data))
            .with_context(|| format!("mount {} on {}", system.kind, system.target))?;
        if system.kind == "proc" {
            present = mounted(); // It could not be read before.
        }
    }
    for (to, link) in DEV_LINKS {
        // There already after a change of root.
        let _ = symlink(to, link);
    }
    Ok(())
}

/// Take down every mount, the last one first, and leave the root read-only: what is written is on its disk then.
pub fn unmount_all() {
    for path in mounted().iter().rev() {
        let root = path == Path::new("/");
        let outcome = if root {
            let flags = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
            mount(None::<&str>, path, None::<&str>, flags, None::<&str>)
        } else {
            // A busy file system is written out all the same, and detached from here.
            umount2(path, MntFlags::empty()).or_else(|_| umount2(path, MntFlags::MNT_DETACH))
        };
        // The initial RAM disk cannot be remounted, and has nothing to lose.
        if let Err(error) = outcome
            && !(root && error == Errno::EINVAL)
        {
            log::debug!("unmount {}: {error}", path.display());
        }
    }
}

/// Whether something is mounted on `path`.
pub fn is_mount_point(path: &Path) -> bool {
    // Paths with and without a slash at the end are equal.
    mounted().iter().any(|mounted| mounted == path)
}

/// Detach everything that is mounted below `directory`, the last mount first.
pub fn detach_below(directory: &Path) {
    for path in mounted().iter().rev() {
        if path.starts_with(directory)
            && let Err(error) = umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)
        {
            log::warn!("detach {}: {error}", path.display());
        }
    }
}

/// The present mount points, in the order of mounting; none as long as `/proc` is not mounted.
pub fn mounted() -> Vec<PathBuf> {
    let table = fs::read("/proc/self/mountinfo").unwrap_or_default();
    table
        .split(|&byte| byte == b'\n')
        .filter_map(|line| line.split(|&byte| byte == b' ').nth(4))
        .map(|field| PathBuf::from(OsString::from_vec(unescape(field))))
        .collect()
}

/// proc(5) writes space, tab, newline and backslash as a backslash and three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        match (first, tail) {
            (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', after @ ..]) => {
                plain.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                rest = after;
            }
            _ => {
                plain.push(first);
                rest = tail;
            }
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_of_the_mount_table() {
        assert_eq!(unescape(br"/a\040b\134c"), br"/a b\c");
        assert_eq!(unescape(br"/a\"), br"/a\");
        assert_eq!(unescape(br"/a\9zz\04"), br"/a\9zz\04");
    }

    #[test]
    fn this_process_has_a_root() {
        assert!(mounted().iter().any(|path| path == Path::new("/")));
    }

    #[test]
    fn parents_are_mounted_before_their_children() {
        for (index, system) in SYSTEM.iter().enumerate() {
            let child_first = SYSTEM[index + 1..]
                .iter()
                .any(|later| Path::new(system.target).starts_with(later.target));
            assert!(!child_first, "{}", system.target);
        }
    }
}
