// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

use std::path::PathBuf;

use super::*;
use crate::config::{
    BootConfig, CpuConfig, DiskIo, GicVersion, MacAddr, MachineType, NvdimmConfig, ResetAction,
    RngConfig, VsockConfig,
};

const GIB: u64 = 1 << 30;

/// A configuration that has everything and with which nothing is wrong.
fn good() -> VmConfig {
    VmConfig {
        name: Some("vm".into()),
        uuid: uuid::Uuid::nil(),
        machine: MachineType::Q35,
        gic: GicVersion::Host,
        acpi: true,
        cpus: CpuConfig { boot: 2, max: 4 },
        memory: MemoryConfig {
            size: GIB,
            max: Some(4 * GIB),
            slots: 2,
            shared: true,
            hugepages: Some(2 * MIB),
            prealloc: false,
            path: None,
        },
        boot: BootConfig {
            kernel: "vmlinux".into(),
            initrd: Some("initrd".into()),
            cmdline: "console=hvc0".into(),
        },
        nvdimm: Some(NvdimmConfig { id: "image".into(), path: "image".into() }),
        disks: vec![disk("disk0"), disk("disk1")],
        nets: vec![net("net0", &[5, 6]), net("net1", &[7])],
        fs: vec![fs("fs0"), fs("fs1")],
        rng: Some(RngConfig::default()),
        vsock: Some(VsockConfig {
            cid: 3,
            backend: VsockBackend::Unix { path: "vsock.sock".into() },
        }),
        console: ChardevConfig::Unix { path: "console.sock".into() },
        serial: ChardevConfig::Fds { input: Some(0), output: 1 },
        pvpanic: true,
        on_reset: ResetAction::Reboot,
        bridges: 1,
        io_threads: 0,
    }
}

fn disk(id: &str) -> DiskConfig {
    DiskConfig {
        id: id.into(),
        path: PathBuf::from(format!("{id}.img")),
        readonly: false,
        direct: false,
        serial: Some("x".repeat(SERIAL_MAX)),
        queues: 0,
        queue_size: DiskConfig::default_queue_size(),
        io: DiskIo::Auto,
    }
}

fn net(id: &str, taps: &[i32]) -> NetConfig {
    NetConfig {
        id: id.into(),
        mac: MacAddr([2, 0, 0, 0, 0, 1]),
        mtu: Some(1500),
        queue_size: NetConfig::default_queue_size(),
        taps: taps.into(),
        vhost: taps.iter().map(|fd| fd + 10).collect(),
        tap: None,
    }
}

fn tap(name: &str) -> TapConfig {
    TapConfig { name: name.into(), queues: 1, vhost: false }
}

fn fs(id: &str) -> FsConfig {
    FsConfig {
        id: id.into(),
        tag: id.into(),
        socket: PathBuf::from(format!("{id}.sock")),
        queues: 1,
        queue_size: FsConfig::default_queue_size(),
    }
}

/// What is said of [`good`] after `spoil`.
#[track_caller]
fn refused(spoil: impl FnOnce(&mut VmConfig)) -> String {
    let mut config = good();
    spoil(&mut config);
    config.validate().unwrap_err().to_string()
}

#[test]
fn accepts_what_works() {
    good().validate().unwrap();
}

#[test]
fn cpus() {
    assert_eq!(
        refused(|c| c.cpus.boot = 0),
        "cpus.boot: 0 vCPUs cannot run anything: use at least 1"
    );
    assert_eq!(
        refused(|c| c.cpus = CpuConfig { boot: 4, max: 2 }),
        "cpus.max: 2 is less than the 4 present at boot: use 4 or more"
    );
}

#[test]
fn memory_size() {
    assert_eq!(
        refused(|c| c.memory.size = 0),
        "memory.size: 0 bytes cannot hold a kernel: use at least 1 MiB"
    );
    assert_eq!(
        refused(|c| c.memory.size = GIB + 1),
        "memory.size: 1073741825 bytes is not a whole number of MiB: use 1024 MiB or 1025 MiB"
    );
    assert!(refused(|c| c.memory.size = u64::MAX).starts_with("memory.size: "));
}

#[test]
fn memory_to_come() {
    assert_eq!(
        refused(|c| c.memory.max = Some(GIB / 2)),
        "memory.max: 536870912 bytes is less than the 1073741824 present at boot: use as much or more"
    );
    assert!(refused(|c| c.memory.max = Some(GIB + 1)).starts_with("memory.max: 1073741825 bytes"));
    assert!(refused(|c| c.memory.slots = 0).starts_with("memory.slots: 0 leaves no slot"));
    assert!(refused(|c| c.memory.max = None).starts_with("memory.slots: 2 slots and no memory"));
    let mut none = good();
    (none.memory.max, none.memory.slots) = (None, 0);
    none.validate().unwrap();
}

#[test]
fn huge_pages() {
    for page in [0, 4096, 3 * MIB] {
        let text = refused(|c| c.memory.hugepages = Some(page));
        assert!(text.starts_with(&format!("memory.hugepages: {page} bytes")), "{text}");
    }
    let text = refused(|c| c.memory.size = GIB + MIB);
    assert!(text.contains("whole number of huge pages of 2097152 bytes"), "{text}");
}

#[test]
fn paths_that_name_nothing() {
    assert_eq!(refused(|c| c.boot.kernel = PathBuf::new()), "boot.kernel: is empty: name a file");
    assert!(refused(|c| c.boot.initrd = Some(PathBuf::new())).starts_with("boot.initrd: "));
    assert!(refused(|c| c.memory.path = Some(PathBuf::new())).starts_with("memory.path: "));
    assert!(refused(|c| c.disks[1].path = PathBuf::new()).starts_with("disks[1].path: "));
    assert!(refused(|c| c.rng = Some(RngConfig { path: "a\0b".into() })).contains("zero byte"));
    let empty = NvdimmConfig { id: "image".into(), path: PathBuf::new() };
    assert!(refused(|c| c.nvdimm = Some(empty)).starts_with("nvdimm.path: "));
    let empty = ChardevConfig::File { path: PathBuf::new() };
    assert!(refused(|c| c.serial = empty).starts_with("serial.path: "));
}

#[test]
fn command_line_with_a_zero_byte() {
    assert_eq!(
        refused(|c| c.boot.cmdline = "quiet\0splash".into()),
        "boot.cmdline: has a zero byte at offset 5, which would end it: remove it"
    );
}

#[test]
fn disks() {
    assert_eq!(
        refused(|c| c.disks[0].serial = Some("x".repeat(21))),
        "disks[0].serial: \"xxxxxxxxxxxxxxxxxxxxx\" is 21 bytes long: use at most 20"
    );
    for size in [0, 1, 100, 2048, 32768] {
        let text = refused(|c| c.disks[1].queue_size = size);
        assert!(text.starts_with(&format!("disks[1].queue_size: {size} is no size")), "{text}");
    }
    let text = refused(|c| c.disks[0].queues = 257);
    assert!(text.starts_with("disks[0].queues: 257 is too many"), "{text}");
}

#[test]
fn nets() {
    for group in [[0; 6], [1, 0, 0x5e, 0, 0, 1]] {
        let text = refused(|c| c.nets[1].mac = MacAddr(group));
        assert!(text.starts_with("nets[1].mac: ") && text.contains("one station"), "{text}");
    }
    assert_eq!(
        refused(|c| c.nets[0].mtu = Some(67)),
        "nets[0].mtu: 67 is too small for IPv4: use 68 or more"
    );
    assert!(refused(|c| c.nets[0].queue_size = 3).starts_with("nets[0].queue_size: 3 is no size"));
    assert_eq!(
        refused(|c| c.nets[0].taps = Vec::new()),
        "nets[0].taps: 0 pairs of queues: use 1 to 256"
    );
    assert!(refused(|c| c.nets[0].taps = (0..257).collect()).contains("257 pairs"));
    assert_eq!(
        refused(|c| c.nets[0].vhost.truncate(1)),
        "nets[0].vhost: 1 descriptors of /dev/vhost-net for 2 of the tap: use as many, or none"
    );
    assert!(refused(|c| c.nets[0].taps[1] = -1).starts_with("nets[0].taps[1]: -1"));
    assert_eq!(
        refused(|c| c.nets[1].vhost[0] = 5),
        "nets[1].vhost[0]: descriptor 5 is also nets[0].taps[0]: use one for each"
    );
}

#[test]
fn taps_by_name() {
    let mut named = good();
    named.nets = vec![net("net0", &[]), net("net1", &[])];
    (named.nets[0].tap, named.nets[1].tap) = (Some(tap("tap0")), Some(tap("tap1")));
    named.validate().unwrap();
    named.nets[1].tap = Some(tap("tap0"));
    let text = named.validate().unwrap_err().to_string();
    assert_eq!(text, "nets[1].tap.name: \"tap0\" is also nets[0].tap: use a tap for each");
    for name in ["", "a/b", "tap%d", "..", "a b", "sixteen-letters-"] {
        named.nets[1].tap = Some(tap(name));
        let text = named.validate().unwrap_err().to_string();
        assert!(text.starts_with(&format!("nets[1].tap.name: {name:?} is no name")), "{text}");
    }
    named.nets[1].tap = Some(TapConfig { queues: 0, ..tap("tap1") });
    assert!(named.validate().unwrap_err().to_string().starts_with("nets[1].tap.queues: 0 pairs"));
    let text = refused(|c| c.nets[0].tap = Some(tap("tap0")));
    assert!(text.starts_with("nets[0].tap: is given beside descriptors"), "{text}");
}

#[test]
fn file_systems() {
    assert_eq!(
        refused(|c| c.memory.shared = false),
        "memory.shared: off, but the daemon of fs[0] has to map guest memory: turn it on"
    );
    for tag in [String::new(), "x".repeat(37), "a\0b".into()] {
        let text = refused(|c| c.fs[1].tag = tag.clone());
        assert!(text.starts_with(&format!("fs[1].tag: {tag:?} is {} bytes", tag.len())), "{text}");
    }
    assert!(
        refused(|c| c.fs[1].tag = "fs0".into()).starts_with("fs[1].tag: \"fs0\" is also fs[0]")
    );
    assert!(refused(|c| c.fs[0].queues = 0).starts_with("fs[0].queues: 0 queues"));
    assert!(refused(|c| c.fs[0].queue_size = 2048).starts_with("fs[0].queue_size: 2048"));
    assert!(refused(|c| c.fs[0].socket = PathBuf::new()).starts_with("fs[0].socket: is empty"));
    let text = refused(|c| c.fs[0].socket = "vsock.sock".into());
    assert!(text.starts_with("fs[0].socket: ") && text.contains("is also vsock"), "{text}");
}

#[test]
fn ids() {
    assert_eq!(
        refused(|c| c.disks[1].id = "disk0".into()),
        "disks[1].id: \"disk0\" is also disks[0].id: give each device its own id"
    );
    assert!(refused(|c| c.disks[0].id = "image".into()).contains("is also nvdimm.id"));
    assert!(refused(|c| c.nets[0].id = "disk0".into()).contains("is also disks[0].id"));
    assert!(refused(|c| c.fs[0].id = "net0".into()).contains("is also nets[0].id"));
    for id in ["", "0disk", "a b", "a/b"] {
        let text = refused(|c| c.disks[0].id = id.into());
        assert!(text.starts_with(&format!("disks[0].id: {id:?} is no id")), "{text}");
    }
}

#[test]
fn an_image_that_is_written_is_used_once() {
    let text = refused(|c| c.disks[1].path = "disk0.img".into());
    assert!(text.starts_with("disks[1].path: \"disk0.img\" is also disks[0].path"), "{text}");
    assert!(refused(|c| c.disks[1].path = "image".into()).contains("is also nvdimm.path"));
    let mut shared = good();
    for disk in &mut shared.disks {
        disk.path = "image".into();
        disk.readonly = true;
    }
    shared.validate().unwrap();
}

#[test]
fn vsock() {
    for cid in [0, 1, 2, u32::MAX] {
        let text = refused(|c| c.vsock.as_mut().unwrap().cid = cid);
        assert!(text.starts_with(&format!("vsock.cid: {cid} is reserved")), "{text}");
    }
    let closed = VsockBackend::Vhost { fd: Some(-1) };
    let text = refused(|c| c.vsock.as_mut().unwrap().backend = closed);
    assert!(text.starts_with("vsock.backend.vhost.fd: -1"), "{text}");
}

#[test]
fn sockets() {
    let long = PathBuf::from("x".repeat(108));
    let text = refused(|c| c.console = ChardevConfig::Unix { path: long.clone() });
    assert!(text.starts_with("console.path: ") && text.contains("108 bytes"), "{text}");
    let text = refused(|c| c.vsock.as_mut().unwrap().backend = VsockBackend::Unix { path: long });
    assert!(text.starts_with("vsock.backend.unix.path: "), "{text}");
    let text = refused(|c| c.serial = c.console.clone());
    assert_eq!(text, "serial: \"console.sock\" is also console: use a socket for each");
    let text = refused(|c| c.console = ChardevConfig::Unix { path: "vsock.sock".into() });
    assert!(text.contains("is also vsock.backend.unix.path"), "{text}");
}

#[test]
fn descriptors_and_threads() {
    let closed = ChardevConfig::Fds { input: Some(-1), output: 1 };
    assert!(refused(|c| c.console = closed).starts_with("console.input: -1"));
    let closed = ChardevConfig::Fds { input: None, output: -1 };
    assert!(refused(|c| c.serial = closed).starts_with("serial.output: -1"));
    assert!(refused(|c| c.io_threads = 65).starts_with("io_threads: 65"));
}
