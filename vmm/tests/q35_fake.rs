// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Whole q35 machines on the fake hypervisor: what a guest finds, what it can do, and what its owner is told.
//! Runs on any host.

// All of this is test code; clippy's own exception covers functions marked `#[test]` only.
#![allow(clippy::unwrap_used)]

#[path = "q35_fake/rig.rs"]
mod rig;

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use ecr_vmm::VmOptions;
use ecr_vmm::config::{ChardevConfig, DiskConfig, DiskIo, ResetAction, RngConfig};
use ecr_vmm::control::{Command, EventKind, Reply, ShutdownReason};
use ecr_vmm::hypervisor::fake::{Fake, GuestCpu};
use rig::{
    ECAM, MIB, PM_BASE, Rig, bar, capability, function, power_off, read, read_u16, read_u64,
};

const RSDP: u64 = 0xE_0000;
const CONFIG_PORTS: u16 = 0xCF8;
const RESET_CONTROL: u16 = 0xCF9;

/// The table with this signature, found as an operating system finds it.
fn acpi_table(cpu: &GuestCpu, signature: &[u8; 4]) -> u64 {
    assert_eq!(&read::<8>(cpu, RSDP), b"RSD PTR ");
    let xsdt = read_u64(cpu, RSDP + 24);
    assert_eq!(&read::<4>(cpu, xsdt), b"XSDT");
    let end = xsdt + u64::from(cpu.read_u32(xsdt + 4));
    let mut entries = (xsdt + 36..end).step_by(8).map(|at| read_u64(cpu, at));
    entries.find(|&table| &read::<4>(cpu, table) == signature).unwrap()
}

fn config_port_read(cpu: &GuestCpu, slot: u32, register: u32) -> u32 {
    cpu.port_write(CONFIG_PORTS, &(1 << 31 | slot << 11 | register).to_le_bytes());
    let mut data = [0; 4];
    cpu.port_read(CONFIG_PORTS + 4, &mut data);
    u32::from_le_bytes(data)
}

#[test]
fn tables_and_registers_agree_on_where_things_are() {
    let (vm, _) = Rig::new().start(|cpu| {
        let mcfg = acpi_table(cpu, b"MCFG");
        let ecam = read_u64(cpu, mcfg + 44);
        assert_eq!(cpu.read_u32(ecam), 0x29C0_8086, "the host bridge");
        assert_eq!(u64::from(cpu.read_u32(ecam + 0x60)), ecam | 1, "PCIEXBAR");
        let lpc = ecam + (31 << 15);
        assert_eq!(cpu.read_u32(lpc), 0x2918_8086, "the LPC bridge");

        let fadt = acpi_table(cpu, b"FACP");
        let pm_base = cpu.read_u32(fadt + 56);
        assert_eq!(cpu.read_u32(lpc + 0x40), pm_base | 1, "PMBASE");
        let timer = u16::try_from(cpu.read_u32(fadt + 76)).unwrap();
        let ticks = || {
            let mut data = [0; 4];
            cpu.port_read(timer, &mut data);
            u32::from_le_bytes(data)
        };
        let first = ticks();
        while ticks() == first {}
        assert_eq!(read_u64(cpu, fadt + 120), u64::from(RESET_CONTROL), "RESET_REG");
        power_off(cpu)
    });
    vm.send(Command::Cont).unwrap();
    assert_eq!(vm.wait(), ShutdownReason::GuestShutdown);
}

#[test]
fn both_configuration_mechanisms_show_the_same_bus() {
    let (vm, _) = Rig::new().start(|cpu| {
        for slot in 0..32u32 {
            for register in [0, 8, 0x2C] {
                let through_ecam = cpu.read_u32(function(slot.into()) + u64::from(register));
                assert_eq!(config_port_read(cpu, slot, register), through_ecam, "{slot}");
            }
        }
        assert_eq!(cpu.read_u32(ECAM + MIB), u32::MAX, "bus 1 is empty");
        power_off(cpu)
    });
    vm.send(Command::Cont).unwrap();
    assert_eq!(vm.wait(), ShutdownReason::GuestShutdown);
}

#[test]
fn a_reset_starts_again_from_a_clean_machine() {
    const SCRATCH: u64 = 2 * MIB;
    let starts = Arc::new(AtomicU32::new(0));
    let (vm, _) = Rig::new().start({
        let starts = Arc::clone(&starts);
        move |cpu| {
            assert_eq!(read_u64(cpu, SCRATCH), 0, "memory is clear");
            let mut enabled = [0; 2];
            cpu.port_read(PM_BASE + 2, &mut enabled);
            assert_eq!(enabled, [0; 2], "no event is enabled");
            assert_eq!(&read::<8>(cpu, RSDP), b"RSD PTR ", "the tables are there");
            cpu.write(SCRATCH, &[0xFF; 8]);
            cpu.port_write(PM_BASE + 2, &0x100u16.to_le_bytes());
            match starts.fetch_add(1, Ordering::Relaxed) {
                0 => cpu.port_write(RESET_CONTROL, &[6]),
                1 => cpu.port_write(0x64, &[0xFE]),
                _ => power_off(cpu),
            }
            cpu.halt()
        }
    });
    let events = vm.events();
    vm.send(Command::Cont).unwrap();
    assert_eq!(vm.wait(), ShutdownReason::GuestShutdown);
    assert_eq!(starts.load(Ordering::Relaxed), 3);
    let kinds: Vec<_> = events.iter().map(|event| event.kind).collect();
    let reset = EventKind::Reset { guest: true };
    let end = EventKind::Shutdown(ShutdownReason::GuestShutdown);
    assert_eq!(kinds, [EventKind::Resume, reset.clone(), reset, end]);
}

#[test]
fn a_reset_ends_a_machine_that_is_told_so() {
    let mut rig = Rig::new();
    rig.config.on_reset = ResetAction::Shutdown;
    let (vm, _) = rig.start(|cpu| {
        cpu.port_write(RESET_CONTROL, &[6]);
        cpu.halt()
    });
    vm.send(Command::Cont).unwrap();
    assert_eq!(vm.wait(), ShutdownReason::GuestReset);
}

#[test]
fn a_panic_is_told() {
    let (vm, _) = Rig::new().start(|cpu| {
        let mut events = [0];
        cpu.port_read(0x505, &mut events);
        assert_eq!(events[0] & 1, 1);
        cpu.port_write(0x505, &[1]);
        cpu.halt()
    });
    let events = vm.events();
    vm.send(Command::Cont).unwrap();
    assert_eq!(vm.wait(), ShutdownReason::GuestPanic);
    assert!(events.iter().any(|event| event.kind == EventKind::GuestPanicked));
}

#[test]
fn the_power_button_interrupts_the_guest() {
    const SCI: u32 = 9;
    const POWER_BUTTON: [u8; 2] = 0x100u16.to_le_bytes();
    let (vm, _) = Rig::new().start(|cpu| {
        cpu.port_write(PM_BASE + 2, &POWER_BUTTON);
        cpu.wait_for_line(SCI);
        let mut status = [0; 2];
        cpu.port_read(PM_BASE, &mut status);
        assert_eq!(status, POWER_BUTTON);
        cpu.port_write(PM_BASE, &POWER_BUTTON);
        cpu.port_read(PM_BASE, &mut status);
        assert_eq!(status, [0; 2]);
        power_off(cpu)
    });
    vm.send(Command::Powerdown).unwrap();
    vm.send(Command::Cont).unwrap();
    assert_eq!(vm.wait(), ShutdownReason::GuestShutdown);
}

#[test]
fn what_the_guest_says_last_is_in_the_reason_of_a_failure() {
    let mut rig = Rig::new();
    let log = rig.dir.path().join("serial");
    rig.config.serial = ChardevConfig::File { path: log.clone() };
    let (vm, _) = rig.start(|cpu| {
        b"giving up\n".iter().for_each(|byte| cpu.port_write(0x3F8, &[*byte]));
        panic!("no more");
    });
    vm.send(Command::Cont).unwrap();
    let ShutdownReason::Failed(reason) = vm.wait() else { panic!("the VM did not fail") };
    assert!(reason.contains("no more") && reason.ends_with("giving up"), "{reason}");
    assert_eq!(fs::read(log).unwrap(), b"giving up\n");
}

/// Message that a driver gets when buffers were used.
const MESSAGE: u32 = 0x31;
/// Where a driver puts its rings and its data.
const RINGS: u64 = 4 * MIB;
const BUFFER: u64 = 5 * MIB;

/// Bring up the virtio device with this vendor and device id and its first queue, from enumeration to
/// DRIVER_OK, and accept `features`; returns the address of the queue's doorbell.
fn start_driver(cpu: &GuestCpu, id: u32, features: u32) -> u64 {
    let is_device = |slot: &u64| cpu.read_u32(function(*slot)) == id;
    let config = function((0..32).find(is_device).unwrap());
    let virtio = |kind: u8| capability(cpu, config, 9, |at| read::<4>(cpu, at)[3] == kind).unwrap();
    let structure = |at: u64| {
        let index = u64::from(read::<1>(cpu, at + 4)[0]);
        bar(cpu, config, index) + u64::from(cpu.read_u32(at + 8))
    };
    let (common, notify) = (structure(virtio(1)), virtio(2));
    cpu.write(config + 4, &6u16.to_le_bytes());

    let msix = capability(cpu, config, 0x11, |_| true).unwrap();
    let table = bar(cpu, config, u64::from(cpu.read_u32(msix + 4) & 7)) + 16;
    for (offset, value) in [(0, 0xFEE0_0000), (4, 0), (8, MESSAGE), (12, 0)] {
        cpu.write_u32(table + offset, value);
    }
    cpu.write(msix + 2, &0x8000u16.to_le_bytes());

    for status in [0u8, 1, 3] {
        cpu.write(common + 20, &[status]);
    }
    for (select, bits) in [(0, features), (1, 1)] {
        cpu.write_u32(common + 8, select);
        cpu.write_u32(common + 12, bits);
    }
    cpu.write(common + 20, &[11]);
    assert_eq!(read(cpu, common + 20), [11u8], "the features are accepted");
    cpu.write(common + 22, &0u16.to_le_bytes());
    cpu.write(common + 24, &8u16.to_le_bytes());
    cpu.write(common + 26, &1u16.to_le_bytes());
    assert_eq!(read_u16(cpu, common + 26), 1, "vector 1");
    for (offset, area) in [(32, RINGS), (40, RINGS + 0x1000), (48, RINGS + 0x2000)] {
        cpu.write_u32(common + offset, area as u32);
        cpu.write_u32(common + offset + 4, 0);
    }
    cpu.write(common + 28, &1u16.to_le_bytes());
    cpu.write(common + 20, &[15]);
    let off = u64::from(read_u16(cpu, common + 30)) * u64::from(cpu.read_u32(notify + 16));
    structure(notify) + off
}

/// Make a chain of buffers (address, length, flags) available as the first one, and wait until it is used;
/// returns how many bytes were written to it.
fn transact(cpu: &GuestCpu, doorbell: u64, buffers: &[(u64, u32, u16)]) -> u32 {
    for (index, &(address, len, flags)) in (0u16..).zip(buffers) {
        let next = u16::from(usize::from(index) + 1 < buffers.len());
        cpu.write(RINGS + 16 * u64::from(index), &address.to_le_bytes());
        cpu.write_u32(RINGS + 16 * u64::from(index) + 8, len);
        cpu.write(RINGS + 16 * u64::from(index) + 12, &(flags | next).to_le_bytes());
        cpu.write(RINGS + 16 * u64::from(index) + 14, &(index + 1).to_le_bytes());
    }
    cpu.write(RINGS + 0x1002, &1u16.to_le_bytes());
    cpu.write(doorbell, &0u16.to_le_bytes());
    cpu.wait_for_message(MESSAGE);
    assert_eq!(read_u16(cpu, RINGS + 0x2002), 1, "one chain was used");
    cpu.read_u32(RINGS + 0x2008)
}

/// A driver of the entropy device.
fn take_entropy(cpu: &GuestCpu) -> [u8; 64] {
    let doorbell = start_driver(cpu, 0x1044_1AF4, 0);
    let written = transact(cpu, doorbell, &[(BUFFER, 64, 2)]);
    assert!((1..=64).contains(&written), "{written} bytes");
    read(cpu, BUFFER)
}

#[test]
fn a_driver_finds_its_device_and_talks_to_it_again_after_a_reset() {
    let mut rig = Rig::new();
    rig.config.rng = Some(RngConfig::default());
    let starts = AtomicU32::new(0);
    let (vm, fake) = rig.start(move |cpu| {
        assert_ne!(take_entropy(cpu), [0; 64]);
        if starts.fetch_add(1, Ordering::Relaxed) == 0 {
            cpu.port_write(RESET_CONTROL, &[6]);
            cpu.halt()
        }
        power_off(cpu)
    });
    let Reply::Pci(functions) = vm.send(Command::QueryPci).unwrap() else { panic!("no answer") };
    let ids: Vec<_> = functions.iter().map(|it| (it.slot, it.vendor, it.id.as_str())).collect();
    assert_eq!(ids, [(0, 0x8086, ""), (1, 0x1AF4, "rng0"), (31, 0x8086, "")]);
    vm.send(Command::Cont).unwrap();
    assert_eq!(vm.wait(), ShutdownReason::GuestShutdown);
    let left = fake.vm().unwrap();
    assert!(left.doorbell_addresses().is_empty() && left.memory_slots().is_empty());
}

fn disk(path: PathBuf) -> DiskConfig {
    DiskConfig {
        id: "drive-7".into(),
        path,
        readonly: false,
        direct: false,
        serial: None,
        queues: 2,
        queue_size: 8,
        io: DiskIo::Auto,
    }
}

#[test]
fn a_disk_is_read_through_its_queue() {
    let mut rig = Rig::new();
    let image = rig.dir.path().join("disk.img");
    fs::write(&image, (0..16u8).flat_map(|n| [n; 512]).collect::<Vec<u8>>()).unwrap();
    rig.config.disks.push(disk(image.clone()));
    let (vm, _) = rig.start(|cpu| {
        let doorbell = start_driver(cpu, 0x1042_1AF4, 0);
        let (header, data, status) = (BUFFER, BUFFER + 0x1000, BUFFER + 0x2000);
        // VIRTIO_BLK_T_IN and the sector.
        cpu.write(header, &[0u64.to_le_bytes(), 3u64.to_le_bytes()].concat());
        let chain = [(header, 16, 0), (data, 512, 2), (status, 1, 2)];
        assert_eq!(transact(cpu, doorbell, &chain), 513);
        assert_eq!(read(cpu, status), [0u8]);
        assert_eq!(read(cpu, data), [3u8; 512]);
        power_off(cpu)
    });
    let Reply::Block(blocks) = vm.send(Command::QueryBlock).unwrap() else { panic!("no answer") };
    let [block] = blocks.as_slice() else { panic!("one disk") };
    assert_eq!((block.id.as_str(), &block.path, block.size), ("drive-7", &image, 16 * 512));
    vm.send(Command::Cont).unwrap();
    assert_eq!(vm.wait(), ShutdownReason::GuestShutdown);
}

#[test]
fn a_file_that_is_no_disk_is_refused_in_words() {
    let mut rig = Rig::new();
    let image = rig.dir.path().join("disk.img");
    fs::write(&image, [0; 700]).unwrap();
    rig.config.disks.push(disk(image));
    let options = VmOptions { hypervisor: Arc::new(Fake::new()), paused: true, qmp: None };
    let text = ecr_vmm::start(rig.config.clone(), options).unwrap_err().to_string();
    assert!(text.contains("disk.img has 700 bytes, which is not a positive multiple"), "{text}");
}
