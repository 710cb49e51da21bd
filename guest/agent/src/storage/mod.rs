// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Storage objects: "make it appear at this mount point".
//!
//! The same mount point may be asked for again, by another container or by the same one when it starts anew: then it is
//! counted, and taken down with its last user. What the guest itself keeps (`ephemeral`, `local`) stays as long as the
//! sandbox, because a pod's volume outlives its containers.
//!
//! | driver | source |
//! |---|---|
//! | `virtio-fs`, `9p` | the share's tag |
//! | `blk` | PCI path, or a node in `/dev` |
//! | `scsi` | `ID:LUN` |
//! | `nvdimm`, `mmioblk` | a node in `/dev` |
//! | `overlayfs` | none: the options have the directories |
//! | `ephemeral` | none: tmpfs or hugetlbfs |
//! | `local` | none: a directory |
//! | `watchable-bind` | a directory or file of the share, see [`watch`] |
//!
//! Left out: images pulled in the guest, and the devices of other architectures.

mod driver;
mod ephemeral;
mod group;
mod options;
mod watch;

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use ecr_agent_protocol::agent::Storage;
use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use parking_lot::Mutex;

pub use driver::HANDLERS;

use crate::sandbox::Sandbox;

/// How a storage is taken down.
#[derive(Debug)]
enum Made {
    /// It is a mount.
    Mount,
    /// It stays until the end of the sandbox.
    Kept,
    /// Somebody else made it.
    Foreign,
    /// A copy that follows its source.
    Copy(watch::Copy),
}

#[derive(Debug, Default)]
struct Entry {
    users: usize,
    made: Option<Made>,
}

/// The storages of the sandbox, by mount point. Locked one by one: a disk that does not come holds up nobody else.
#[derive(Debug, Default)]
pub struct Storages(Mutex<HashMap<String, Arc<tokio::sync::Mutex<Entry>>>>);

impl Storages {
    fn entry(&self, mount_point: &str) -> Arc<tokio::sync::Mutex<Entry>> {
        Arc::clone(self.0.lock().entry(mount_point.to_owned()).or_default())
    }

    /// Forget a mount point that has nothing left, unless somebody has just asked for it.
    fn forget(&self, mount_point: &str, entry: &Arc<tokio::sync::Mutex<Entry>>) {
        let mut entries = self.0.lock();
        // The map's and ours.
        if Arc::strong_count(entry) == 2
            && entry.try_lock().is_ok_and(|entry| entry.users == 0 && entry.made.is_none())
        {
            entries.remove(mount_point);
        }
    }

    async fn add(&self, sandbox: &Sandbox, storage: &Storage, container: &str) -> Result<()> {
        let shared = self.entry(&storage.mount_point);
        let mut entry = shared.lock().await;
        if entry.made.is_none() {
            match driver::make(sandbox, storage, container).await {
                Ok(made) => entry.made = Some(made),
                Err(error) => {
                    drop(entry);
                    self.forget(&storage.mount_point, &shared);
                    return Err(error);
                }
            }
        }
        entry.users += 1;
        Ok(())
    }

    async fn remove(&self, mount_point: &str) -> Result<()> {
        let shared = self.entry(mount_point);
        let mut entry = shared.lock().await;
        entry.users = entry.users.saturating_sub(1);
        let mut outcome = Ok(());
        if entry.users == 0 && !matches!(entry.made, Some(Made::Kept)) {
            if let Some(made) = entry.made.take() {
                outcome = take_down(made, mount_point.to_owned()).await;
            }
            drop(entry);
            self.forget(mount_point, &shared);
        }
        outcome
    }

    /// Whether this is a storage of the sandbox now.
    fn has(&self, mount_point: &str) -> bool {
        self.0.lock().contains_key(mount_point)
    }
}

/// Make `storages` for `container` appear, in order; returns their mount points for [`remove_storages`]. A failure
/// leaves none of them behind. `container` is empty for the sandbox's own.
pub async fn add_storages(
    sandbox: &Arc<Sandbox>,
    storages: &[Storage],
    container: &str,
) -> Result<Vec<String>> {
    let mut added = Vec::with_capacity(storages.len());
    for storage in storages {
        if let Err(error) = sandbox.storages.add(sandbox, storage, container).await {
            if let Err(error) = remove_storages(sandbox, &added).await {
                log::warn!("take back the storages before a failed one: {error:#}");
            }
            return Err(error.context(format!(
                "storage {:?} (driver {:?}, source {:?})",
                storage.mount_point, storage.driver, storage.source
            )));
        }
        added.push(storage.mount_point.clone());
    }
    Ok(added)
}

/// One user less for each of `mount_points`, the last one first; what nobody uses any more is unmounted. Goes on after
/// an error and returns the first one.
pub async fn remove_storages(sandbox: &Arc<Sandbox>, mount_points: &[String]) -> Result<()> {
    let mut outcome = Ok(());
    for mount_point in mount_points.iter().rev() {
        let removed = sandbox.storages.remove(mount_point).await;
        outcome = outcome.and(removed.with_context(|| format!("storage {mount_point:?}")));
    }
    outcome
}

/// `UpdateEphemeralMounts`: new options, such as a new size, for tmpfs volumes that are there.
pub fn update_ephemeral(sandbox: &Arc<Sandbox>, storages: &[Storage]) -> Result<()> {
    for storage in storages {
        if storage.driver != "ephemeral" {
            bail!(
                "storage {:?}: driver {:?} has nothing to update, only ephemeral has",
                storage.mount_point,
                storage.driver
            );
        }
        if !sandbox.storages.has(&storage.mount_point) {
            bail!("storage {:?} does not exist", storage.mount_point);
        }
        ephemeral::update(storage)?;
    }
    Ok(())
}

async fn take_down(made: Made, mount_point: String) -> Result<()> {
    let blocking = move || match made {
        Made::Mount => unmount(Path::new(&mount_point)),
        Made::Kept | Made::Foreign => Ok(()),
        Made::Copy(copy) => copy.end(),
    };
    tokio::task::spawn_blocking(blocking).await.context("take down a storage")?
}

/// Unmount, and remove the mount point if it is an empty directory of ours. A mount that is still in use elsewhere is
/// detached from here.
fn unmount(mount_point: &Path) -> Result<()> {
    match umount2(mount_point, MntFlags::UMOUNT_NOFOLLOW) {
        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
        Err(Errno::EBUSY) => umount2(mount_point, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)
            .with_context(|| format!("detach {}", mount_point.display()))?,
        Err(error) => {
            return Err(error).with_context(|| format!("unmount {}", mount_point.display()));
        }
    }
    // It may be the share's, which is read-only, or a file.
    let _ = fs::remove_dir(mount_point);
    Ok(())
}
