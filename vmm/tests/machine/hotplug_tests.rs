// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Devices that come and go while a guest runs, on the fake hypervisor: the guest does what our ACPI methods and
//! Linux's acpiphp do, or what they would never do.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;
use std::time::Duration;

use crate::board::{self, listen, power_off};
use crate::driver::{DISK, read_sector, start_driver, submit_read};
use crate::hotplug::{Change, behind, changes, eject, place_bars};
use crate::rig::{Rig, disk, function, read_u16};
use ecr_vmm::VmHandle;
use ecr_vmm::config::RngConfig;
use ecr_vmm::control::{
    Command, CommandError, DeviceConfig, Event, EventKind, PciInfo, PciPath, Reply, ShutdownReason,
};

const PATIENCE: Duration = Duration::from_secs(30);

fn rig(bridges: u8) -> Rig {
    let mut rig = Rig::new();
    rig.config.bridges = bridges;
    rig
}

fn add(vm: &VmHandle, rig: &Rig, id: &str) -> Result<String, String> {
    let image = rig.image(&format!("{id}.img"));
    match vm.send(Command::AddDisk(disk(id, image))) {
        Ok(Reply::Plugged { path }) => Ok(path.to_string()),
        Ok(other) => panic!("{other:?}"),
        Err(error) => Err(error.to_string()),
    }
}

fn remove(vm: &VmHandle, id: &str) -> Result<Reply, CommandError> {
    vm.send(Command::RemoveDevice { id: id.into() })
}

fn functions(vm: &VmHandle) -> Vec<PciInfo> {
    let Reply::Pci(functions) = vm.send(Command::QueryPci).unwrap() else { panic!("no answer") };
    functions
}

/// Events up to the one that a device is gone; its id.
fn gone(events: &Receiver<Event>) -> String {
    loop {
        let event = events.recv_timeout(PATIENCE).unwrap();
        if let EventKind::DeviceDeleted { id } = event.kind {
            return id;
        }
    }
}

#[test]
fn bridges_stand_where_kata_looks_for_them() {
    let mut rig = rig(2);
    rig.config.rng = Some(RngConfig::default());
    rig.config.disks.push(disk("drive-0", rig.image("disk.img")));
    let (vm, _) = rig.start(|cpu| {
        for (slot, bus) in [(2, 1u8), (3, 2)] {
            assert_eq!(cpu.read_u32(function(slot)), 0x0001_1B36);
            assert_eq!(
                cpu.read_u32(function(slot) + 0x18),
                u32::from(bus) << 16 | u32::from(bus) << 8
            );
            // I/O, memory and prefetchable windows are open and not empty.
            let window =
                |at| (read_u16(cpu, function(slot) + at), read_u16(cpu, function(slot) + at + 2));
            for (base, limit) in [window(0x20), window(0x24)] {
                assert!(limit >= base, "{base:#x} {limit:#x}");
            }
            assert_ne!(read_u16(cpu, function(slot) + 0x20), 0);
            assert_ne!(cpu.read_u32(function(slot) + 0x28), 0, "above 4 GiB");
            assert_eq!(read_u16(cpu, function(slot) + 4) & 7, 7);
            assert_eq!(cpu.read_u32(behind(bus, 1)), u32::MAX);
        }
        power_off(cpu)
    });
    let found: Vec<_> =
        functions(&vm).into_iter().map(|it| (it.path.to_string(), it.bus, it.id)).collect();
    let plugged =
        [("01", "rng0"), ("02", "pci-bridge-0"), ("03", "pci-bridge-1"), ("04", "drive-0")];
    let chipset = board::CHIPSET.iter().map(|&path| (path, ""));
    let mut expected: Vec<_> =
        chipset.chain(plugged).map(|(path, id)| (path.to_owned(), 0, id.to_owned())).collect();
    expected.sort();
    assert_eq!(found, expected);
    vm.send(Command::Cont).unwrap();
    assert_eq!(vm.wait(), ShutdownReason::GuestShutdown);
}

#[test]
fn a_disk_comes_is_read_and_goes_twenty_times() {
    let rig = rig(1);
    let (vm, fake) = rig.start(|cpu| {
        listen(cpu);
        let mut left = 20;
        while left > 0 {
            for change in changes(cpu, 1) {
                match change {
                    Change::Up { bus, slot } => {
                        let config = behind(bus + 1, slot);
                        assert_eq!(cpu.read_u32(config), DISK);
                        place_bars(cpu, function(2), config);
                        let doorbell = start_driver(cpu, config);
                        assert_eq!(read_sector(cpu, doorbell, 7), [7; 512]);
                    }
                    Change::Down { bus, slot } => {
                        eject(cpu, bus, 1 << slot);
                        left -= 1;
                    }
                }
            }
        }
        power_off(cpu)
    });
    let events = vm.events();
    vm.send(Command::Cont).unwrap();
    for _ in 0..20 {
        assert_eq!(add(&vm, &rig, "drive-1"), Ok("02/01".into()));
        remove(&vm, "drive-1").unwrap();
        assert_eq!(gone(&events), "drive-1");
    }
    assert_eq!(vm.wait(), ShutdownReason::GuestShutdown);
    let left = fake.vm().unwrap();
    assert!(left.doorbell_addresses().is_empty());
}

#[test]
fn what_is_plugged_in_is_shown_until_it_is_gone() {
    let rig = rig(1);
    let (vm, _) = rig.start(|cpu| {
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
    let events = vm.events();
    vm.send(Command::Cont).unwrap();
    add(&vm, &rig, "drive-1").unwrap();
    let shown = functions(&vm).into_iter().find(|it| it.id == "drive-1").unwrap();
    assert_eq!((shown.bus, shown.path, shown.slot), (1, PciPath { bridge: Some(2), slot: 1 }, 1));
    let bridge = functions(&vm).into_iter().find_map(|it| it.bridge).unwrap();
    assert_eq!((bridge.secondary, bridge.subordinate), (1, 1));
    let block = |vm: &VmHandle| match vm.send(Command::QueryBlock).unwrap() {
        Reply::Block(blocks) => blocks.len(),
        other => panic!("{other:?}"),
    };
    assert_eq!(block(&vm), 1);
    remove(&vm, "drive-1").unwrap();
    assert_eq!(gone(&events), "drive-1");
    assert_eq!(block(&vm), 0);
    assert!(functions(&vm).iter().all(|it| it.id != "drive-1"));
}

#[test]
fn what_cannot_be_plugged_in_or_out_is_refused_in_words() {
    let mut rig = rig(1);
    rig.config.disks.push(disk("drive-0", rig.image("cold.img")));
    let (vm, _) = rig.start(|cpu| cpu.halt());
    vm.send(Command::Cont).unwrap();
    assert_eq!(add(&vm, &rig, "drive-0"), Err("Duplicate device ID 'drive-0'".into()));
    assert_eq!(add(&vm, &rig, "pci-bridge-0"), Err("Duplicate device ID 'pci-bridge-0'".into()));
    let text = vm.send(Command::AddDisk(disk("d", "/nowhere".into()))).unwrap_err().to_string();
    assert!(text.contains("/nowhere"), "{text}");
    let text = vm.send(Command::AddDisk(disk("7 up", rig.image("x.img")))).unwrap_err().to_string();
    assert!(text.contains("is no id"), "{text}");
    let text = add(&vm, &rig, "disk").map(|_| add(&vm, &rig, "disk")).unwrap();
    assert_eq!(text, Err("Duplicate device ID 'disk'".into()));
    let at = |bridge, slot| {
        let device = DeviceConfig::Disk(disk("drive-9", rig.image("drive-9.img")));
        let path = PciPath { bridge, slot };
        vm.send(Command::AddDevice { device, path }).unwrap_err().to_string()
    };
    assert_eq!(at(None, 7), "Bus 'pcie.0' does not support hotplugging");
    assert_eq!(at(Some(4), 7), "there is no bridge in PCI slot 0x4");
    assert!(at(Some(2), 0).contains("slot 0") && at(Some(2), 31).contains("slot 31"));
    assert!(at(Some(2), 1).contains("in use by device 'disk'"));

    assert_eq!(remove(&vm, "nobody"), Err(CommandError::DeviceNotFound("nobody".into())));
    let text = "Bus 'pcie.0' does not support hotplugging";
    assert_eq!(remove(&vm, "drive-0"), Err(CommandError::Failed(text.into())));
    remove(&vm, "disk").unwrap();
    let text = "Device disk is already in the process of unplug";
    assert_eq!(remove(&vm, "disk"), Err(CommandError::Failed(text.into())));
    // The guest never answers; the request may be repeated.
    std::thread::sleep(Duration::from_millis(1100));
    remove(&vm, "disk").unwrap();
}

#[test]
fn slots_are_used_up_bridge_by_bridge() {
    let rig = rig(2);
    let (vm, _) = rig.start(|cpu| cpu.halt());
    vm.send(Command::Cont).unwrap();
    for bridge in 2..4 {
        for slot in 1..=30 {
            let id = format!("drive-{bridge}-{slot}");
            assert_eq!(add(&vm, &rig, &id), Ok(format!("{bridge:02x}/{slot:02x}")));
        }
    }
    assert_eq!(add(&vm, &rig, "more"), Err("no more bridge slots available".into()));
    // All of them find a place when firmware looks again.
    vm.send(Command::Reset).unwrap();
    let placed = functions(&vm).into_iter().filter(|it| it.path.bridge.is_some()).count();
    assert_eq!(placed, 60);
}

#[test]
fn a_machine_without_bridges_says_so() {
    let rig = rig(0);
    let (vm, _) = rig.start(|cpu| cpu.halt());
    let text = add(&vm, &rig, "drive-1").unwrap_err();
    assert!(
        text.starts_with("no more bridge slots available") && text.contains("bridges"),
        "{text}"
    );
}

#[test]
fn a_reset_completes_what_the_guest_did_not_and_keeps_the_rest() {
    let rig = rig(1);
    let again = Arc::new(AtomicBool::new(false));
    let (vm, _) = rig.start({
        let again = Arc::clone(&again);
        move |cpu| {
            if again.load(Ordering::Acquire) {
                // What is left was placed as firmware places it.
                assert_eq!(cpu.read_u32(behind(1, 1)), u32::MAX);
                let config = behind(1, 2);
                assert_eq!(cpu.read_u32(config), DISK);
                let doorbell = start_driver(cpu, config);
                assert_eq!(read_sector(cpu, doorbell, 5), [5; 512]);
                return power_off(cpu);
            }
            cpu.halt()
        }
    });
    let events = vm.events();
    vm.send(Command::Cont).unwrap();
    add(&vm, &rig, "drive-1").unwrap();
    add(&vm, &rig, "drive-2").unwrap();
    remove(&vm, "drive-1").unwrap();
    again.store(true, Ordering::Release);
    vm.send(Command::Reset).unwrap();
    let kinds: Vec<_> = events.iter().map(|event| event.kind).take(3).collect();
    let deleted = EventKind::DeviceDeleted { id: "drive-1".into() };
    assert_eq!(kinds, [EventKind::Resume, deleted, EventKind::Reset { guest: false }]);
    assert_eq!(vm.wait(), ShutdownReason::GuestShutdown);
}

#[test]
fn a_guest_may_let_go_of_everything_unasked() {
    let rig = rig(1);
    let (vm, fake) = rig.start(|cpu| {
        listen(cpu);
        let mut seen = 0;
        while seen < 3 {
            seen += changes(cpu, 1).len();
        }
        let config = behind(1, 2);
        place_bars(cpu, function(2), config);
        start_driver(cpu, config);
        eject(cpu, 0, u32::MAX);
        assert_eq!(cpu.read_u32(config), u32::MAX, "gone at once");
        eject(cpu, 0, u32::MAX);
        eject(cpu, 1, u32::MAX);
        eject(cpu, u32::MAX as u8, u32::MAX);
        cpu.halt()
    });
    let events = vm.events();
    for id in ["drive-1", "drive-2", "drive-3"] {
        add(&vm, &rig, id).unwrap();
    }
    vm.send(Command::Cont).unwrap();
    let mut ids: Vec<_> = (0..3).map(|_| gone(&events)).collect();
    ids.sort();
    assert_eq!(ids, ["drive-1", "drive-2", "drive-3"]);
    assert!(fake.vm().unwrap().doorbell_addresses().is_empty());
    assert_eq!(remove(&vm, "drive-1"), Err(CommandError::DeviceNotFound("drive-1".into())));
    assert_eq!(add(&vm, &rig, "drive-1"), Ok("02/01".into()));
}

/// Descriptors of this process that lead to `path`.
fn descriptors_of(path: &Path) -> usize {
    let all = fs::read_dir("/proc/self/fd").unwrap().filter_map(Result::ok);
    all.filter(|fd| fs::read_link(fd.path()).is_ok_and(|target| target == path)).count()
}

#[test]
fn a_disk_that_is_read_at_the_moment_goes_with_all_it_held() {
    let rig = rig(1);
    let (vm, fake) = rig.start(|cpu| {
        listen(cpu);
        loop {
            for change in changes(cpu, 1) {
                if let Change::Up { bus, slot } = change {
                    let config = behind(bus + 1, slot);
                    place_bars(cpu, function(2), config);
                    let doorbell = start_driver(cpu, config);
                    submit_read(cpu, doorbell, 3);
                    eject(cpu, bus, 1 << slot);
                    // The doorbell is nobody's any more.
                    cpu.write(doorbell, &0u16.to_le_bytes());
                }
            }
        }
    });
    let events = vm.events();
    vm.send(Command::Cont).unwrap();
    for _ in 0..20 {
        add(&vm, &rig, "drive-1").unwrap();
        assert_eq!(gone(&events), "drive-1");
        assert_eq!(descriptors_of(&rig.dir.path().join("drive-1.img")), 0);
        assert!(fake.vm().unwrap().doorbell_addresses().is_empty());
    }
}

#[test]
fn a_guest_that_writes_everywhere_stops_nobody() {
    let rig = rig(2);
    let (vm, _) = rig.start(|cpu| {
        // A generator that is the same each time (Marsaglia, Xorshift RNGs).
        let mut state = 0x2545_F491_u32;
        let mut random = move || {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            state
        };
        loop {
            let (value, at) = (random(), random());
            let data = value.to_le_bytes();
            match at % 4 {
                // Hot-plug registers, of existing buses more often than of others.
                0 => board::hotplug_write(cpu, 0x10, &(value % 3).to_le_bytes()),
                1 => board::hotplug_write(cpu, (at >> 8) as u16 % 6 * 4, &data),
                // Registers of the bridges: bus numbers, windows, command.
                2 => cpu.write_u32(
                    function(2 + u64::from(at >> 8 & 1)) + u64::from(at >> 9 & 0x3C),
                    value,
                ),
                // Registers of what is behind them, if anything is.
                _ => {
                    let (bus, slot) = ((at >> 8 & 3) as u8, (at >> 10 & 31) as u8);
                    cpu.write_u32(behind(bus, slot) + u64::from(at >> 16 & 0x3C), value);
                }
            }
        }
    });
    vm.send(Command::Cont).unwrap();
    for round in 0..200 {
        // It may have been given up already, or never be.
        let _ = add(&vm, &rig, &format!("drive-{}", round % 40));
        let _ = remove(&vm, &format!("drive-{}", (round + 20) % 40));
        let _ = functions(&vm);
    }
    vm.send(Command::Reset).unwrap();
    assert!(functions(&vm).iter().any(|it| it.id == "pci-bridge-1"));
    drop(vm);
}
