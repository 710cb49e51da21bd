// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! A container's files: its root file system and its volumes, brought where the guest sees them.
//!
//! What is taken of the host is recorded in the pod as it is taken, for the container's release.

use std::path::{Path, PathBuf};

use ecr_agent_protocol::agent::Storage;
use ecr_agent_protocol::oci;
use ecr_vmm::control::{Command, Reply};

use super::{Pod, blocking, disk_id};
use crate::container::rootfs::BlockRootfs;
use crate::container::volume::{self, Rules, Volume};
use crate::error::{Error, Kind, Result};
use crate::host::{mount, share};
use crate::sandbox::ContainerRequest;
use crate::sandbox::confine;
use crate::sandbox::hold::Hold;

/// A container's root file system, seen from the guest.
pub(super) struct Root {
    pub path: String,
    pub storages: Vec<Storage>,
}

impl Pod {
    /// Bring the root file system where the guest sees it.
    pub(super) async fn root(&self, request: &ContainerRequest) -> Result<Root> {
        let block = BlockRootfs::find(&request.rootfs, &self.config.hypervisor)?;
        if let Some(block) = block {
            confine::set_device(&self.hold, &block.source, true).await?;
            self.edit(&request.id, |container| container.devices.push(block.source.clone()));
            let pci_path = match self.take_boot_disk(&request.id) {
                Some(path) => path,
                None => self.plug(&request.id, &block).await?,
            };
            let (storage, path) = block.storage(&request.id, &pci_path);
            return Ok(Root { path, storages: vec![storage] });
        }
        let rootfs = rootfs_directory(request);
        if !request.rootfs.is_empty() {
            let (mounts, target) = (request.rootfs.clone(), rootfs.clone());
            self.edit(&request.id, |container| container.mounted = true);
            blocking(move || {
                std::fs::create_dir_all(&target)?;
                mount::mount_all(&mounts, &target)
            })
            .await?;
        }
        let id = request.id.clone();
        let path = self.with_share(move |share| share.add_rootfs(&id, &rootfs)).await?;
        Ok(Root { path, storages: Vec::new() })
    }

    fn take_boot_disk(&self, container: &str) -> Option<String> {
        let mut disk = self.boot_disk.lock();
        disk.take_if(|disk| disk.container == container).map(|disk| disk.pci_path)
    }

    /// Plug the disk of a root file system into the running machine; returns where the guest finds it.
    async fn plug(&self, container: &str, block: &BlockRootfs) -> Result<String> {
        let id = disk_id(container);
        let disk = block.disk(&id, &self.config.hypervisor);
        self.edit(container, |container| container.disks.push(id));
        match self.machine.send(Command::AddDisk(disk)).await? {
            Reply::Plugged { path } => Ok(path.to_string()),
            other => Err(Error::new(Kind::Internal, format!("the machine answered {other:?}"))),
        }
    }

    /// Bring all mounts where the guest sees them, and say so in its specification.
    pub(super) async fn add_volumes(
        &self,
        request: &ContainerRequest,
        spec: &mut oci::Spec,
        storages: &mut Vec<Storage>,
    ) -> Result<()> {
        let rules = Rules { disable_guest_empty_dir: self.config.runtime.disable_guest_empty_dir };
        let mut kept = Vec::new();
        for (index, mount) in request.spec.mounts().iter().flatten().enumerate() {
            let Some(mut shown) = spec.mounts.get(index).cloned() else { continue };
            let volume = volume::classify(mount, rules)?;
            let name = volume_name(&request.id, index, mount.destination());
            match volume {
                Volume::InGuest => {}
                Volume::Dropped | Volume::Device => continue,
                Volume::SharedMemory => bind(&mut shown, volume::GUEST_SHM.to_owned()),
                Volume::Shared { source, read_only, watched } => {
                    let in_share = name.clone();
                    let add =
                        move |share: &share::Share| share.add_volume(&in_share, &source, read_only);
                    let mut path = self.with_share(add).await?;
                    if watched {
                        let (storage, copy) = volume::watched_storage(&path, &name);
                        storages.push(storage);
                        path = copy;
                    }
                    bind(&mut shown, path);
                }
                Volume::Memory { name, gid, size } => {
                    let (storage, path) = volume::memory_storage(&name, gid, size);
                    storages.push(storage);
                    bind(&mut shown, path);
                }
                Volume::Local { name, gid } => {
                    let (storage, path) = volume::local_storage(&name, gid);
                    storages.push(storage);
                    bind(&mut shown, path);
                }
            }
            kept.push(shown);
        }
        spec.mounts = kept;
        Ok(())
    }

    /// Lend the shared directory to a thread that may wait.
    async fn with_share<T: Send + 'static>(
        &self,
        work: impl FnOnce(&share::Share) -> anyhow::Result<T> + Send + 'static,
    ) -> Result<T> {
        let share = self.hold.lock().await.as_ref().and_then(Hold::share);
        let Some(share) = share else {
            let text = "the sandbox shares no files with its guest (shared_fs), or has ended";
            return Err(Error::new(Kind::FailedPrecondition, text));
        };
        blocking(move || work(&share)).await
    }
}

/// Where a container's root file system is on the host: mounted in the bundle, or where its specification says.
fn rootfs_directory(request: &ContainerRequest) -> PathBuf {
    let named = request.spec.root().as_ref().map(|root| root.path().as_path());
    let named = named.filter(|_| request.rootfs.is_empty());
    request.bundle.join(named.unwrap_or(Path::new("rootfs")))
}

/// What a volume is called in the share: below the container's id, unique in the container, and readable.
fn volume_name(container: &str, index: usize, destination: &Path) -> String {
    let base = destination.file_name().unwrap_or_default().to_string_lossy();
    format!("{container}/{index:03}-{base}")
}

/// Let a mount of the specification bind the guest's `source`.
fn bind(mount: &mut oci::Mount, source: String) {
    mount.source = source;
    mount.type_ = "bind".into();
    if !mount.options.iter().any(|option| option == "bind" || option == "rbind") {
        mount.options.push("rbind".into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::Mount;

    #[test]
    fn volumes_of_one_container_have_names_of_their_own() {
        let first = volume_name("c", 3, Path::new("/etc/hosts"));
        assert_eq!(first, "c/003-hosts");
        assert_ne!(first, volume_name("c", 4, Path::new("/var/hosts")));
        assert_eq!(volume_name("c", 0, Path::new("/")), "c/000-");
    }

    #[test]
    fn a_root_may_be_outside_of_the_bundle() {
        let request = |root: &str, mounts: &[Mount]| ContainerRequest {
            id: "c".into(),
            bundle: "/bundle".into(),
            rootfs: mounts.to_vec(),
            spec: serde_json::from_value(
                serde_json::json!({"ociVersion": "1.0.2", "root": {"path": root}}),
            )
            .unwrap(),
            config_path: None,
        };
        let mount = Mount { kind: "overlay".into(), source: "overlay".into(), options: Vec::new() };
        let directory = |root, mounts: &[Mount]| rootfs_directory(&request(root, mounts));
        assert_eq!(directory("/elsewhere", &[]), Path::new("/elsewhere"));
        assert_eq!(directory("rootfs", &[]), Path::new("/bundle/rootfs"));
        assert_eq!(directory("/elsewhere", &[mount]), Path::new("/bundle/rootfs"));
    }
}
