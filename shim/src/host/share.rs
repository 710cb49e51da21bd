// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The directory that a sandbox shares with its guest.
//!
//! ```text
//! /run/kata-containers/shared/sandboxes/<sid>/
//!     mounts/     what the guest shall see: <cid>/rootfs, and <cid>/<number>-<name> for each volume
//!     shared/     what virtiofsd exports: a read-only bind of mounts/ that receives its new mounts, and gives none back
//!     private/    where a mount is made read-only before it appears in mounts/
//! ```
//!
//! A mount that appears below `mounts/` propagates into `shared/`, and from there into virtiofsd's own mount namespace.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::host::mount::{self, Flags, Propagation};

/// Where all sandboxes' shared directories are.
pub const ROOT: &str = "/run/kata-containers/shared/sandboxes";

/// Where the guest mounts the share.
pub const GUEST: &str = "/run/kata-containers/shared/containers";

/// Below it, the guest keeps copies of volumes whose changes it watches.
pub const WATCHABLE: &str = "watchable";

/// The mount tag that runtime and agent agree on.
pub const TAG: &str = "kataShared";

const RECURSIVE: Flags = Flags { read_only: false, recursive: true, propagation: None };

/// A sandbox's shared directory. Blocking.
#[derive(Debug)]
pub struct Share {
    base: PathBuf,
}

impl Share {
    /// Make the directory of sandbox `id`.
    ///
    /// # Errors
    /// A directory or mount cannot be made; nothing is left then.
    pub fn create(id: &str) -> Result<Self> {
        let share = Self { base: Path::new(ROOT).join(id) };
        share.set_up().inspect_err(|_| {
            let _ = share.remove();
        })?;
        Ok(share)
    }

    /// The directory of a sandbox that an earlier process made.
    pub fn existing(id: &str) -> Self {
        Self { base: Path::new(ROOT).join(id) }
    }

    fn set_up(&self) -> Result<()> {
        let make = |path: &Path, mode| {
            let made = fs::DirBuilder::new().recursive(true).mode(mode).create(path);
            made.with_context(|| format!("create {}", path.display()))
        };
        make(&self.base, 0o700)?;
        make(&self.mounts(), 0o750)?;
        // The guest cannot make a directory here; its agent mounts a tmpfs on this one.
        make(&self.mounts().join(WATCHABLE), 0o750)?;
        make(&self.exported(), 0o700)?;
        make(&self.private(), 0o700)?;
        // Its own mount, so that propagation begins here and does not depend on how the host's root is mounted.
        let flags = Flags { propagation: Some(Propagation::Shared), ..Flags::default() };
        mount::bind(&self.mounts(), &self.mounts(), flags)?;
        let flags =
            Flags { read_only: true, propagation: Some(Propagation::Slave), ..Flags::default() };
        mount::bind(&self.mounts(), &self.exported(), flags)
    }

    fn mounts(&self) -> PathBuf {
        self.base.join("mounts")
    }

    fn private(&self) -> PathBuf {
        self.base.join("private")
    }

    /// What virtiofsd exports.
    pub fn exported(&self) -> PathBuf {
        self.base.join("shared")
    }

    /// Show the directory `source` to the guest as the root file system of container `id`. Returns its guest path.
    ///
    /// # Errors
    /// The source is no directory, or the mount fails.
    pub fn add_rootfs(&self, id: &str, source: &Path) -> Result<String> {
        if !source.is_dir() {
            bail!("the root file system of container {id}, {}, is no directory", source.display());
        }
        mount::bind(source, &self.mounts().join(id).join("rootfs"), RECURSIVE)?;
        Ok(format!("{GUEST}/{id}/rootfs"))
    }

    /// Show the file or directory `source` to the guest, under a name below the container's id. Returns its guest path.
    ///
    /// # Errors
    /// The source is gone, or the mount fails.
    pub fn add_volume(&self, name: &str, source: &Path, read_only: bool) -> Result<String> {
        let target = self.mounts().join(name);
        if !read_only {
            mount::bind(source, &target, RECURSIVE)?;
            return Ok(format!("{GUEST}/{name}"));
        }
        // A bind is not read-only at birth, and what it becomes later does not propagate. So it is made elsewhere, and
        // only its read-only copy appears where the guest sees it.
        let hidden = self.private().join(name);
        mount::bind(source, &hidden, Flags { read_only: true, ..RECURSIVE })?;
        let shown = mount::bind(&hidden, &target, Flags { read_only: true, ..RECURSIVE });
        mount::unmount(&hidden)?;
        remove_target(&hidden)?;
        shown.map(|()| format!("{GUEST}/{name}"))
    }

    /// Show each of these files and directories of the host to the guest, read-only, below `sandbox-mounts`, by the last
    /// part of its path.
    ///
    /// # Errors
    /// One is gone or has no name, or a mount fails.
    pub fn add_sandbox_mounts(&self, sources: &[PathBuf]) -> Result<()> {
        for source in sources {
            let name = source.file_name().and_then(|name| name.to_str());
            let name = name.with_context(|| format!("{} has no name", source.display()))?;
            self.add_volume(&format!("sandbox-mounts/{name}"), source, true)?;
        }
        Ok(())
    }

    /// Take away everything that container `id` was shown. What is not there is no error.
    ///
    /// # Errors
    /// Something is left.
    pub fn remove_container(&self, id: &str) -> Result<()> {
        remove_tree(&self.mounts().join(id))?;
        remove_tree(&self.private().join(id))
    }

    /// Take everything away. What is not there is no error.
    ///
    /// # Errors
    /// Something is left.
    pub fn remove(&self) -> Result<()> {
        remove_tree(&self.base)
    }
}

/// Remove a mount's target after the mount.
fn remove_target(path: &Path) -> Result<()> {
    let removed = if path.is_dir() { fs::remove_dir(path) } else { fs::remove_file(path) };
    removed.with_context(|| format!("remove {}", path.display()))
}

/// Unmount everything at or below `path`, and remove what was made for mounts. Nothing is removed while a mount is left:
/// a container's files would go with it.
fn remove_tree(path: &Path) -> Result<()> {
    mount::unmount_below(path)?;
    let removed = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed.with_context(|| format!("remove {}", path.display())),
    }
}
