// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Disks: what guests write to them, and their coming and going.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use ecr_tests::guest::Boot;
use ecr_tests::place::KERNEL;
use ecr_tests::qmp::Qmp;
use ecr_tests::skip::{same_everywhere, skip};
use serde_json::json;

use crate::{ends_well, place, powers_off, value};

/// A sparse file of a gibibyte.
fn gibibyte(directory: &Path) -> Result<PathBuf> {
    let path = directory.join("disk.img");
    std::fs::File::create(&path)?.set_len(1 << 30)?;
    Ok(path)
}

/// Blocks of 512 bytes that a file really has.
fn allocated(path: &Path) -> Result<u64> {
    use std::os::unix::fs::MetadataExt;
    Ok(std::fs::metadata(path)?.blocks())
}

#[test]
#[ignore = "boots a guest"]
fn a_disk_with_4_queues_is_written_discarded_and_read_back() -> Result<()> {
    let scratch = tempfile::tempdir_in("/var/tmp")?;
    let disk = gibibyte(scratch.path())?;
    let argument = format!("{},queues=4,serial=SERIAL-1", disk.display());
    let boot = Boot::kernel(&place(), KERNEL)
        .image(&place(), "pmem")
        .with(&["--cpus", "4", "--disk", &argument])
        .script(
            "echo QUEUES=$(ls /sys/block/vda/mq | wc -l); echo SERIAL=$(cat /sys/block/vda/serial); \
             echo SIZE=$(cat /sys/block/vda/size); \
             for n in 0 1 2 3; do dd if=/dev/urandom of=/dev/vda bs=1M count=4 seek=$((n * 256)) conv=fsync 2>/dev/null & done; wait; \
             one=$(for n in 0 1 2 3; do dd if=/dev/vda bs=1M count=4 skip=$((n * 256)) 2>/dev/null; done | md5sum | cut -c1-32); \
             echo 3 > /proc/sys/vm/drop_caches; \
             two=$(for n in 0 1 2 3; do dd if=/dev/vda bs=1M count=4 skip=$((n * 256)) 2>/dev/null; done | md5sum | cut -c1-32); \
             [ $one = $two ] && echo SAME=yes; \
             blkdiscard -o 0 -l 4194304 /dev/vda; echo DISCARD=$?; echo 3 > /proc/sys/vm/drop_caches; \
             echo ZERO=$(dd if=/dev/vda bs=1M count=4 2>/dev/null | tr -d \\\\000 | wc -c)",
        );
    let said = powers_off(boot)?;
    for (key, wanted) in [
        ("QUEUES", "4"),
        ("SERIAL", "SERIAL-1"),
        ("SIZE", "2097152"),
        ("SAME", "yes"),
        ("DISCARD", "0"),
        ("ZERO", "0"),
    ] {
        ensure!(value(&said, key)? == wanted, "{key} is not {wanted}:\n{said}");
    }
    // Three of four pieces are left.
    ensure!(allocated(&disk)? <= 3 * 4 * 2048 + 1024, "discarded blocks are still allocated");
    Ok(())
}

/// A block device over a file, as long as it lives.
struct LoopDevice(String);

impl LoopDevice {
    fn new(file: &Path, sector: u32) -> Result<Self> {
        let made = Command::new("losetup")
            .args(["--find", "--show", "--sector-size", &sector.to_string()])
            .arg(file)
            .output()
            .context("losetup")?;
        let problem = String::from_utf8_lossy(&made.stderr);
        ensure!(made.status.success(), "losetup {}: {problem}", file.display());
        Ok(Self(String::from_utf8(made.stdout)?.trim().to_owned()))
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let gone = Command::new("losetup").args(["--detach", &self.0]).status();
        assert!(gone.is_ok_and(|status| status.success()), "{} stays behind", self.0);
    }
}

#[test]
#[ignore = "boots a guest"]
fn a_block_device_of_4_kib_sectors_is_written_past_the_page_cache() -> Result<()> {
    same_everywhere();
    if !Path::new("/dev/loop-control").exists() {
        skip("this host has no /dev/loop-control");
    }
    let scratch = tempfile::tempdir_in("/var/tmp")?;
    let file = gibibyte(scratch.path())?;
    let device = LoopDevice::new(&file, 4096)?;
    for io in ["uring", "sync"] {
        let argument = format!("{},direct,io={io}", device.0);
        let boot = Boot::kernel(&place(), KERNEL)
            .image(&place(), "pmem")
            .with(&["--disk", &argument])
            .script(
                "echo SECTOR=$(cat /sys/block/vda/queue/logical_block_size); \
                 dd if=/dev/urandom of=/dev/vda bs=1M count=8 conv=fsync 2>/dev/null; \
                 one=$(dd if=/dev/vda bs=1M count=8 2>/dev/null | md5sum | cut -c1-32); \
                 echo 3 > /proc/sys/vm/drop_caches; \
                 two=$(dd if=/dev/vda bs=1M count=8 2>/dev/null | md5sum | cut -c1-32); \
                 [ $one = $two ] && echo SAME=yes; \
                 blkdiscard -o 0 -l 8388608 /dev/vda; echo DISCARD=$?",
            );
        let said = powers_off(boot)?;
        for (key, wanted) in [("SECTOR", "4096"), ("SAME", "yes"), ("DISCARD", "0")] {
            ensure!(value(&said, key)? == wanted, "{io}: {key} is not {wanted}:\n{said}");
        }
        ensure!(allocated(&file)? <= 1024, "{io}: discarded blocks are still allocated");
    }
    Ok(())
}

/// What a disk that is plugged in for the `n`th time begins with.
fn hotplug_marker(n: u32) -> String {
    format!("DISK{n:04}")
}

#[test]
#[ignore = "boots a guest"]
fn a_disk_is_plugged_in_and_out_of_a_running_guest_20_times() -> Result<()> {
    const SIZE: u64 = 1 << 20;
    let scratch = tempfile::tempdir()?;
    let (socket, disk) = (scratch.path().join("qmp.sock"), scratch.path().join("disk.img"));
    std::fs::write(&disk, vec![0; SIZE as usize])?;
    let mut guest = Boot::kernel(&place(), KERNEL)
        .image(&place(), "pmem")
        .with(&["--bridges", "1"])
        .qmp(&socket)
        .script(
            "echo LISTENING=yes; for n in $(seq 20); do \
             until [ -b /dev/vda ] && [ -e /sys/block/vda/size ]; do sleep 0.05; done; \
             echo WHERE=$(readlink -f /sys/block/vda); \
             echo READ$n=$(head -c 8 /dev/vda)/$(cat /dev/vda | wc -c); \
             while [ -b /dev/vda ]; do sleep 0.05; done; echo GONE$n=yes; done",
        )
        .start()?;
    guest.wait_for("LISTENING=yes")?;
    let mut qmp = Qmp::connect(&socket)?;
    let node = json!({"driver": "raw", "node-name": "drive", "read-only": true,
                      "file": {"driver": "file", "filename": disk}});
    let device = json!({"driver": "virtio-blk-pci", "id": "virtio-drive", "drive": "drive",
                        "bus": "pci-bridge-0", "addr": "01", "share-rw": "on"});
    for n in 1..=20 {
        let marker = hotplug_marker(n);
        std::fs::File::options().write(true).open(&disk)?.write_all_at(marker.as_bytes(), 0)?;
        qmp.execute_with("blockdev-add", &node)?;
        qmp.execute_with("device_add", &device)?;
        let place = guest.wait_for("WHERE=")?;
        ensure!(place.contains("/0000:00:02.0/0000:01:01.0/virtio"), "{place}");
        guest.wait_for(&format!("READ{n}={marker}/{SIZE}"))?;
        qmp.execute_with("device_del", &json!({"id": "virtio-drive"}))?;
        let gone = qmp.wait_event("DEVICE_DELETED")?;
        ensure!(gone["data"]["device"] == "virtio-drive", "{gone}");
        qmp.execute_with("blockdev-del", &json!({"node-name": "drive"}))?;
        guest.wait_for(&format!("GONE{n}=yes"))?;
    }
    ends_well(guest).map(drop)
}

#[test]
#[ignore = "boots a guest"]
fn a_disk_that_shrinks_gives_the_guest_an_error_and_nothing_else() -> Result<()> {
    same_everywhere();
    let scratch = tempfile::tempdir_in("/var/tmp")?;
    let disk = gibibyte(scratch.path())?;
    let mut guest = Boot::kernel(&place(), KERNEL)
        .image(&place(), "pmem")
        .with(&["--disk", &disk.display().to_string()])
        .script(
            "echo UP=yes; sleep 2; dd if=/dev/vda of=/dev/null bs=4096 count=1 skip=200000 2>/dev/null; \
             echo READ=$?; echo ALIVE=yes",
        )
        .start()?;
    guest.wait_for("UP=yes")?;
    std::fs::File::options().write(true).open(&disk)?.set_len(1 << 20)?;
    let said = ends_well(guest)?;
    ensure!(value(&said, "READ")? != "0" && value(&said, "ALIVE")? == "yes", "{said}");
    Ok(())
}
