// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Network and file system devices of whole machines on the fake hypervisor: what a guest finds, and what the
//! owner is told when a daemon goes.

// All of this is test code; clippy's own exception covers functions marked `#[test]` only.
#![allow(clippy::unwrap_used)]

// Shared with other tests of whole machines, which use the rest.
#[allow(dead_code)]
#[path = "boards/q35.rs"]
mod board;
#[allow(dead_code)]
#[path = "machine/rig.rs"]
mod rig;

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use board::power_off;
use ecr_devices::backend::tap::Tap;
use ecr_vmm::config::{FsConfig, MacAddr, NetConfig, RngConfig, TapConfig};
use ecr_vmm::control::{Command, EventKind, PciInfo, Reply, ShutdownReason};
use ecr_vmm::{VmHandle, VmOptions};
use rig::{Rig, bar, function, read};

const PATIENCE: Duration = Duration::from_secs(30);
const BAR: u64 = 4;
/// Where device configuration lies in the BAR.
const DEVICE: u64 = 0x2000;

fn net(id: &str) -> NetConfig {
    NetConfig {
        id: id.into(),
        mac: MacAddr([2, 0, 0, 0, 0, 7]),
        mtu: Some(1450),
        queue_size: 256,
        taps: Vec::new(),
        vhost: Vec::new(),
        tap: None,
    }
}

/// Root may make taps, and only where the host has the driver.
fn tap(queues: u16) -> Option<Vec<Tap>> {
    Tap::open("", queues).inspect_err(|error| println!("SKIPPED: {error}")).ok()
}

fn ids(vm: &VmHandle) -> Vec<(String, String)> {
    let Reply::Pci(functions) = vm.send(Command::QueryPci).unwrap() else { panic!("no answer") };
    let named = functions.into_iter().filter(|it: &PciInfo| !it.id.is_empty());
    named.map(|it| (it.path.to_string(), it.id)).collect()
}

fn refusal(rig: &Rig) -> String {
    let hypervisor = std::sync::Arc::new(ecr_vmm::hypervisor::fake::Fake::new());
    let options = VmOptions { hypervisor, paused: true, qmp: None };
    ecr_vmm::start(rig.config.clone(), options).unwrap_err().to_string()
}

#[test]
fn a_guest_finds_its_network() {
    let Some(taps) = tap(1) else { return };
    let mut rig = Rig::new();
    rig.config.nets.push(NetConfig { taps: vec![taps[0].as_raw_fd()], ..net("net0") });
    let (vm, _) = rig.start(|cpu| {
        assert_eq!(cpu.read_u32(function(1)), 0x1041_1AF4);
        cpu.write(function(1) + 4, &[6, 0]); // decode memory, be a master
        let at = bar(cpu, function(1), BAR) + DEVICE;
        // MAC, status, pairs of queues, MTU.
        assert_eq!(read::<6>(cpu, at), [2, 0, 0, 0, 0, 7]);
        assert_eq!(read::<2>(cpu, at + 6), [1, 0]);
        assert_eq!(read::<2>(cpu, at + 8), [1, 0]);
        assert_eq!(read::<2>(cpu, at + 10), 1450u16.to_le_bytes());
        power_off(cpu)
    });
    drop(taps);
    vm.send(Command::Cont).unwrap();
    assert_eq!(vm.wait(), ShutdownReason::GuestShutdown);
}

#[test]
fn networks_come_and_go_by_descriptors_that_the_caller_closes() {
    let mut rig = Rig::new();
    rig.config.bridges = 1;
    let (vm, _) = rig.start(power_off);
    // Each has the numbers that the one before has had.
    for n in 0..3 {
        let Some(taps) = tap(1) else { return };
        let id = format!("net{n}");
        let config = NetConfig { taps: vec![taps[0].as_raw_fd()], ..net(&id) };
        let Reply::Plugged { path } = vm.send(Command::AddNet(config)).unwrap() else {
            panic!("no path")
        };
        assert_eq!(path.to_string(), format!("02/0{}", n + 1));
    }
    let config = NetConfig { taps: vec![1_000_000], ..net("net3") };
    let error = vm.send(Command::AddNet(config)).unwrap_err().to_string();
    assert!(error.contains("network device net3: use descriptor 1000000: "), "{error}");
    assert_eq!(ids(&vm).len(), 4);
    drop(vm);
}

#[test]
fn what_is_no_tap_fails_the_start_with_a_reason() {
    let mut rig = Rig::new();
    let file = std::fs::File::open("/dev/null").unwrap();
    rig.config.nets.push(NetConfig { taps: vec![file.as_raw_fd()], ..net("net0") });
    let error = refusal(&rig);
    assert!(error.contains("network device net0: ") && error.contains("is no tap"), "{error}");
    let tap = TapConfig { name: "x".into(), queues: 1, vhost: true };
    rig.config.nets[0] = NetConfig { tap: Some(tap), ..net("net0") };
    if !Path::new("/dev/vhost-net").exists() && self::tap(1).is_some() {
        let error = refusal(&rig);
        assert!(error.contains("load the module vhost_net"), "{error}");
    }
}

/// A daemon that says what it can do, agrees to all else, and leaves when it is told to.
fn daemon(listener: UnixListener, leave: mpsc::Receiver<()>) {
    thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let answering = stream.try_clone().unwrap();
        thread::spawn(move || answer(answering));
        let _ = leave.recv();
        stream.shutdown(std::net::Shutdown::Both).unwrap();
    });
}

fn answer(mut stream: UnixStream) {
    const REPLY: u32 = 1 | 1 << 2;
    let mut header = [0; 12];
    while stream.read_exact(&mut header).is_ok() {
        let field = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
        let (request, flags, size) = (field(0), field(4), field(8));
        stream.read_exact(&mut vec![0; size as usize]).unwrap();
        let value: u64 = match request {
            1 => 1 << 32 | 1 << 30, // features
            15 => 0b1001,           // protocol: several queues, acknowledgements
            17 => 2,                // queues
            _ if flags & 1 << 3 != 0 => 0,
            _ => continue,
        };
        let mut reply = Vec::new();
        [request, REPLY, 8].iter().for_each(|field| reply.extend(field.to_le_bytes()));
        reply.extend(value.to_le_bytes());
        stream.write_all(&reply).unwrap();
    }
}

#[test]
fn a_daemon_that_goes_is_told_and_the_guest_goes_on() {
    let mut rig = Rig::new();
    let socket = rig.dir.path().join("fs.sock");
    let (leave, leaves) = mpsc::channel();
    daemon(UnixListener::bind(&socket).unwrap(), leaves);
    rig.config.memory.shared = true;
    rig.config.rng = Some(RngConfig::default());
    rig.config.fs.push(FsConfig {
        id: "fs0".into(),
        tag: "hostShared".into(),
        socket,
        queues: 4,
        queue_size: 64,
    });
    let (vm, _) = rig.start(|cpu| {
        assert_eq!(cpu.read_u32(function(2)), 0x105A_1AF4);
        cpu.write(function(2) + 4, &[6, 0]); // decode memory, be a master
        let at = bar(cpu, function(2), BAR) + DEVICE;
        assert_eq!(&read::<8>(cpu, at), b"hostShar");
        assert_eq!(read::<4>(cpu, at + 36), [1, 0, 0, 0], "as many as the daemon has");
        power_off(cpu)
    });
    assert_eq!(ids(&vm), [("01", "rng0"), ("02", "fs0")].map(|(a, b)| (a.into(), b.into())));
    let events = vm.events();
    leave.send(()).unwrap();
    let event = events.recv_timeout(PATIENCE).unwrap();
    assert_eq!(event.kind, EventKind::BackendLost { id: "fs0".into() });
    vm.send(Command::Cont).unwrap();
    assert_eq!(vm.wait(), ShutdownReason::GuestShutdown);
}

#[test]
fn a_daemon_that_is_not_there_fails_the_start_with_a_reason() {
    let mut rig = Rig::new();
    rig.config.memory.shared = true;
    rig.config.fs.push(FsConfig {
        id: "fs0".into(),
        tag: "t".into(),
        socket: rig.dir.path().join("nobody"),
        queues: 1,
        queue_size: 64,
    });
    let error = refusal(&rig);
    assert!(error.contains("file system device fs0: ") && error.contains("running?"), "{error}");
}
