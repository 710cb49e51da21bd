// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! A machine leaves nothing behind in the process that it lived in: no descriptor, thread, mapping or file,
//! however it ends. One test in a program of its own, for nobody else may open anything meanwhile.

// All of this is test code; clippy's own exception covers functions marked `#[test]` only.
#![allow(clippy::unwrap_used)]

// Shared with the tests of whole machines, which use all of it.
#[allow(dead_code)]
#[path = "boards/q35.rs"]
mod board;
#[allow(dead_code)]
#[path = "machine/rig.rs"]
mod rig;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use board::power_off;
use ecr_vmm::config::{ChardevConfig, NvdimmConfig, RngConfig, VsockBackend, VsockConfig};
use ecr_vmm::control::{Command, ShutdownReason};
use ecr_vmm::hypervisor::Exit;
use rig::{MIB, Rig};

/// What this process holds.
#[derive(Debug, PartialEq, Eq)]
struct Holdings {
    descriptors: Vec<String>,
    threads: Vec<String>,
    /// Only guest memory is kept from children.
    guest_memory: usize,
    files: BTreeSet<String>,
}

impl Holdings {
    fn now(directory: &Path) -> Self {
        Self {
            descriptors: names(Path::new("/proc/self/fd"))
                .filter_map(|fd| fs::read_link(Path::new("/proc/self/fd").join(fd)).ok())
                .map(|target| target.display().to_string())
                .filter(|target| !target.contains("/fd"))
                .collect(),
            threads: names(Path::new("/proc/self/task"))
                .filter_map(|task| fs::read_to_string(format!("/proc/self/task/{task}/comm")).ok())
                .collect(),
            guest_memory: fs::read_to_string("/proc/self/smaps")
                .unwrap()
                .lines()
                .filter(|line| line.starts_with("VmFlags:") && line.contains(" dc "))
                .count(),
            files: names(directory).collect(),
        }
    }
}

fn names(directory: &Path) -> impl Iterator<Item = String> + use<> {
    fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap())
}

/// A machine with one of everything that opens something.
fn rig() -> Rig {
    let mut rig = Rig::new();
    let path = |name| rig.dir.path().join(name);
    let image = path("image");
    fs::File::create(&image).unwrap().set_len(2 * MIB).unwrap();
    let (serial, console, vsock) = (path("serial"), path("console"), path("vsock"));
    rig.config.memory.shared = true;
    rig.config.nvdimm = Some(NvdimmConfig { id: "image".into(), path: image });
    rig.config.serial = ChardevConfig::Unix { path: serial };
    rig.config.console = ChardevConfig::Unix { path: console };
    rig.config.rng = Some(RngConfig::default());
    let backend = VsockBackend::Unix { path: vsock };
    rig.config.vsock = Some(VsockConfig { cid: 3, backend });
    rig.config.io_threads = 2;
    rig
}

#[test]
fn machines_leave_nothing_behind() {
    let rig = rig();
    let before = Holdings::now(rig.dir.path());
    for _ in 0..10 {
        let (vm, _) = rig.start(power_off);
        assert_ne!(Holdings::now(rig.dir.path()), before, "this test can see something");
        vm.send(Command::Cont).unwrap();
        assert_eq!(vm.wait(), ShutdownReason::GuestShutdown);

        let (running, _) = rig.start(|cpu| cpu.halt());
        running.send(Command::Cont).unwrap();
        running.send(Command::Reset).unwrap();
        running.send(Command::Quit).unwrap();
        assert_eq!(running.wait(), ShutdownReason::HostQuit);

        let (failing, _) = rig.start(|_| Exit::Failed("as told".into()));
        failing.send(Command::Cont).unwrap();
        assert!(matches!(failing.wait(), ShutdownReason::Failed(_)));

        let (paused, fake) = rig.start(|cpu| cpu.halt());
        drop(paused);
        assert_eq!(fake.vm().unwrap().memory_slots(), []);
        assert_eq!(fake.vm().unwrap().doorbell_addresses(), [] as [u64; 0]);
    }
    assert_eq!(Holdings::now(rig.dir.path()), before);
}
