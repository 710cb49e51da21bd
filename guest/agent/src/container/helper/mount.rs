// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Mount options of the OCI runtime specification (config.md, "Mounts"; config-linux.md, mount(8)) in the kernel's
//! terms, and the calls that apply them.

use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};

/// Option, flag, and whether the flag is taken away.
#[rustfmt::skip] // A table.
const FLAGS: [(&str, MsFlags, bool); 35] = [
    ("defaults",      MsFlags::empty(),         false),
    ("ro",            MsFlags::MS_RDONLY,       false), ("rw",         MsFlags::MS_RDONLY,      true),
    ("nosuid",        MsFlags::MS_NOSUID,       false), ("suid",       MsFlags::MS_NOSUID,      true),
    ("nodev",         MsFlags::MS_NODEV,        false), ("dev",        MsFlags::MS_NODEV,       true),
    ("noexec",        MsFlags::MS_NOEXEC,       false), ("exec",       MsFlags::MS_NOEXEC,      true),
    ("sync",          MsFlags::MS_SYNCHRONOUS,  false), ("async",      MsFlags::MS_SYNCHRONOUS, true),
    ("dirsync",       MsFlags::MS_DIRSYNC,      false), ("remount",    MsFlags::MS_REMOUNT,     false),
    ("mand",          MsFlags::MS_MANDLOCK,     false), ("nomand",     MsFlags::MS_MANDLOCK,    true),
    ("noatime",       MsFlags::MS_NOATIME,      false), ("atime",      MsFlags::MS_NOATIME,     true),
    ("nodiratime",    MsFlags::MS_NODIRATIME,   false), ("diratime",   MsFlags::MS_NODIRATIME,  true),
    ("relatime",      MsFlags::MS_RELATIME,     false), ("norelatime", MsFlags::MS_RELATIME,    true),
    ("strictatime",   MsFlags::MS_STRICTATIME,  false), ("nostrictatime", MsFlags::MS_STRICTATIME, true),
    ("lazytime",      MsFlags::MS_LAZYTIME,     false), ("nolazytime", MsFlags::MS_LAZYTIME,    true),
    ("iversion",      MsFlags::MS_I_VERSION,    false), ("noiversion", MsFlags::MS_I_VERSION,   true),
    ("silent",        MsFlags::MS_SILENT,       false), ("loud",       MsFlags::MS_SILENT,      true),
    ("acl",           MsFlags::MS_POSIXACL,     false), ("noacl",      MsFlags::MS_POSIXACL,    true),
    ("bind",          MsFlags::MS_BIND,         false),
    ("rbind",         MsFlags::MS_BIND.union(MsFlags::MS_REC), false),
    ("nosymfollow",   NOSYMFOLLOW,              false), ("symfollow",  NOSYMFOLLOW,             true),
];

const NOSYMFOLLOW: MsFlags = MsFlags::from_bits_retain(256);
const REC: MsFlags = MsFlags::MS_REC;

/// How mounts below spread.
#[rustfmt::skip] // A table.
const PROPAGATION: [(&str, MsFlags); 8] = [
    ("private",    MsFlags::MS_PRIVATE),    ("rprivate",    MsFlags::MS_PRIVATE.union(REC)),
    ("shared",     MsFlags::MS_SHARED),     ("rshared",     MsFlags::MS_SHARED.union(REC)),
    ("slave",      MsFlags::MS_SLAVE),      ("rslave",      MsFlags::MS_SLAVE.union(REC)),
    ("unbindable", MsFlags::MS_UNBINDABLE), ("runbindable", MsFlags::MS_UNBINDABLE.union(REC)),
];

/// Attributes that hold for a whole tree (mount_setattr(2)): what is set, what is cleared.
#[rustfmt::skip] // A table.
const RECURSIVE: [(&str, u64, u64); 14] = [
    ("rro",          libc::MOUNT_ATTR_RDONLY, 0),     ("rrw",           0, libc::MOUNT_ATTR_RDONLY),
    ("rnosuid",      libc::MOUNT_ATTR_NOSUID, 0),     ("rsuid",         0, libc::MOUNT_ATTR_NOSUID),
    ("rnodev",       libc::MOUNT_ATTR_NODEV, 0),      ("rdev",          0, libc::MOUNT_ATTR_NODEV),
    ("rnoexec",      libc::MOUNT_ATTR_NOEXEC, 0),     ("rexec",         0, libc::MOUNT_ATTR_NOEXEC),
    ("rnodiratime",  libc::MOUNT_ATTR_NODIRATIME, 0), ("rdiratime",     0, libc::MOUNT_ATTR_NODIRATIME),
    ("rnosymfollow", libc::MOUNT_ATTR_NOSYMFOLLOW, 0), ("rsymfollow",   0, libc::MOUNT_ATTR_NOSYMFOLLOW),
    ("rrelatime",    libc::MOUNT_ATTR_RELATIME, libc::MOUNT_ATTR__ATIME),
    ("rnoatime",     libc::MOUNT_ATTR_NOATIME, libc::MOUNT_ATTR__ATIME),
];

/// Options of one mount, sorted.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Options {
    pub flags: Flags,
    propagation: Vec<MsFlags>,
    set: u64,
    clear: u64,
    /// What only the file system understands.
    pub data: Vec<String>,
}

/// `MsFlags` with a default.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flags(pub MsFlags);

impl Default for Flags {
    fn default() -> Self {
        Flags(MsFlags::empty())
    }
}

impl Options {
    pub fn parse(options: &[String]) -> Self {
        let mut parsed = Options::default();
        for option in options {
            let option = option.as_str();
            if let Some((_, flag, clear)) = FLAGS.iter().find(|(name, ..)| *name == option) {
                parsed.flags.0.set(*flag, !clear);
            } else if let Some(flag) = propagation(option) {
                parsed.propagation.push(flag);
            } else if let Some((_, set, clear)) =
                RECURSIVE.iter().find(|(name, ..)| *name == option)
            {
                parsed.set |= set;
                parsed.clear |= clear;
            } else if !option.is_empty() {
                parsed.data.push(option.into());
            }
        }
        parsed
    }

    pub fn is_bind(&self) -> bool {
        self.flags.0.contains(MsFlags::MS_BIND)
    }

    /// Mount a file system of type `kind`.
    pub fn mount(&self, source: &str, kind: &str, target: &Path) -> nix::Result<()> {
        let data = self.data.join(",");
        let data = (!data.is_empty()).then_some(data.as_str());
        mount(Some(source), target, Some(kind), self.flags.0, data)
    }

    /// Show `source` at `target` too. The other flags come with [`restrict`](Self::restrict).
    pub fn bind(&self, source: &Path, target: &Path) -> nix::Result<()> {
        let flags = self.flags.0 & (MsFlags::MS_BIND | MsFlags::MS_REC);
        mount(Some(source), target, None::<&str>, flags | MsFlags::MS_BIND, None::<&str>)
    }

    /// What can be said only of a mount that is there; `target` is a handle of it.
    pub fn restrict(&self, target: impl AsFd) -> Result<()> {
        let path = super::root::fd_path(&target);
        let flags = self.flags.0 - MsFlags::MS_BIND - MsFlags::MS_REC;
        if self.is_bind() && !flags.is_empty() {
            let flags = flags | MsFlags::MS_REMOUNT | MsFlags::MS_BIND;
            mount(None::<&str>, &path, None::<&str>, flags, None::<&str>)
                .context("set the flags of the bind mount")?;
        }
        if self.set | self.clear != 0 {
            set_attributes(&target, self.set, self.clear)
                .context("set the attributes of the mounts below")?;
        }
        for &flag in &self.propagation {
            mount(None::<&str>, &path, None::<&str>, flag, None::<&str>)
                .context("set the propagation")?;
        }
        Ok(())
    }
}

/// The flags of a propagation by name.
pub fn propagation(name: &str) -> Option<MsFlags> {
    PROPAGATION.iter().find(|(known, _)| *known == name).map(|&(_, flag)| flag)
}

/// Mount options for the root file system: its propagation.
pub fn root_propagation(name: &str) -> Result<Option<MsFlags>> {
    match name {
        "" => Ok(None),
        name => match propagation(name) {
            Some(flag) => Ok(Some(flag | MsFlags::MS_REC)),
            None => bail!("rootfsPropagation {name:?} is not known"),
        },
    }
}

fn set_attributes(target: impl AsFd, set: u64, clear: u64) -> nix::Result<()> {
    // `struct mount_attr` (linux/mount.h): attr_set, attr_clr, propagation, userns_fd.
    let attributes: [u64; 4] = [set, clear, 0, 0];
    // SAFETY: the structure is four words long, as the last argument says, and is only read.
    let outcome = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            target.as_fd().as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | libc::AT_RECURSIVE,
            attributes.as_ptr(),
            size_of_val(&attributes),
        )
    };
    Errno::result(outcome).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(options: &[&str]) -> Options {
        Options::parse(&options.iter().map(ToString::to_string).collect::<Vec<_>>())
    }

    #[test]
    fn options_are_sorted() {
        let options =
            parse(&["nosuid", "noexec", "exec", "ro", "mode=755", "size=64k", "rprivate"]);
        assert_eq!(options.flags.0, MsFlags::MS_NOSUID | MsFlags::MS_RDONLY);
        assert_eq!(options.data, ["mode=755", "size=64k"]);
        assert_eq!(options.propagation, [MsFlags::MS_PRIVATE | MsFlags::MS_REC]);
        assert!(!options.is_bind());
        let options = parse(&["rbind", "rro", ""]);
        assert!(options.is_bind() && options.flags.0.contains(MsFlags::MS_REC));
        assert_eq!((options.set, options.clear), (libc::MOUNT_ATTR_RDONLY, 0));
        assert!(options.data.is_empty());
    }

    #[test]
    fn names_of_root_propagations() {
        assert_eq!(root_propagation("").unwrap(), None);
        let slave = Some(MsFlags::MS_SLAVE | MsFlags::MS_REC);
        assert_eq!(root_propagation("rslave").unwrap(), slave);
        assert!(root_propagation("sideways").is_err());
    }
}
