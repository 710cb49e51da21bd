// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Devices that QMP clients plug in and out of a whole machine on the fake hypervisor. The texts of refusals were
//! recorded from QEMU 10.0.

// All of this is test code; clippy's own exception covers functions marked `#[test]` only. Arguments are
// written on the spot.
#![allow(clippy::unwrap_used, clippy::needless_pass_by_value)]

// Shared with other tests of whole machines, which use the rest.
#[allow(dead_code)]
#[path = "boards/q35.rs"]
mod board;
#[path = "machine/hotplug.rs"]
mod hotplug;
#[allow(dead_code)]
#[path = "machine/rig.rs"]
mod rig;

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command as Process;
use std::time::Duration;

use board::listen;
use ecr_devices::backend::tap::Tap;
use ecr_vmm::VmHandle;
use ecr_vmm::control::Command;
use hotplug::{Change, behind, changes, eject, place_bars};
use rig::{Rig, function};
use serde_json::{Value, json};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// A client that waits for each line.
struct Client {
    stream: BufReader<UnixStream>,
    events: Vec<Value>,
}

impl Client {
    fn connect(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let mut client = Self { stream: BufReader::new(stream), events: Vec::new() };
        client.line();
        assert_eq!(client.ask("qmp_capabilities", json!({})), Ok(json!({})));
        client
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.stream.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    /// The answer: what is returned, or class and text of the refusal.
    fn ask(&mut self, command: &str, arguments: Value) -> Result<Value, (String, String)> {
        let line = json!({"execute": command, "arguments": arguments}).to_string();
        self.stream.get_mut().write_all(line.as_bytes()).unwrap();
        self.answer()
    }

    fn answer(&mut self) -> Result<Value, (String, String)> {
        loop {
            let mut line = self.line();
            if line.get("event").is_some() {
                self.events.push(line);
            } else if let Some(error) = line.get("error") {
                let text = |name: &str| error[name].as_str().unwrap().to_owned();
                return Err((text("class"), text("desc")));
            } else {
                return Ok(line["return"].take());
            }
        }
    }

    fn refusal(&mut self, command: &str, arguments: Value) -> String {
        self.ask(command, arguments).unwrap_err().1
    }

    /// The next event of this name; its data.
    fn event(&mut self, name: &str) -> Value {
        loop {
            while let Some(event) = (!self.events.is_empty()).then(|| self.events.remove(0)) {
                if event["event"] == name {
                    return event["data"].clone();
                }
            }
            let line = self.line();
            self.events.push(line);
        }
    }
}

/// A machine with a bridge and a guest that does what it is asked to.
fn start(rig: &mut Rig) -> (VmHandle, std::path::PathBuf) {
    rig.config.bridges = 1;
    let socket = rig.dir.path().join("qmp.sock");
    let vm = rig.start_with_qmp(&socket, |cpu| {
        listen(cpu);
        loop {
            for change in changes(cpu, 1) {
                match change {
                    Change::Up { bus, slot } => place_bars(cpu, function(2), behind(bus + 1, slot)),
                    Change::Down { bus, slot } => eject(cpu, bus, 1 << slot),
                }
            }
        }
    });
    vm.send(Command::Cont).unwrap();
    (vm, socket)
}

/// Kata's way to describe a disk.
fn blockdev(name: &str, path: &Path) -> Value {
    json!({
        "driver": "raw", "node-name": name, "read-only": false, "cache": {"direct": false, "no-flush": false},
        "file": {"driver": "file", "filename": path, "aio": "threads"},
    })
}

/// Kata's way to plug it in.
fn virtio_blk(id: &str, drive: &str, addr: &str) -> Value {
    json!({
        "driver": "virtio-blk-pci", "id": id, "drive": drive, "bus": "pci-bridge-0", "addr": addr,
        "share-rw": "on", "num-queues": "1", "romfile": "", "disable-modern": "false",
        "logical_block_size": 512, "write-cache": "auto",
    })
}

#[test]
fn kata_plugs_a_disk_in_and_out_and_in_again() {
    let mut rig = Rig::new();
    let image = rig.image("disk.img");
    let (_vm, socket) = start(&mut rig);
    for _ in 0..3 {
        // Kata connects anew after each lost connection.
        let mut client = Client::connect(&socket);
        assert_eq!(client.ask("blockdev-add", blockdev("drive-1", &image)), Ok(json!({})));
        let device = virtio_blk("virtio-drive-1", "drive-1", "07");
        assert_eq!(client.ask("device_add", device), Ok(json!({})));
        let shown = client.ask("query-pci", json!({})).unwrap();
        let bridge =
            shown[0]["devices"].as_array().unwrap().iter().find(|it| it["slot"] == 2).unwrap();
        assert_eq!(bridge["qdev_id"], "pci-bridge-0");
        let behind = &bridge["pci_bridge"]["devices"][0];
        assert_eq!((&behind["slot"], &behind["qdev_id"]), (&json!(7), &json!("virtio-drive-1")));

        let in_use = client.refusal("blockdev-del", json!({"node-name": "drive-1"}));
        assert_eq!(in_use, "Node drive-1 is in use");
        assert_eq!(client.ask("device_del", json!({"id": "virtio-drive-1"})), Ok(json!({})));
        let gone =
            json!({"device": "virtio-drive-1", "path": "/machine/peripheral/virtio-drive-1"});
        assert_eq!(client.event("DEVICE_DELETED"), gone);
        assert_eq!(client.ask("blockdev-del", json!({"node-name": "drive-1"})), Ok(json!({})));
    }
}

#[test]
fn a_raw_node_may_name_its_file_and_a_read_only_one_serves_many() {
    let mut rig = Rig::new();
    let image = rig.image("disk.img");
    let (_vm, socket) = start(&mut rig);
    let mut client = Client::connect(&socket);
    let file = json!({"node-name": "f0", "driver": "file", "filename": image,
                      "auto-read-only": true, "discard": "unmap"});
    assert_eq!(client.ask("blockdev-add", file), Ok(json!({})));
    let raw = json!({"node-name": "d0", "driver": "raw", "file": "f0", "read-only": true});
    assert_eq!(client.ask("blockdev-add", raw), Ok(json!({})));
    assert_eq!(client.refusal("blockdev-del", json!({"node-name": "f0"})), "Node f0 is in use");
    for (id, addr) in [("a", "1"), ("b", "2")] {
        assert_eq!(client.ask("device_add", virtio_blk(id, "d0", addr)), Ok(json!({})));
    }
    // Without an address it is the first free slot.
    let device =
        json!({"driver": "virtio-blk-pci", "id": "c", "drive": "d0", "bus": "pci-bridge-0"});
    assert_eq!(client.ask("device_add", device), Ok(json!({})));
    let blocks = client.ask("query-block", json!({})).unwrap();
    let ids: Vec<_> = blocks.as_array().unwrap().iter().map(|it| it["device"].clone()).collect();
    assert_eq!(ids, ["a", "b", "c"]);
    assert_eq!(blocks[0]["inserted"]["ro"], true);
}

#[test]
fn refusals_read_as_qemu_writes_them() {
    let mut rig = Rig::new();
    let image = rig.image("disk.img");
    let (_vm, socket) = start(&mut rig);
    let mut client = Client::connect(&socket);
    let mut refused = |command: &str, arguments: Value, text: &str| {
        assert_eq!(client.refusal(command, arguments), text);
    };
    refused(
        "blockdev-add",
        json!({"driver": "raw"}),
        "'node-name' must be specified for the root node",
    );
    refused(
        "blockdev-add",
        json!({"driver": "qcow2", "node-name": "q"}),
        "Parameter 'driver' does not accept value 'qcow2'",
    );
    refused(
        "blockdev-add",
        json!({"driver": "raw", "node-name": "q"}),
        "Parameter 'file' is missing",
    );
    refused(
        "blockdev-add",
        json!({"driver": "raw", "node-name": "q", "file": "nobody"}),
        "Cannot find device='nobody' nor node-name='nobody'",
    );
    refused(
        "blockdev-add",
        json!({"driver": "file", "node-name": "q", "filename": "/none"}),
        "Could not open '/none': No such file or directory",
    );
    refused("blockdev-del", json!({"node-name": "q"}), "Failed to find node with node-name='q'");
    refused("device_add", json!({}), "Parameter 'driver' is missing");
    refused(
        "device_add",
        json!({"driver": "nonexist"}),
        "'nonexist' is not a valid device model name",
    );
    refused(
        "device_add",
        virtio_blk("v", "nobody", "1"),
        "Property 'virtio-blk-device.drive' can't find value 'nobody'",
    );
    assert_eq!(client.ask("blockdev-add", blockdev("d0", &image)), Ok(json!({})));
    let mut refused = |change: &[(&str, Value)], text: &str| {
        let mut arguments = virtio_blk("v", "d0", "1");
        for (name, value) in change {
            arguments[*name] = value.clone();
        }
        assert_eq!(client.refusal("device_add", arguments), text);
    };
    refused(&[("bus", json!("pcie.0"))], "Bus 'pcie.0' does not support hotplugging");
    refused(&[("bus", json!("br7"))], "Bus 'br7' not found");
    refused(&[("addr", json!("01.1"))], "Property 'virtio-blk-pci.addr' doesn't take value '01.1'");
    refused(
        &[("num-queues", json!("x"))],
        "Property 'virtio-blk-pci.num-queues' doesn't take value 'x'",
    );
    refused(
        &[("logical_block_size", json!("4096"))],
        "Property 'virtio-blk-pci.logical_block_size' doesn't take value '4096'",
    );
    refused(
        &[("write-cache", json!("off"))],
        "Property 'virtio-blk-pci.write-cache' doesn't take value 'off'",
    );
    refused(&[("colour", json!("red"))], "Property 'virtio-blk-pci.colour' not found");
    refused(
        &[("share-rw", json!("maybe"))],
        "Property 'virtio-blk-pci.share-rw' doesn't take value 'maybe'",
    );
    refused(&[("id", json!("pci-bridge-0"))], "Duplicate device ID 'pci-bridge-0'");
    assert_eq!(client.ask("device_add", virtio_blk("v", "d0", "1")), Ok(json!({})));
    assert_eq!(
        client.refusal("device_add", virtio_blk("w", "d0", "1")),
        "PCI: slot 1 function 0 not available, in use by device 'v'"
    );
    assert_eq!(
        client.refusal("blockdev-add", blockdev("d0", &image)),
        "Duplicate nodes with node-name='d0'"
    );
    let not_found = ("DeviceNotFound".to_owned(), "Device 'nobody' not found".to_owned());
    assert_eq!(client.ask("device_del", json!({"id": "nobody"})), Err(not_found));
    let root = client.refusal("device_del", json!({"id": "pci-bridge-0"}));
    assert_eq!(root, "Bus 'pcie.0' does not support hotplugging");
}

#[test]
fn a_node_is_free_again_after_a_reset_that_took_its_device() {
    let mut rig = Rig::new();
    rig.config.bridges = 1;
    let image = rig.image("disk.img");
    let socket = rig.dir.path().join("qmp.sock");
    // A guest that never listens.
    let _vm = rig.start_with_qmp(&socket, |cpu| cpu.halt());
    let mut client = Client::connect(&socket);
    assert_eq!(client.ask("blockdev-add", blockdev("d0", &image)), Ok(json!({})));
    assert_eq!(client.ask("device_add", virtio_blk("v", "d0", "1")), Ok(json!({})));
    assert_eq!(client.ask("device_del", json!({"id": "v"})), Ok(json!({})));
    let again = client.refusal("device_del", json!({"id": "v"}));
    assert_eq!(again, "Device v is already in the process of unplug");
    assert_eq!(client.ask("system_reset", json!({})), Ok(json!({})));
    assert_eq!(client.event("DEVICE_DELETED")["device"], "v");
    assert_eq!(client.ask("blockdev-del", json!({"node-name": "d0"})), Ok(json!({})));
}

#[test]
fn descriptors_come_with_the_command_and_have_names() {
    let mut rig = Rig::new();
    let (_vm, socket) = start(&mut rig);
    let mut client = Client::connect(&socket);
    let none = client.refusal("getfd", json!({"fdname": "x"}));
    assert_eq!(none, "No file descriptor supplied via SCM_RIGHTS");
    let null = File::open("/dev/null").unwrap();
    for name in ["x", "y", "x"] {
        getfd(&mut client, name, null.as_raw_fd());
    }
    assert_eq!(client.ask("closefd", json!({"fdname": "x"})), Ok(json!({})));
    let gone = client.refusal("closefd", json!({"fdname": "x"}));
    assert_eq!(gone, "File descriptor named 'x' not found");
}

/// A tap of two queues; root may make one, and only where the host has the driver.
fn taps() -> Option<Vec<Tap>> {
    let name = format!("ecr{}", std::process::id());
    Tap::open(&name, 2).inspect_err(|error| println!("SKIPPED: {error}")).ok()
}

/// Send a descriptor and give it a name.
fn getfd(client: &mut Client, name: &str, fd: RawFd) {
    let line = json!({"execute": "getfd", "arguments": {"fdname": name}}).to_string();
    client.stream.get_ref().send_with_fd(line.as_bytes(), fd).unwrap();
    assert_eq!(client.answer(), Ok(json!({})));
}

#[test]
fn kata_plugs_a_network_in_and_out() {
    let mut rig = Rig::new();
    let (_vm, socket) = start(&mut rig);
    let mut client = Client::connect(&socket);
    for _ in 0..3 {
        let Some(taps) = taps() else { return };
        getfd(&mut client, "fd0", taps[0].as_raw_fd());
        getfd(&mut client, "fd1", taps[1].as_raw_fd());
        let netdev = json!({"type": "tap", "id": "tap0", "fds": "fd0:fd1", "vhost": false});
        assert_eq!(client.ask("netdev_add", netdev.clone()), Ok(json!({})));
        assert_eq!(client.refusal("netdev_add", netdev), "Duplicate ID 'tap0' for netdev");
        let device = json!({
            "driver": "virtio-net-pci", "id": "virtio-tap0", "netdev": "tap0", "mac": "02:00:00:00:00:07",
            "bus": "pci-bridge-0", "addr": "02", "romfile": "", "mq": "on", "vectors": 6,
        });
        assert_eq!(client.ask("device_add", device.clone()), Ok(json!({})));
        let mut second = device;
        second["id"] = json!("virtio-tap1");
        assert_eq!(
            client.refusal("device_add", second),
            "Device 'tap0' is in use by 'virtio-tap0'"
        );
        let in_use = client.refusal("netdev_del", json!({"id": "tap0"}));
        assert_eq!(in_use, "Device 'tap0' is in use by 'virtio-tap0'");
        assert_eq!(client.ask("device_del", json!({"id": "virtio-tap0"})), Ok(json!({})));
        assert_eq!(client.event("DEVICE_DELETED")["device"], "virtio-tap0");
        assert_eq!(client.ask("netdev_del", json!({"id": "tap0"})), Ok(json!({})));
    }
}

#[test]
fn a_network_that_cannot_be_is_refused() {
    let mut rig = Rig::new();
    let (_vm, socket) = start(&mut rig);
    let mut client = Client::connect(&socket);
    let null = File::open("/dev/null").unwrap();
    let netdev = |more: Value| {
        let mut all = json!({"type": "tap", "id": "tap0"});
        all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        all
    };
    for (more, text) in [
        (json!({}), "a tap needs fd= or fds=: name what getfd received"),
        // A number would be one of this process's own descriptors.
        (json!({"fds": "0"}), "File descriptor named '0' has not been found"),
        (
            json!({"fds": "a:b", "vhostfds": "c"}),
            "The number of fds passed does not match the number of vhostfds passed",
        ),
        (json!({"fds": "a", "vhost": 3}), "Invalid parameter type for 'vhost', expected: boolean"),
        (json!({"type": "user"}), "Parameter 'type' does not accept value 'user'"),
    ] {
        assert_eq!(client.refusal("netdev_add", netdev(more)), text);
    }
    getfd(&mut client, "fd0", null.as_raw_fd());
    assert_eq!(client.ask("netdev_add", netdev(json!({"fds": "fd0"}))), Ok(json!({})));
    let mut refused = |more: Value, text: &str| {
        let mut all = json!({"driver": "virtio-net-pci", "id": "n", "netdev": "tap0",
                             "mac": "02:00:00:00:00:07", "bus": "pci-bridge-0"});
        all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let said = client.refusal("device_add", all);
        assert!(said.contains(text), "{said}");
    };
    refused(json!({}), "is no tap");
    refused(json!({"mac": "2"}), "Property 'virtio-net-pci.mac' doesn't take value '2'");
    refused(json!({"netdev": "x"}), "Property 'virtio-net-device.netdev' can't find value 'x'");
    refused(json!({"mq": "maybe"}), "Property 'virtio-net-pci.mq' doesn't take value 'maybe'");
    let not_found = ("DeviceNotFound".to_owned(), "Device 'x' not found".to_owned());
    assert_eq!(client.ask("netdev_del", json!({"id": "x"})), Err(not_found));
    assert_eq!(client.ask("netdev_del", json!({"id": "tap0"})), Ok(json!({})));
}

#[test]
fn qemus_own_client_plugs_a_disk_in_and_out() {
    let Some(python) = std::env::var_os("ECR_QMP_PYTHON") else {
        eprintln!("SKIPPED: ECR_QMP_PYTHON names no Python that has qemu.qmp");
        return;
    };
    let mut rig = Rig::new();
    let image = rig.image("disk.img");
    let (_vm, socket) = start(&mut rig);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/qmp/hotplug.py");
    let output = Process::new(python).arg(script).arg(socket).arg(image).output().unwrap();
    assert!(
        output.status.success(),
        "{}\n{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}
