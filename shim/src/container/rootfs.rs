// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! How a container's root file system reaches the guest: as shared files, or as a block device of its own.

use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use ecr_agent_protocol::agent::Storage;
use ecr_vmm::config::{DiskConfig, DiskIo};

use crate::config::{BlockAio, Hypervisor};
use crate::sandbox::Mount;

/// File systems that the guest's kernel can mount from a block device.
const FILE_SYSTEMS: [&str; 4] = ["ext4", "xfs", "erofs", "ext2"];

/// Mount options that speak to the host, not to the guest's file system.
const HOST_OPTIONS: [&str; 2] = ["loop", "defaults"];

/// Where the guest mounts block-backed root file systems.
const GUEST_MOUNTS: &str = "/run/kata-containers/sandbox/storage";

/// A root file system on a block device, or in a file that holds one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockRootfs {
    /// The device or file on the host.
    pub source: PathBuf,
    /// Its file system.
    pub fstype: String,
    /// Mount options.
    pub options: Vec<String>,
}

impl BlockRootfs {
    /// Whether `mounts` describe one that the guest can mount itself.
    ///
    /// # Errors
    /// The source cannot be looked at.
    pub fn find(mounts: &[Mount], hypervisor: &Hypervisor) -> Result<Option<Self>> {
        let [mount] = mounts else { return Ok(None) };
        if hypervisor.disable_block_device_use || !FILE_SYSTEMS.contains(&mount.kind.as_str()) {
            return Ok(None);
        }
        let metadata = fs::metadata(&mount.source)
            .with_context(|| format!("look at the root file system's source {}", mount.source))?;
        let kind = metadata.file_type();
        if !kind.is_block_device() && !kind.is_file() {
            bail!("the root file system's source {} is no device and no file", mount.source);
        }
        let options = mount.options.iter().filter(|o| !HOST_OPTIONS.contains(&o.as_str()));
        Ok(Some(Self {
            source: mount.source.clone().into(),
            fstype: mount.kind.clone(),
            options: options.cloned().collect(),
        }))
    }

    /// The disk that carries it, named `id`.
    pub fn disk(&self, id: &str, hypervisor: &Hypervisor) -> DiskConfig {
        DiskConfig {
            readonly: self.options.iter().any(|option| option == "ro"),
            ..disk(id, &self.source, hypervisor)
        }
    }

    /// What the agent of container `container` does with that disk at `pci_path`, and where it then is in the guest.
    pub fn storage(&self, container: &str, pci_path: &str) -> (Storage, String) {
        let mount_point = format!("{GUEST_MOUNTS}/{container}");
        let mut options = self.options.clone();
        if self.fstype == "xfs" && !options.iter().any(|option| option == "nouuid") {
            // Snapshots of one image have one UUID, and xfs refuses a second one.
            options.push("nouuid".into());
        }
        let storage = Storage {
            driver: "blk".into(),
            source: pci_path.into(),
            fstype: self.fstype.clone(),
            options,
            mount_point: mount_point.clone(),
            ..Default::default()
        };
        (storage, mount_point)
    }
}

/// A disk as the configuration wants disks to be.
pub fn disk(id: &str, path: &Path, hypervisor: &Hypervisor) -> DiskConfig {
    DiskConfig {
        id: id.into(),
        path: path.to_owned(),
        readonly: false,
        direct: hypervisor.block_device_cache_set && hypervisor.block_device_cache_direct,
        serial: None,
        queues: 0,
        queue_size: DiskConfig::default_queue_size(),
        io: match hypervisor.block_device_aio {
            BlockAio::Threads => DiskIo::Sync,
            _ => DiskIo::Auto,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(kind: &str, source: &Path, options: &[&str]) -> Mount {
        Mount {
            kind: kind.into(),
            source: source.to_string_lossy().into_owned(),
            options: options.iter().map(|option| (*option).to_owned()).collect(),
        }
    }

    #[test]
    fn a_file_with_a_file_system_becomes_a_disk() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mounts = [mount("ext4", file.path(), &["loop", "ro"])];
        let rootfs = BlockRootfs::find(&mounts, &Hypervisor::default()).unwrap().unwrap();
        assert_eq!(rootfs.options, ["ro"]);
        assert!(rootfs.disk("d", &Hypervisor::default()).readonly);
        let (storage, path) = rootfs.storage("c1", "02/01");
        assert_eq!((storage.driver.as_str(), storage.source.as_str()), ("blk", "02/01"));
        assert_eq!(path, "/run/kata-containers/sandbox/storage/c1");
    }

    #[test]
    fn xfs_snapshots_are_mounted_without_their_uuid() {
        let rootfs =
            BlockRootfs { source: "/d".into(), fstype: "xfs".into(), options: vec!["rw".into()] };
        assert_eq!(rootfs.storage("c", "02/01").0.options, ["rw", "nouuid"]);
    }

    #[test]
    fn overlays_and_directories_are_shared() {
        let dir = tempfile::tempdir().unwrap();
        let hypervisor = Hypervisor::default();
        let overlay = [mount("overlay", Path::new("overlay"), &["lowerdir=/a:/b"])];
        assert_eq!(BlockRootfs::find(&overlay, &hypervisor).unwrap(), None);
        assert_eq!(BlockRootfs::find(&[], &hypervisor).unwrap(), None);
        let error = BlockRootfs::find(&[mount("ext4", dir.path(), &[])], &hypervisor).unwrap_err();
        assert!(error.to_string().contains("no device and no file"), "{error}");
    }

    #[test]
    fn block_devices_can_be_forbidden() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let hypervisor = Hypervisor { disable_block_device_use: true, ..Default::default() };
        assert_eq!(
            BlockRootfs::find(&[mount("ext4", file.path(), &[])], &hypervisor).unwrap(),
            None
        );
    }
}
