// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Paths below a container's root, for code that is still outside of it: links in the image, absolute ones too, never
//! lead out (openat2(2), `RESOLVE_IN_ROOT`).

use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat, openat2, readlinkat};
use nix::sys::stat::{Mode, mkdirat};

/// How often a resolution is tried again that a rename elsewhere has disturbed.
const ATTEMPTS: usize = 32;
/// How many links to nothing are followed.
const MAX_LINKS: usize = 16;

/// What to make where nothing is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Make {
    Directory,
    File,
}

/// The root directory of a container to be.
pub struct Root {
    fd: OwnedFd,
}

impl Root {
    pub fn open(path: &Path) -> Result<Self> {
        let fd = open(path, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
            .with_context(|| format!("open the root file system {}", path.display()))?;
        Ok(Root { fd })
    }

    /// The root's own path for calls that take one.
    pub fn path(&self) -> PathBuf {
        fd_path(&self.fd)
    }

    /// Open `path` with `flags`; links are followed inside the root.
    pub fn open_with(&self, path: &Path, flags: OFlag) -> nix::Result<OwnedFd> {
        let how = OpenHow::new()
            .flags(flags | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        let relative = normal(path);
        let mut outcome = Err(Errno::EAGAIN);
        for _ in 0..ATTEMPTS {
            outcome = openat2(&self.fd, &relative, how);
            if !matches!(outcome, Err(Errno::EAGAIN)) {
                break;
            }
        }
        outcome
    }

    /// A handle of what is at `path`, for [`fd_path`].
    pub fn look(&self, path: &Path) -> nix::Result<OwnedFd> {
        self.open_with(path, OFlag::O_PATH)
    }

    /// As [`look`](Self::look); what does not exist is made first, with its parents. Images have links to what does
    /// not exist either: then that is made.
    pub fn make(&self, path: &Path, make: Make) -> Result<OwnedFd> {
        self.make_following(path, make, MAX_LINKS)
    }

    fn make_following(&self, path: &Path, make: Make, links: usize) -> Result<OwnedFd> {
        let path = normal(path);
        match self.look(&path) {
            Err(Errno::ENOENT) => {}
            outcome => return outcome.with_context(|| format!("open {path:?} in the container")),
        }
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            bail!("the container's root has vanished");
        };
        let directory = self.make_following(parent, Make::Directory, links)?;
        let made = match make {
            Make::Directory => mkdirat(&directory, name, Mode::from_bits_truncate(0o755)),
            Make::File => {
                let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC | OFlag::O_WRONLY;
                openat(&directory, name, flags, Mode::from_bits_truncate(0o644)).map(drop)
            }
        };
        match (made, links.checked_sub(1)) {
            (Err(Errno::EEXIST), Some(links)) => {
                let link = readlinkat(&directory, name)
                    .with_context(|| format!("follow {path:?} in the container"))?;
                // An absolute one starts from the root again.
                self.make_following(&parent.join(link), make, links)
            }
            (made, _) => {
                made.with_context(|| format!("make {path:?} in the container"))?;
                self.look(&path).with_context(|| format!("open {path:?} in the container"))
            }
        }
    }
}

/// A path by which the kernel finds what `fd` stands for. Mounts that were made over it since are not seen.
pub fn fd_path(fd: impl AsFd) -> PathBuf {
    format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd()).into()
}

/// `path` without `.`, `..` and leading slash, read from the root; `.` for the root itself.
pub fn normal(path: &Path) -> PathBuf {
    let mut clean = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => clean.push(name),
            Component::ParentDir => drop(clean.pop()),
            _ => {}
        }
    }
    if clean.as_os_str().is_empty() { ".".into() } else { clean }
}

/// Write to a file of `/proc`, which takes a value whole or not at all.
pub fn write(path: &str, value: &str) -> Result<()> {
    fs::write(path, value).with_context(|| format!("write {value:?} to {path}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_stay_inside() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::open(dir.path()).unwrap();
        std::os::unix::fs::symlink("/outside", dir.path().join("link")).unwrap();
        std::os::unix::fs::symlink("../../../other", dir.path().join("up")).unwrap();
        assert_eq!(root.look(Path::new("/link/x")).unwrap_err(), Errno::ENOENT);
        root.make(Path::new("/link/deep/er"), Make::Directory).unwrap();
        root.make(Path::new("/a/../b/./file"), Make::File).unwrap();
        assert!(dir.path().join("outside/deep/er").is_dir());
        assert!(dir.path().join("b/file").is_file());
        assert!(!dir.path().join("a").exists());
        root.make(Path::new("/up/x"), Make::File).unwrap();
        assert!(dir.path().join("other/x").exists() && dir.path().join("up").is_symlink());
        std::os::unix::fs::symlink("loop", dir.path().join("loop")).unwrap();
        assert!(root.make(Path::new("/loop/x"), Make::File).is_err());
        assert!(root.make(Path::new("/b/file/x"), Make::File).is_err());
    }

    #[test]
    fn paths_are_read_from_the_root() {
        for (path, expected) in [("/", "."), ("", "."), ("/../..", "."), ("/a//b/../c/", "a/c")] {
            assert_eq!(normal(Path::new(path)), Path::new(expected), "{path}");
        }
    }
}
