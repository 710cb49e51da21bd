// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What each storage driver does to make a storage appear.

use std::fs::{self, File};
use std::path::Path;

use anyhow::{Context, Result, bail};
use ecr_agent_protocol::agent::{FSGroup, Storage};
use nix::mount::{MsFlags, mount};

use super::options::MountOptions;
use super::{Made, ephemeral, group, watch};
use crate::device::Disk;
use crate::mounts;
use crate::sandbox::{RUN, Sandbox};

/// The storage drivers that this agent has.
pub const HANDLERS: [&str; 10] = [
    "9p",
    "blk",
    "ephemeral",
    "local",
    "mmioblk",
    "nvdimm",
    "overlayfs",
    "scsi",
    "virtio-fs",
    "watchable-bind",
];

/// The tag of the share that the runtime sets up once for the whole sandbox.
const SHARE_TAG: &str = "kataShared";
/// An overlay that brings only its lower directories and asks for the rest.
const OVERLAY_WRITABLE: &str = "io.katacontainers.fs-opt.overlay-rw";
/// A directory that an overlay needs and that may not exist yet.
const OVERLAY_CREATE: &str = "io.katacontainers.volume.overlayfs.create_directory=";

/// Make `storage` appear at its mount point.
pub async fn make(sandbox: &Sandbox, storage: &Storage, container: &str) -> Result<Made> {
    if !Path::new(&storage.mount_point).is_absolute() {
        bail!("the mount point is not an absolute path");
    }
    let source = storage.source.as_str();
    let disk = match storage.driver.as_str() {
        "virtio-fs" | "9p" => {
            if source == SHARE_TAG && mounts::is_mount_point(Path::new(&storage.mount_point)) {
                return Ok(Made::Foreign);
            }
            return mounted(Request::new(source, storage)).await;
        }
        "overlayfs" => return overlay(storage, container).await,
        "ephemeral" => return ephemeral::make(storage).await,
        "local" => return ephemeral::directory(storage),
        "watchable-bind" => return watch::start(storage).await.map(Made::Copy),
        "blk" if source.starts_with("/dev/") => Disk::at_node(source, &sandbox.uevents).await?,
        "blk" => Disk::at_pci(&source.parse()?, &sandbox.uevents).await?,
        "scsi" => Disk::at_scsi(source, &sandbox.uevents).await?,
        "nvdimm" | "mmioblk" => Disk::at_node(source, &sandbox.uevents).await?,
        other => bail!("driver {other:?} is not known; known are {}", HANDLERS.join(", ")),
    };
    mounted(Request::new(&disk.node.to_string_lossy(), storage)).await
}

async fn overlay(storage: &Storage, container: &str) -> Result<Made> {
    let mut request = Request::new(&storage.source, storage);
    request.fstype = "overlay".into();
    let mut options = storage.options.clone();
    if let Some(asked) = options.iter().position(|option| option == OVERLAY_WRITABLE) {
        if container.is_empty() {
            bail!("option {OVERLAY_WRITABLE} is for storages of a container");
        }
        options.remove(asked);
        let base = Path::new(RUN).join(container);
        for (option, name) in [("upperdir", "upper"), ("workdir", "work")] {
            let directory = base.join(name);
            create_directory(&directory)?;
            options.push(format!("{option}={}", directory.display()));
        }
    }
    for option in &storage.driver_options {
        if let Some(directory) = option.strip_prefix(OVERLAY_CREATE) {
            create_directory(Path::new(directory))?;
        }
    }
    request.options = MountOptions::parse(&options);
    mounted(request).await
}

pub fn create_directory(path: &Path) -> Result<()> {
    fs::create_dir_all(path).with_context(|| format!("create directory {}", path.display()))
}

/// A mount to make, and whom to give it to.
struct Request {
    source: String,
    target: String,
    fstype: String,
    options: MountOptions,
    group: Option<FSGroup>,
}

impl Request {
    fn new(source: &str, storage: &Storage) -> Self {
        Request {
            source: source.to_owned(),
            target: storage.mount_point.clone(),
            fstype: storage.fstype.clone(),
            options: MountOptions::parse(&storage.options),
            group: storage.fs_group.as_ref().cloned(),
        }
    }
}

/// Mount in a thread of its own: a file system may take its time.
async fn mounted(request: Request) -> Result<Made> {
    tokio::task::spawn_blocking(move || mount_now(&request)).await.context("mount a storage")??;
    Ok(Made::Mount)
}

fn mount_now(request: &Request) -> Result<()> {
    let target = Path::new(&request.target);
    let MountOptions { flags, data } = &request.options;
    if flags.contains(MsFlags::MS_BIND) && Path::new(&request.source).is_file() {
        create_directory(target.parent().unwrap_or(target))?;
        File::options()
            .create(true)
            .append(true)
            .open(target)
            .with_context(|| format!("create mount point {}", target.display()))?;
    } else {
        create_directory(target)?;
    }
    mount(
        Some(request.source.as_str()),
        target,
        Some(request.fstype.as_str()),
        *flags,
        Some(data.as_str()),
    )
    .with_context(|| {
        format!(
            "mount {} as {:?} (flags {flags:?}, options {data:?})",
            request.source, request.fstype
        )
    })?;
    let given = match &request.group {
        Some(group) => group::give(target, group, flags.contains(MsFlags::MS_RDONLY)),
        None => Ok(()),
    };
    given.inspect_err(|_| {
        if let Err(error) = super::unmount(target) {
            log::warn!("{error:#}");
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::tests::sandbox;

    fn storage(driver: &str, source: &str, mount_point: &str) -> Storage {
        Storage {
            driver: driver.into(),
            source: source.into(),
            mount_point: mount_point.into(),
            ..Default::default()
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn storages_that_make_no_sense() {
        let sandbox = sandbox();
        for (driver, source, mount_point, complaint) in [
            ("", "x", "/x", "driver \"\" is not known"),
            ("vfio", "x", "/x", "is not known"),
            ("blk", "nonsense", "/x", "PCI path \"nonsense\""),
            ("blk", "/dev/../etc/passwd", "/x", "expected /dev/NAME"),
            ("scsi", "nonsense", "/x", "SCSI address"),
            ("nvdimm", "pmem1", "/x", "expected /dev/NAME"),
            ("local", "local", "x", "not an absolute path"),
            ("ephemeral", "tmpfs", "", "not an absolute path"),
        ] {
            let error =
                make(&sandbox, &storage(driver, source, mount_point), "c").await.unwrap_err();
            assert!(format!("{error:#}").contains(complaint), "{error:#}");
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_writable_overlay_needs_a_container() {
        let mut storage = storage("overlayfs", "overlay", "/x");
        storage.options = vec![OVERLAY_WRITABLE.into(), "lowerdir=/a".into()];
        let error = make(&sandbox(), &storage, "").await.unwrap_err().to_string();
        assert!(error.contains("for storages of a container"), "{error}");
    }
}
