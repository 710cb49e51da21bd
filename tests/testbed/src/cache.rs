// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Things that are dear to build, kept outside the checkout under a key made from what went into them.
//!
//! An entry is a directory that appears whole or not at all: it is built under a temporary name and renamed.
//! Builders of one entry wait for each other at a lock file. Nothing here removes entries; they are safe to delete
//! while nobody uses them.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::interrupt::{Guard, Undo};

/// `$ECR_CACHE`, or `ecr` below `$XDG_CACHE_HOME`, or `~/.cache/ecr`.
///
/// # Errors
/// None of the three variables is set.
pub fn root() -> Result<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    variable("ECR_CACHE")
        .or_else(|| variable("XDG_CACHE_HOME").map(|dir| dir.join("ecr")))
        .or_else(|| variable("HOME").map(|dir| dir.join(".cache/ecr")))
        .context("no place for the cache: set ECR_CACHE, XDG_CACHE_HOME or HOME")
}

/// A short name for `content` (FNV-1a, 64 bits): equal content, equal name, on every machine and toolchain.
#[must_use]
pub fn key(content: &str) -> String {
    let hash = content.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    format!("{hash:016x}")
}

/// The directory `name` below `parent`, which `build` fills if it is not there yet.
///
/// # Errors
/// The cache cannot be written, or `build` failed; then nothing is left behind.
pub fn entry(
    parent: &Path,
    name: &str,
    build: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    let path = parent.join(name);
    if path.is_dir() {
        return Ok(path);
    }
    fs::create_dir_all(parent).with_context(|| format!("making {}", parent.display()))?;
    let lock_path = parent.join(format!(".{name}.lock"));
    let lock =
        File::create(&lock_path).with_context(|| format!("creating {}", lock_path.display()))?;
    lock.lock().with_context(|| format!("locking {}", lock_path.display()))?;
    if path.is_dir() {
        return Ok(path); // Somebody else built it while we waited.
    }
    let building = tempfile::Builder::new().prefix(".building-").tempdir_in(parent)?;
    let _removed = Guard::new(Undo::Directory(building.path().to_owned()));
    build(building.path())?;
    let built = building.keep();
    fs::rename(&built, &path)
        .with_context(|| format!("moving {} to its place {}", built.display(), path.display()))?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn keys_are_stable() {
        // Published values of FNV-1a.
        assert_eq!(key(""), "cbf29ce484222325");
        assert_eq!(key("foobar"), "85944171f73967e8");
    }

    #[test]
    fn an_entry_is_built_once_by_many() {
        let parent = tempfile::tempdir().unwrap();
        let builds = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let path = entry(parent.path(), "thing", |dir| {
                        builds.fetch_add(1, Ordering::Relaxed);
                        std::thread::sleep(std::time::Duration::from_millis(20));
                        Ok(fs::write(dir.join("content"), "x")?)
                    });
                    assert_eq!(fs::read_to_string(path.unwrap().join("content")).unwrap(), "x");
                });
            }
        });
        assert_eq!(builds.into_inner(), 1);
    }

    #[test]
    fn a_failed_build_leaves_nothing_and_can_be_repeated() {
        let parent = tempfile::tempdir().unwrap();
        entry(parent.path(), "thing", |dir| {
            fs::write(dir.join("half"), "x")?;
            anyhow::bail!("no")
        })
        .unwrap_err();
        let left: Vec<_> = fs::read_dir(parent.path()).unwrap().flatten().collect();
        assert!(left.iter().all(|e| e.file_name() == ".thing.lock"), "{left:?}");
        let path = entry(parent.path(), "thing", |_| Ok(())).unwrap();
        assert!(!path.join("half").exists());
    }
}
