// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

use clap::CommandFactory;

use super::*;

fn invocation(arguments: &[&str]) -> Invocation {
    let words = ["ecr-vmm", "--kernel", "vmlinux"];
    parse(words.iter().chain(arguments)).unwrap()
}

fn config(arguments: &[&str]) -> VmConfig {
    invocation(arguments).config
}

/// The text of the refusal, on one line.
#[track_caller]
fn refused(arguments: &[&str]) -> String {
    let words = ["ecr-vmm", "--kernel", "vmlinux"];
    let error = parse(words.iter().chain(arguments)).unwrap_err().to_string();
    error.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[test]
fn a_kernel_is_enough() {
    let invocation = invocation(&[]);
    let config = &invocation.config;
    assert_eq!(config.cpus, CpuConfig { boot: 1, max: 1 });
    assert_eq!(config.memory.size, 256 << 20);
    assert_eq!(config.boot.cmdline, "console=hvc0");
    assert_eq!((&config.console, &config.serial), (&STDIO, &ChardevConfig::Off));
    assert!(invocation.uses_stdio && invocation.qmp.is_none() && !invocation.paused);
    assert_eq!(invocation.log, LogTarget { level: log::LevelFilter::Warn, file: None });
}

#[test]
fn cpus_and_memory() {
    let config = config(&[
        "--cpus",
        "2,max=4",
        "--memory",
        "512M,max=2G,slots=2,shared=on,hugepages,prealloc=off",
    ]);
    assert_eq!(config.cpus, CpuConfig { boot: 2, max: 4 });
    assert_eq!(config.memory.size, 512 << 20);
    assert_eq!(config.memory.max, Some(2 << 30));
    assert_eq!(config.memory.slots, 2);
    assert_eq!(config.memory.hugepages, Some(2 << 20));
    assert!(config.memory.shared && !config.memory.prealloc);
}

#[test]
fn huge_pages_of_a_size() {
    let memory = |text| config(&["--memory", text]).memory.hugepages;
    assert_eq!(memory("2G,hugepages=1G"), Some(1 << 30));
    assert_eq!(memory("2G,hugepages=off"), None);
    assert!(refused(&["--memory", "2G,hugepages=big"]).contains("hugepages=big: use a whole"));
}

#[test]
fn an_image_is_the_root_on_persistent_memory() {
    let config = config(&["--image", "rootfs.img"]);
    assert_eq!(config.nvdimm.unwrap().path, PathBuf::from("rootfs.img"));
    assert_eq!(
        config.boot.cmdline,
        "console=hvc0 root=/dev/pmem0p1 rootflags=dax rootfstype=ext4 ro"
    );
}

#[test]
fn an_image_can_be_the_first_disk() {
    let config = config(&["--disk", "data.img", "--image", "rootfs.img,as=disk"]);
    assert_eq!(config.nvdimm, None);
    let disks: Vec<_> = config.disks.iter().map(|d| (d.id.as_str(), d.readonly)).collect();
    assert_eq!(disks, [("image", true), ("disk1", false)]);
    assert_eq!(config.boot.cmdline, "console=hvc0 root=/dev/vda1 rootfstype=ext4 ro");
}

#[test]
fn the_first_disk_is_the_root_where_nothing_else_can_be() {
    let cmdline = |arguments: &[&str]| config(arguments).boot.cmdline;
    assert_eq!(cmdline(&["--disk", "a"]), "console=hvc0 root=/dev/vda rw");
    assert_eq!(cmdline(&["--disk", "a,readonly"]), "console=hvc0 root=/dev/vda ro");
    assert_eq!(cmdline(&["--disk", "a", "--initrd", "i"]), "console=hvc0");
}

#[test]
fn what_is_given_is_not_filled_in() {
    let cmdline = |arguments: &[&str]| config(arguments).boot.cmdline;
    assert_eq!(
        cmdline(&["--image", "i", "--cmdline", "console=ttyS1 root=LABEL=x"]),
        "console=ttyS1 root=LABEL=x"
    );
    assert_eq!(cmdline(&["--cmdline", "quiet"]), "console=hvc0 quiet");
    assert_eq!(cmdline(&["--serial", "null"]), "console=ttyS0 console=hvc0");
    assert_eq!(cmdline(&["--console", "off"]), "");
}

#[test]
fn disks() {
    let config = config(&[
        "--disk",
        "path=a.img,readonly=on,direct,serial=S1,queues=4,queue_size=128,io=sync,id=root",
        "--disk",
        "b,,c.img",
    ]);
    assert_eq!(
        config.disks[0],
        DiskConfig {
            id: "root".into(),
            path: "a.img".into(),
            readonly: true,
            direct: true,
            serial: Some("S1".into()),
            queues: 4,
            queue_size: 128,
            io: DiskIo::Sync,
        }
    );
    assert_eq!(config.disks[1].path, PathBuf::from("b,c.img"));
    assert_eq!(config.disks[1].id, "disk1");
}

#[test]
fn other_devices() {
    let rng = |arguments: &[&str]| config(arguments).rng.map(|rng| rng.path);
    assert_eq!(rng(&[]), None);
    assert_eq!(rng(&["--rng"]), Some("/dev/urandom".into()));
    assert_eq!(rng(&["--rng=/dev/hwrng"]), Some("/dev/hwrng".into()));
    let vsock = |text| config(&["--vsock", text]).vsock.unwrap();
    assert_eq!(vsock("cid=3"), VsockConfig { cid: 3, backend: VsockBackend::Vhost { fd: None } });
    assert_eq!(vsock("cid=5,socket=v.sock").backend, VsockBackend::Unix { path: "v.sock".into() });
}

#[test]
fn networks_and_file_systems() {
    let config = config(&[
        "--memory",
        "512M,shared",
        "--net",
        "tap=tap0",
        "--net",
        "tap=tap1,id=lan",
        "--fs",
        "socket=a.sock,tag=a",
        "--fs",
        "socket=b.sock,tag=b",
    ]);
    let ids: Vec<_> = config.nets.iter().map(|net| net.id.as_str()).collect();
    assert_eq!(ids, ["net0", "lan"]);
    assert_ne!(config.nets[0].mac, config.nets[1].mac);
    let ids: Vec<_> = config.fs.iter().map(|fs| fs.id.as_str()).collect();
    assert_eq!(ids, ["fs0", "fs1"]);
    assert!(refused(&["--fs", "socket=a,tag=a"]).starts_with("memory.shared: off"));
    assert!(refused(&["--net", "tap=a/b"]).starts_with("nets[0].tap.name: "));
}

#[test]
fn consoles() {
    let invocation = invocation(&["--console", "unix:c.sock", "--serial", "file:log"]);
    assert_eq!(invocation.config.console, ChardevConfig::Unix { path: "c.sock".into() });
    assert_eq!(invocation.config.serial, ChardevConfig::File { path: "log".into() });
    assert!(!invocation.uses_stdio);
    assert!(refused(&["--serial", "stdio"]).starts_with("serial: stdio is the console's"));
    assert!(refused(&["--console", "tty"]).contains("use stdio, unix:PATH"));
}

#[test]
fn control() {
    let invocation = invocation(&[
        "--qmp",
        "unix:q.sock",
        "--paused",
        "--name",
        "vm",
        "--uuid",
        "12345678-1234-1234-1234-123456789abc",
        "--log",
        "debug,file=vmm.log",
        "--no-reboot",
    ]);
    assert_eq!(invocation.qmp, Some("q.sock".into()));
    assert!(invocation.paused);
    assert_eq!(invocation.config.name.as_deref(), Some("vm"));
    assert_eq!(invocation.config.on_reset, ResetAction::Shutdown);
    assert_eq!(
        invocation.log,
        LogTarget { level: log::LevelFilter::Debug, file: Some("vmm.log".into()) }
    );
}

#[test]
fn mistakes_name_the_argument_the_value_and_what_would_work() {
    assert!(refused(&["--qmp", "q.sock"]).contains("use unix:PATH"));
    assert!(refused(&["--log", "loud"]).contains("use off, error"));
    assert!(refused(&["--machine", "pc"]).contains("type=pc: use q35 or virt"));
    assert!(refused(&["--machine", "q35,acpi=off"]).contains("for virt only"));
    assert!(refused(&["--machine", "virt,gic-version=4"]).contains("use host, 2 or 3"));
    assert!(refused(&["--memory", "512"]).contains("the unit is missing: use 512M"));
    assert!(refused(&["--memory", "1G,swap=on"]).contains("there is no \"swap\": use size, max"));
    assert!(refused(&["--cpus", "many"]).contains("whole number"));
    assert!(refused(&["--disk", "readonly=on"]).contains("path= is missing"));
    assert!(refused(&["--cpus", "0"]).starts_with("cpus.boot: 0"));
    assert!(refused(&["--paused"]).contains("--qmp"));
    assert_eq!(
        refused(&["--qmp", "unix:s", "--console", "unix:s"]),
        "qmp: \"s\" is also console: use a socket for each"
    );
    let long = format!("unix:{}", "x".repeat(108));
    assert!(refused(&["--qmp", &long]).contains("108 bytes"));
    assert!(parse(["ecr-vmm"]).unwrap_err().to_string().contains("--kernel"));
}

#[test]
fn the_definition_is_sound_and_help_is_grouped() {
    let mut command = Arguments::command();
    command.clone().debug_assert();
    let help = command.render_help().to_string();
    for heading in ["Boot:", "Machine:", "Devices:", "Control:", "Examples:"] {
        assert!(help.contains(heading), "{help}");
    }
    for line in help.lines() {
        assert!(line.len() <= 120, "{line}");
    }
}
