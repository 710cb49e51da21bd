// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Device nodes of a container (config-linux.md, "Devices" and "Default Devices").
//!
//! Which nodes exist is all that is enforced; the virtual machine has no device that is not its pod's.

use std::os::unix::fs::symlink;
use std::path::Path;

use anyhow::{Context, Result, bail};
use ecr_agent_protocol::oci::LinuxDevice;
use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::sys::stat::{FchmodatFlags, Mode, SFlag, fchmodat, fstatat, makedev, mknodat};
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchownat, unlinkat};

use super::root::{Make, Root, fd_path, normal};

/// Devices that every container has: name in `/dev`, major and minor number.
const DEFAULT: [(&str, u64, u64); 6] = [
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("tty", 5, 0),
];

const LINKS: [(&str, &str); 5] = [
    ("/proc/self/fd", "fd"),
    ("/proc/self/fd/0", "stdin"),
    ("/proc/self/fd/1", "stdout"),
    ("/proc/self/fd/2", "stderr"),
    ("pts/ptmx", "ptmx"),
];

/// Make the default devices and links in `/dev`.
pub fn make_default(root: &Root) -> Result<()> {
    for (name, major, minor) in DEFAULT {
        let node = Node {
            kind: SFlag::S_IFCHR,
            number: makedev(major, minor),
            mode: Mode::from_bits_truncate(0o666),
            owner: (Uid::from_raw(0), Gid::from_raw(0)),
        };
        node.make(root, &Path::new("/dev").join(name))?;
    }
    let dev = root.make(Path::new("/dev"), Make::Directory)?;
    for (to, name) in LINKS {
        // The image may have its own; only ptmx must be that of this container's terminals.
        if name == "ptmx" {
            let _ = unlinkat(&dev, name, UnlinkatFlags::NoRemoveDir);
        }
        match symlink(to, fd_path(&dev).join(name)) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(error).with_context(|| format!("link /dev/{name} to {to}"));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Make one device of the specification.
pub fn make(root: &Root, device: &LinuxDevice) -> Result<()> {
    let kind = match device.type_.as_str() {
        "c" | "u" => SFlag::S_IFCHR,
        "b" => SFlag::S_IFBLK,
        "p" => SFlag::S_IFIFO,
        other => bail!("device {:?} has type {other:?}; known are c, u, b, p", device.path),
    };
    let (Ok(major), Ok(minor)) = (u64::try_from(device.major), u64::try_from(device.minor)) else {
        bail!("device {:?} has number {}:{}", device.path, device.major, device.minor);
    };
    let node = Node {
        kind,
        number: if kind == SFlag::S_IFIFO { 0 } else { makedev(major, minor) },
        // The message has no "unset": nobody wants a device that nobody may open.
        mode: Mode::from_bits_truncate(if device.file_mode == 0 {
            0o666
        } else {
            device.file_mode
        }),
        owner: (Uid::from_raw(device.uid), Gid::from_raw(device.gid)),
    };
    node.make(root, Path::new(&device.path))
}

struct Node {
    kind: SFlag,
    number: u64,
    mode: Mode,
    owner: (Uid, Gid),
}

impl Node {
    fn make(&self, root: &Root, path: &Path) -> Result<()> {
        let path = normal(path);
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            bail!("{path:?} is no place for a device");
        };
        let directory = root.make(parent, Make::Directory)?;
        match mknodat(&directory, name, self.kind, self.mode, self.number) {
            // A root that was used before.
            Err(Errno::EEXIST) => {
                let present = fstatat(&directory, name, AtFlags::AT_SYMLINK_NOFOLLOW)
                    .with_context(|| format!("look at {path:?} in the container"))?;
                let same = SFlag::from_bits_truncate(present.st_mode) & SFlag::S_IFMT == self.kind
                    && present.st_rdev == self.number;
                if !same {
                    unlinkat(&directory, name, UnlinkatFlags::NoRemoveDir)
                        .and_then(|()| mknodat(&directory, name, self.kind, self.mode, self.number))
                        .with_context(|| format!("replace {path:?} in the container"))?;
                }
            }
            outcome => outcome.with_context(|| format!("make device {path:?} in the container"))?,
        }
        let (uid, gid) = self.owner;
        fchmodat(&directory, name, self.mode, FchmodatFlags::FollowSymlink)
            .and_then(|()| {
                let flags = AtFlags::AT_SYMLINK_NOFOLLOW;
                fchownat(&directory, name, Some(uid), Some(gid), flags)
            })
            .with_context(|| format!("set mode and owner of {path:?} in the container"))
    }
}
