// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Finding a disk by what the runtime knows of it.
//!
//! A disk counts as there when its node can be opened: it is in sysfs, and in `/dev`, a little earlier, and is announced
//! when its partitions are known.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::pci::PciPath;
use crate::uevent::Uevents;

/// Where devices are looked for.
#[derive(Clone, Copy, Debug)]
pub struct Places<'a> {
    pub sys: &'a Path,
    pub dev: &'a Path,
}

impl Default for Places<'_> {
    fn default() -> Self {
        Places { sys: Path::new("/sys"), dev: Path::new("/dev") }
    }
}

/// A disk of the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    pub node: PathBuf,
    pub major: u32,
    pub minor: u32,
}

impl Disk {
    /// The virtio disk at a place on the PCI bus.
    pub async fn at_pci(path: &PciPath, uevents: &Uevents) -> Result<Self> {
        let what = format!("the disk at PCI path {path}");
        uevents.wait(&what, || virtio_disk(path, Places::default())).await
    }

    /// The disk at a SCSI address `ID:LUN`. The host is told to look for it first.
    pub async fn at_scsi(address: &str, uevents: &Uevents) -> Result<Self> {
        let address: ScsiAddress = address.parse()?;
        tokio::task::spawn_blocking(move || address.scan(Places::default()))
            .await
            .context("scan for SCSI disks")??;
        let what = format!("the disk at SCSI address {}:{}", address.id, address.lun);
        uevents.wait(&what, || address.find(Places::default())).await
    }

    /// A disk by its node, such as `/dev/pmem1`.
    pub async fn at_node(node: &str, uevents: &Uevents) -> Result<Self> {
        let Some(name) = node.strip_prefix("/dev/").filter(|name| is_name(name)) else {
            bail!("{node:?} is not a disk's node: expected /dev/NAME");
        };
        uevents.wait(node, || named(name, Places::default())).await
    }
}

/// A name that kernel devices can have: no way out of the directory that it is looked for in.
fn is_name(name: &str) -> bool {
    !name.is_empty() && !name.starts_with('.') && !name.contains('/')
}

fn virtio_disk(path: &PciPath, places: Places<'_>) -> Result<Disk> {
    let device = path.find(places.sys)?;
    let virtio = entry(&device, |name| name.starts_with("virtio"))
        .with_context(|| format!("{} has no virtio driver", device.display()))?;
    let block = device.join(virtio).join("block");
    let name =
        entry(&block, |_| true).with_context(|| format!("{} is not a disk", device.display()))?;
    named(&name, places)
}

/// SCSI hosts have one channel here; only disks behind the first one are ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct ScsiAddress {
    id: u16,
    lun: u16,
}

impl std::str::FromStr for ScsiAddress {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        text.split_once(':')
            .and_then(|(id, lun)| {
                Some(ScsiAddress { id: id.parse().ok()?, lun: lun.parse().ok()? })
            })
            .with_context(|| format!("SCSI address {text:?}: expected ID:LUN in decimal"))
    }
}

impl ScsiAddress {
    /// Hosts do not look by themselves when the kernel was started with `scsi_mod.scan=none`.
    fn scan(self, places: Places<'_>) -> Result<()> {
        let hosts = places.sys.join("class/scsi_host");
        let entries = fs::read_dir(&hosts)
            .with_context(|| format!("look for SCSI hosts in {}", hosts.display()))?;
        let request = format!("0 {} {}", self.id, self.lun);
        let mut told = false;
        for host in entries.flatten() {
            let file = host.path().join("scan");
            fs::write(&file, &request)
                .with_context(|| format!("write {request:?} to {}", file.display()))?;
            told = true;
        }
        if !told {
            bail!("the guest has no SCSI host");
        }
        Ok(())
    }

    fn find(self, places: Places<'_>) -> Result<Disk> {
        let devices = places.sys.join("bus/scsi/devices");
        // HOST:CHANNEL:ID:LUN.
        let tail = format!(":0:{}:{}", self.id, self.lun);
        let device = entry(&devices, |name| {
            name.strip_suffix(&tail).is_some_and(|host| host.parse::<u32>().is_ok())
        })
        .with_context(|| format!("no host has it in {}", devices.display()))?;
        let block = devices.join(&device).join("block");
        let name = entry(&block, |_| true)
            .with_context(|| format!("SCSI device {device} is not a disk yet"))?;
        named(&name, places)
    }
}

/// The first entry of `directory`, in the order of names, that `fits`.
fn entry(directory: &Path, fits: impl Fn(&str) -> bool) -> Option<String> {
    fs::read_dir(directory)
        .ok()?
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| fits(name))
        .min()
}

fn named(name: &str, places: Places<'_>) -> Result<Disk> {
    let numbers = places.sys.join("class/block").join(name).join("dev");
    let text = fs::read_to_string(&numbers)
        .with_context(|| format!("read its numbers from {}", numbers.display()))?;
    let (major, minor) = text
        .trim()
        .split_once(':')
        .and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)))
        .with_context(|| format!("{} holds {text:?}", numbers.display()))?;
    let node = places.dev.join(name);
    OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(&node)
        .with_context(|| format!("open {}", node.display()))?;
    Ok(Disk { node, major, minor })
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Tree(tempfile::TempDir);

    impl Tree {
        fn new() -> Self {
            let tree = Tree(tempfile::tempdir().unwrap());
            fs::create_dir_all(tree.0.path().join("sys/class/block")).unwrap();
            fs::create_dir_all(tree.0.path().join("dev")).unwrap();
            tree
        }

        fn dir(&self, path: &str) {
            fs::create_dir_all(self.0.path().join("sys").join(path)).unwrap();
        }

        fn disk(&self, name: &str, numbers: &str) {
            self.dir(&format!("class/block/{name}"));
            let class = self.0.path().join("sys/class/block").join(name);
            fs::write(class.join("dev"), numbers).unwrap();
        }

        fn find<T>(&self, find: impl Fn(Places<'_>) -> Result<T>) -> Result<T> {
            find(Places { sys: &self.0.path().join("sys"), dev: &self.0.path().join("dev") })
        }
    }

    #[test]
    fn a_virtio_disk_is_found_step_by_step() {
        let (tree, path) = (Tree::new(), "02/01".parse().unwrap());
        let error = || format!("{:#}", tree.find(|at| virtio_disk(&path, at)).unwrap_err());
        let device = "devices/pci0000:00/0000:00:02.0/0000:01:01.0";
        tree.dir("devices/pci0000:00/0000:00:02.0/pci_bus/0000:01");
        tree.dir(device);
        assert!(error().contains("no virtio driver"), "{}", error());
        tree.dir(&format!("{device}/virtio3/net/eth0"));
        assert!(error().contains("is not a disk"), "{}", error());
        tree.dir(&format!("{device}/virtio3/block/vdb"));
        assert!(error().contains("class/block/vdb/dev"), "{}", error());
        tree.disk("vdb", "many\n");
        assert!(error().contains("many"), "{}", error());
        tree.disk("vdb", "254:16\n");
        assert!(error().contains("open "), "{}", error());
        fs::write(tree.0.path().join("dev/vdb"), "").unwrap();
        let disk = tree.find(|at| virtio_disk(&path, at)).unwrap();
        assert_eq!((disk.major, disk.minor), (254, 16));
        assert!(disk.node.ends_with("dev/vdb"));
    }

    #[test]
    fn a_scsi_disk_behind_any_host() {
        let tree = Tree::new();
        let address: ScsiAddress = "1:23".parse().unwrap();
        assert!(tree.find(|at| address.scan(at)).is_err(), "no SCSI at all");
        tree.dir("class/scsi_host");
        assert!(tree.find(|at| address.scan(at)).unwrap_err().to_string().contains("no SCSI host"));
        tree.dir("class/scsi_host/host2");
        tree.find(|at| address.scan(at)).unwrap();
        let scan = tree.0.path().join("sys/class/scsi_host/host2/scan");
        assert_eq!(fs::read_to_string(scan).unwrap(), "0 1 23");

        tree.dir("bus/scsi/devices/2:0:1:2/block/sda");
        tree.dir("bus/scsi/devices/target2:0:1:23");
        assert!(tree.find(|at| address.find(at)).is_err());
        tree.dir("bus/scsi/devices/2:0:1:23/block/sdb");
        tree.disk("sdb", "8:16\n");
        fs::write(tree.0.path().join("dev/sdb"), "").unwrap();
        assert_eq!(tree.find(|at| address.find(at)).unwrap().minor, 16);
    }

    #[test]
    fn scsi_addresses() {
        assert_eq!("255:255".parse::<ScsiAddress>().unwrap(), ScsiAddress { id: 255, lun: 255 });
        for text in ["", "1", "1:", ":1", "a:b", "1:2:3", "-1:0", "0 0:0\n0:0"] {
            assert!(text.parse::<ScsiAddress>().is_err(), "{text}");
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_node_outside_of_dev_is_refused() {
        let uevents = Uevents::new(std::time::Duration::ZERO);
        for node in ["/dev/", "/etc/passwd", "/dev/../etc/passwd", "/dev/mapper/x", "vda"] {
            let error = Disk::at_node(node, &uevents).await.unwrap_err().to_string();
            assert!(error.contains("expected /dev/NAME"), "{error}");
        }
        let error = Disk::at_node("/dev/no-such-disk", &uevents).await.unwrap_err().to_string();
        assert!(error.contains("did not show up"), "{error}");
    }
}
