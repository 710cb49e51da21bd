// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Real guests. They need a place whose KVM can run a stock kernel, so they are marked as ignored and
//! `tools/dev test` runs them, here or in the testbed.

#![allow(clippy::unwrap_used)] // A failed step is a failed test.

use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ecr_agent_protocol::AGENT_PORT;
use ecr_agent_protocol::client::AgentClient;
use ecr_agent_protocol::health::CheckRequest;
use ecr_tests::guest::Boot;
use ecr_tests::place::Place;
use ecr_tests::qmp::Qmp;
use serde_json::json;
use ttrpc::context;

/// Exit statuses of `ecr-vmm`.
const POWERED_OFF: i32 = 0;
const BAD_ARGUMENTS: i32 = 2;
const PANICKED: i32 = 3;

fn place() -> Place {
    Place::from_environment().unwrap()
}

/// Boot to the end and see that the guest was up and powered off cleanly. Returns what was said.
fn powers_off(boot: Boot) -> Result<String> {
    let (status, said) = boot.start()?.wait_end()?;
    ensure!(status == POWERED_OFF, "exit status {status}:\n{said}");
    ensure!(said.contains(" ready in "), "the agent was not up:\n{said}");
    Ok(said)
}

/// What the guest's script printed as `KEY=value`.
fn value<'a>(said: &'a str, key: &str) -> Result<&'a str> {
    said.lines()
        .find_map(|line| line.trim().strip_prefix(key)?.strip_prefix('='))
        .with_context(|| format!("no {key}= in:\n{said}"))
}

const LOOK_AROUND: &str = "echo CPUS=$(nproc); echo ROOT=$(mount | grep -m1 /dev/root); \
                           echo MEMORY=$(grep MemTotal /proc/meminfo)";

fn memory_mib(said: &str) -> Result<u64> {
    let digits: String = value(said, "MEMORY")?.chars().filter(char::is_ascii_digit).collect();
    Ok(digits.parse::<u64>()? / 1024)
}

fn image_boots(kernel: &str, kind: &str, cpus: &str, memory: &str, at_least: u64) -> Result<()> {
    let boot = Boot::kernel(&place(), kernel)
        .image(&place(), kind)
        .with(&["--cpus", cpus, "--memory", memory])
        .script(LOOK_AROUND);
    let said = powers_off(boot)?;
    ensure!(value(&said, "CPUS")? == cpus, "{said}");
    ensure!(memory_mib(&said)? >= at_least, "{said}");
    Ok(())
}

#[test]
#[ignore = "boots a guest"]
fn vmlinux_from_persistent_memory() -> Result<()> {
    image_boots("vmlinux", "pmem", "1", "128M", 90)
}

#[test]
#[ignore = "boots a guest"]
fn vmlinux_from_persistent_memory_with_4_cpus_and_6_gib() -> Result<()> {
    image_boots("vmlinux", "pmem", "4", "6G", 5800)
}

#[test]
#[ignore = "boots a guest"]
fn vmlinux_from_a_disk() -> Result<()> {
    image_boots("vmlinux", "disk", "1", "256M", 200)
}

#[test]
#[ignore = "boots a guest"]
fn bzimage_from_persistent_memory() -> Result<()> {
    image_boots("bzImage", "pmem", "1", "256M", 200)
}

#[test]
#[ignore = "boots a guest"]
fn bzimage_from_a_disk_with_4_cpus() -> Result<()> {
    image_boots("bzImage", "disk", "4", "256M", 200)
}

#[test]
#[ignore = "boots a guest"]
fn persistent_memory_is_mapped_directly_and_read_only() -> Result<()> {
    let boot = Boot::kernel(&place(), "vmlinux")
        .image(&place(), "pmem")
        .script("echo DAX=$(grep -c dax=always /proc/mounts); echo RO=$(cat /sys/block/pmem0/ro)");
    let said = powers_off(boot)?;
    ensure!(value(&said, "DAX")? == "1" && value(&said, "RO")? == "1", "{said}");
    Ok(())
}

/// The agent alone: it stays up until the power button is pressed.
fn initrd_answers_the_power_button(kernel: &str, initrd: &str, arguments: &[&str]) -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let socket = scratch.path().join("qmp.sock");
    let listen = format!("unix:{}", socket.display());
    let mut guest = Boot::kernel(&place(), kernel)
        .initrd(&place(), initrd)
        .with(arguments)
        .with(&["--qmp", &listen])
        .start()?;
    guest.wait_ready()?;
    let mut qmp = Qmp::connect(&socket)?;
    qmp.execute("system_powerdown")?;
    qmp.wait_event("POWERDOWN")?;
    let shutdown = qmp.wait_event("SHUTDOWN")?;
    ensure!(shutdown["data"]["guest"] == true, "{shutdown}");
    let (status, said) = guest.wait_end()?;
    ensure!(status == POWERED_OFF, "exit status {status}:\n{said}");
    ensure!(!socket.exists(), "the QMP socket is left behind");
    Ok(())
}

#[test]
#[ignore = "boots a guest"]
fn vmlinux_with_an_initrd() -> Result<()> {
    initrd_answers_the_power_button("vmlinux", "initrd.img", &["--memory", "128M"])
}

#[test]
#[ignore = "boots a guest"]
fn bzimage_with_an_initrd_and_4_cpus() -> Result<()> {
    initrd_answers_the_power_button("bzImage", "initrd.img", &["--cpus", "4"])
}

#[test]
#[ignore = "boots a guest"]
fn a_stock_debian_kernel_with_its_modules() -> Result<()> {
    // Its virtio console is a module, so there is no console on it at first.
    let serial = ["--memory", "512M", "--console", "off", "--serial", "stdio"];
    initrd_answers_the_power_button("debian/vmlinuz", "debian/initrd.img", &serial)
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

async fn check_health(client: AgentClient) -> Result<()> {
    let patience = context::with_duration(Duration::from_secs(30));
    let health = client.health.check(patience.clone(), &CheckRequest::new()).await?;
    ensure!(health.status.value() == 1, "not serving: {health:?}");
    let version = client.health.version(patience, &CheckRequest::new()).await?;
    ensure!(!version.agent_version.is_empty(), "{version:?}");
    Ok(())
}

#[test]
#[ignore = "boots a guest"]
fn the_agent_answers_over_vhost_vsock() -> Result<()> {
    if !Path::new("/dev/vhost-vsock").exists() {
        println!("SKIPPED: this host has no /dev/vhost-vsock");
        std::process::exit(77);
    }
    let cid = 0x0EC0_0000 | std::process::id();
    let mut guest = Boot::kernel(&place(), "vmlinux")
        .initrd(&place(), "initrd.img")
        .with(&["--vsock", &format!("cid={cid}")])
        .start()?;
    guest.wait_ready()?;
    runtime().block_on(async {
        let stream =
            tokio_vsock::VsockStream::connect(tokio_vsock::VsockAddr::new(cid, AGENT_PORT)).await?;
        check_health(AgentClient::over(stream)).await
    })
}

#[test]
#[ignore = "boots a guest"]
fn the_agent_answers_over_the_userspace_vsock() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let socket = scratch.path().join("vsock.sock");
    let mut guest = Boot::kernel(&place(), "vmlinux")
        .initrd(&place(), "initrd.img")
        .with(&["--vsock", &format!("cid=3,socket={}", socket.display())])
        .start()?;
    guest.wait_ready()?;
    runtime()
        .block_on(async { check_health(AgentClient::connect(&socket, AGENT_PORT).await?).await })
}

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
    let boot = Boot::kernel(&place(), "vmlinux")
        .image(&place(), "pmem")
        .with(&["--cpus", "4", "--disk", &argument])
        .script(
            "echo QUEUES=$(ls /sys/block/vda/mq | wc -l); echo SERIAL=$(cat /sys/block/vda/serial); \
             echo SIZE=$(cat /sys/block/vda/size); \
             for n in 0 1 2 3; do dd if=/dev/urandom of=/dev/vda bs=1M count=16 seek=$((n * 256)) conv=fsync 2>/dev/null & done; wait; \
             one=$(for n in 0 1 2 3; do dd if=/dev/vda bs=1M count=16 skip=$((n * 256)) 2>/dev/null; done | md5sum | cut -c1-32); \
             echo 3 > /proc/sys/vm/drop_caches; \
             two=$(for n in 0 1 2 3; do dd if=/dev/vda bs=1M count=16 skip=$((n * 256)) 2>/dev/null; done | md5sum | cut -c1-32); \
             [ $one = $two ] && echo SAME=yes; \
             blkdiscard -o 0 -l 16777216 /dev/vda; echo DISCARD=$?; echo 3 > /proc/sys/vm/drop_caches; \
             echo ZERO=$(dd if=/dev/vda bs=1M count=16 2>/dev/null | tr -d \\\\000 | wc -c)",
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
    ensure!(allocated(&disk)? <= 3 * 16 * 2048 + 1024, "discarded blocks are still allocated");
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
    if !Path::new("/dev/loop-control").exists() {
        println!("SKIPPED: this host has no /dev/loop-control");
        std::process::exit(77);
    }
    let scratch = tempfile::tempdir_in("/var/tmp")?;
    let file = gibibyte(scratch.path())?;
    let device = LoopDevice::new(&file, 4096)?;
    for io in ["uring", "sync"] {
        let argument = format!("{},direct,io={io}", device.0);
        let boot = Boot::kernel(&place(), "vmlinux")
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

#[test]
#[ignore = "boots a guest"]
fn qmp_stops_and_continues_a_guest() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let socket = scratch.path().join("qmp.sock");
    let mut guest = Boot::kernel(&place(), "vmlinux")
        .initrd(&place(), "initrd.img")
        .with(&["--cpus", "2", "--qmp", &format!("unix:{}", socket.display())])
        .start()?;
    guest.wait_ready()?;
    let mut qmp = Qmp::connect(&socket)?;
    for _ in 0..20 {
        qmp.execute("stop")?;
        qmp.wait_event("STOP")?;
        ensure!(qmp.execute("query-status")?["status"] == "paused");
        qmp.execute("cont")?;
        qmp.wait_event("RESUME")?;
        ensure!(qmp.execute("query-status")?["running"] == true);
    }
    ensure!(qmp.execute("query-cpus-fast")?.as_array().map(Vec::len) == Some(2));
    qmp.execute("system_reset")?;
    qmp.wait_event("RESET")?;
    guest.wait_ready()?;
    qmp.execute("quit")?;
    let shutdown = qmp.wait_event("SHUTDOWN")?;
    ensure!(shutdown["data"]["guest"] == false, "{shutdown}");
    guest.wait_end()?;
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
    let mut guest = Boot::kernel(&place(), "vmlinux")
        .image(&place(), "pmem")
        .with(&["--bridges", "1", "--qmp", &format!("unix:{}", socket.display())])
        .script(
            "echo LISTENING=yes; for n in $(seq 20); do \
             until [ -b /dev/vda ] && [ -e /sys/block/vda/size ]; do sleep 0.05; done; \
             echo WHERE=$(readlink -f /sys/block/vda); \
             echo READ$n=$(head -c 8 /dev/vda)/$(cat /dev/vda | wc -c); \
             while [ -b /dev/vda ]; do sleep 0.05; done; done",
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
    }
    let (status, said) = guest.wait_end()?;
    ensure!(status == POWERED_OFF, "exit status {status}:\n{said}");
    Ok(())
}

#[test]
#[ignore = "boots a guest"]
fn a_guest_that_reboots_starts_again() -> Result<()> {
    let mut guest =
        Boot::kernel(&place(), "vmlinux").image(&place(), "pmem").script("reboot -f").start()?;
    guest.wait_ready()?;
    guest.wait_ready()?;
    Ok(())
}

#[test]
#[ignore = "boots a guest"]
fn a_panic_ends_with_status_3_and_says_so() -> Result<()> {
    let boot = Boot::kernel(&place(), "vmlinux")
        .image(&place(), "pmem")
        .script("echo c > /proc/sysrq-trigger");
    let (status, said) = boot.start()?.wait_end()?;
    ensure!(status == PANICKED, "exit status {status}:\n{said}");
    Ok(())
}

#[test]
#[ignore = "boots a guest"]
fn a_console_socket_that_nobody_reads_does_not_stop_the_guest() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let socket = scratch.path().join("console.sock");
    let boot = Boot::kernel(&place(), "vmlinux")
        .image(&place(), "pmem")
        .with(&["--console", &format!("unix:{}", socket.display())])
        .script("dd if=/dev/zero bs=1024 count=1024 2>/dev/null | tr x y");
    let guest = boot.start()?;
    let stuck = ecr_tests::guest::wait_for_socket(&socket)?;
    let (status, said) = guest.wait_end()?;
    drop(stuck);
    ensure!(status == POWERED_OFF, "exit status {status}:\n{said}");
    Ok(())
}

#[test]
#[ignore = "boots a guest"]
fn a_disk_that_shrinks_gives_the_guest_an_error_and_nothing_else() -> Result<()> {
    let scratch = tempfile::tempdir_in("/var/tmp")?;
    let disk = gibibyte(scratch.path())?;
    let mut guest = Boot::kernel(&place(), "vmlinux")
        .image(&place(), "pmem")
        .with(&["--disk", &disk.display().to_string()])
        .script(
            "echo UP=yes; sleep 2; dd if=/dev/vda of=/dev/null bs=4096 count=1 skip=200000 2>/dev/null; \
             echo READ=$?; echo ALIVE=yes",
        )
        .start()?;
    guest.wait_for("UP=yes")?;
    std::fs::File::options().write(true).open(&disk)?.set_len(1 << 20)?;
    let (status, said) = guest.wait_end()?;
    ensure!(status == POWERED_OFF, "exit status {status}:\n{said}");
    ensure!(value(&said, "READ")? != "0" && value(&said, "ALIVE")? == "yes", "{said}");
    Ok(())
}

/// Where virtiofsd is, on Debian and elsewhere.
const VIRTIOFSD: [&str; 3] =
    ["/usr/libexec/virtiofsd", "/usr/lib/virtiofsd", "/usr/local/bin/virtiofsd"];

/// A daemon that serves a directory, as long as it lives.
struct Virtiofsd(std::process::Child);

impl Virtiofsd {
    fn start(directory: &Path, socket: &Path) -> Result<Self> {
        let Some(program) = VIRTIOFSD.into_iter().find(|path| Path::new(path).exists()) else {
            println!("SKIPPED: this host has no virtiofsd");
            std::process::exit(77);
        };
        let daemon = Command::new(program)
            .arg(format!("--socket-path={}", socket.display()))
            .arg(format!("--shared-dir={}", directory.display()))
            .args(["--sandbox=none", "--seccomp=none"])
            .spawn()
            .context(program)?;
        let daemon = Self(daemon);
        // It takes one connection only, so nobody may try whether it listens.
        let until = std::time::Instant::now() + Duration::from_secs(180);
        while !socket.exists() {
            ensure!(std::time::Instant::now() < until, "virtiofsd does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(daemon)
    }
}

impl Drop for Virtiofsd {
    fn drop(&mut self) {
        // It ends by itself when the VMM has gone.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
#[ignore = "boots a guest"]
fn a_directory_is_shared_both_ways() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let (shared, socket) = (scratch.path().join("shared"), scratch.path().join("fs.sock"));
    std::fs::create_dir(&shared)?;
    std::fs::write(shared.join("from-host"), "x".repeat(3 << 20))?;
    let _daemon = Virtiofsd::start(&shared, &socket)?;
    let boot = Boot::kernel(&place(), "vmlinux")
        .image(&place(), "pmem")
        .with(&["--memory", "256M,shared", "--cpus", "2"])
        .with(&["--fs", &format!("socket={},tag=data,queues=4", socket.display())])
        .script(
            "mount -t virtiofs data /mnt && echo SIZE=$(tr -d y < /mnt/from-host | wc -c); \
             dd if=/dev/zero bs=1M count=8 2>/dev/null | tr \\\\000 z > /mnt/from-guest; umount /mnt",
        );
    let said = powers_off(boot)?;
    ensure!(value(&said, "SIZE")? == "3145728", "{said}");
    let written = std::fs::read(shared.join("from-guest"))?;
    ensure!(written.len() == 8 << 20 && written.iter().all(|byte| *byte == b'z'), "{said}");
    Ok(())
}

#[test]
#[ignore = "boots a guest"]
fn a_guest_outlives_the_daemon_of_its_directory() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let (socket, control) = (scratch.path().join("fs.sock"), scratch.path().join("qmp.sock"));
    let daemon = Virtiofsd::start(scratch.path(), &socket)?;
    let mut guest = Boot::kernel(&place(), "vmlinux")
        .initrd(&place(), "initrd.img")
        .with(&["--memory", "256M,shared", "--qmp", &format!("unix:{}", control.display())])
        .with(&["--fs", &format!("socket={},tag=data", socket.display())])
        .start()?;
    guest.wait_ready()?;
    let mut qmp = Qmp::connect(&control)?;
    drop(daemon);
    let lost = qmp.wait_event("__io.containerd.ecr_BACKEND_LOST")?;
    ensure!(lost["data"]["device"] == "fs0", "{lost}");
    ensure!(qmp.execute("query-status")?["running"] == true);
    qmp.execute("system_powerdown")?;
    let (status, said) = guest.wait_end()?;
    ensure!(status == POWERED_OFF, "exit status {status}:\n{said}");
    Ok(())
}

/// A tap with an address on the host's side, as long as it lives.
struct HostTap(&'static str);

impl HostTap {
    fn new(name: &'static str, address: &str) -> Result<Self> {
        if !Path::new("/dev/net/tun").exists() {
            println!("SKIPPED: this host has no /dev/net/tun");
            std::process::exit(77);
        }
        let kind = ["mode", "tap", "multi_queue", "vnet_hdr"];
        ip(&[&["tuntap", "add", "dev", name], &kind[..]].concat())?;
        let tap = Self(name);
        ip(&["address", "add", address, "dev", name])?;
        ip(&["link", "set", name, "up"])?;
        Ok(tap)
    }
}

impl Drop for HostTap {
    fn drop(&mut self) {
        let gone = ip(&["link", "delete", self.0]);
        assert!(gone.is_ok(), "{} stays behind", self.0);
    }
}

fn ip(arguments: &[&str]) -> Result<()> {
    let output = Command::new("ip").args(arguments).output().context("ip")?;
    let problem = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "ip {arguments:?}: {problem}");
    Ok(())
}

/// Frames of all sizes pass between host and guest, over two pairs of queues.
fn a_guest_is_on_the_network(tap: &'static str, vhost: &str) -> Result<()> {
    let _tap = HostTap::new(tap, "192.0.2.1/24")?;
    let boot = Boot::kernel(&place(), "vmlinux")
        .image(&place(), "pmem")
        .with(&["--cpus", "2"])
        .with(&[
            "--net",
            &format!("tap={tap},queues=2,vhost={vhost},mac=02:00:00:00:00:01,mtu=1400"),
        ])
        .script(
            "cd /sys/class/net/eth0; echo MAC=$(cat address); echo MTU=$(cat mtu); \
             echo QUEUES=$(ls queues | wc -l); \
             ip link set eth0 up; ip addr add 192.0.2.2/24 dev eth0; \
             for size in 1 1300 4000 60000; do ping -c 3 -s $size 192.0.2.1 | grep received; done; \
             echo ALL=$(ping -c 100 -A -s 8000 192.0.2.1 | grep -c seq=)",
        );
    let said = powers_off(boot)?;
    for (key, wanted) in
        [("MAC", "02:00:00:00:00:01"), ("MTU", "1400"), ("QUEUES", "4"), ("ALL", "100")]
    {
        ensure!(value(&said, key)? == wanted, "{key} is not {wanted}:\n{said}");
    }
    let all = said.matches("3 packets received").count();
    ensure!(all == 4, "of 4 sizes, {all} came back:\n{said}");
    Ok(())
}

#[test]
#[ignore = "boots a guest"]
fn a_guest_is_on_the_network_through_this_process() -> Result<()> {
    a_guest_is_on_the_network("ecr-test0", "off")
}

#[test]
#[ignore = "boots a guest"]
fn a_guest_is_on_the_network_through_the_kernel() -> Result<()> {
    if !Path::new("/dev/vhost-net").exists() {
        println!("SKIPPED: this host has no /dev/vhost-net");
        std::process::exit(77);
    }
    a_guest_is_on_the_network("ecr-test1", "on")
}

#[test]
#[ignore = "starts the program"]
fn what_cannot_work_is_refused_with_one_clear_line() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let in_use = scratch.path().join("in-use.sock");
    let _listener = UnixListener::bind(&in_use)?;
    let busy = format!("unix:{}", in_use.display());
    let kernel = place().guest("vmlinux").display().to_string();
    let initrd = place().guest("initrd.img").display().to_string();
    for (arguments, status, text) in [
        (vec!["--kernel", "/none"], BAD_ARGUMENTS, "/none"),
        (vec!["--kernel", initrd.as_str()], BAD_ARGUMENTS, "cpio archive"),
        (vec!["--kernel", kernel.as_str(), "--memory", "8M"], BAD_ARGUMENTS, "more memory"),
        (vec!["--kernel", kernel.as_str(), "--cpus", "0"], BAD_ARGUMENTS, "0"),
        (vec!["--kernel", kernel.as_str(), "--qmp", busy.as_str()], BAD_ARGUMENTS, "in-use.sock"),
        (vec!["--kernel", kernel.as_str(), "--image", "/tmp"], BAD_ARGUMENTS, "/tmp"),
        (vec!["--kernel", kernel.as_str(), "--memory", "lots"], BAD_ARGUMENTS, "lots"),
    ] {
        let output = std::process::Command::new(place().vmm()).args(&arguments).output()?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        println!("{arguments:?}: {said}");
        ensure!(output.status.code() == Some(status), "{arguments:?}: {}: {said}", output.status);
        ensure!(said.contains(text), "{arguments:?} does not say {text:?}: {said}");
    }
    Ok(())
}
