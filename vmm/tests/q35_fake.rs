// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Whole q35 machines on the fake hypervisor: what a guest finds, what it can do, and what its owner is told.
//! Runs on any host.

// All of this is test code; clippy's own exception covers functions marked `#[test]` only.
#![allow(clippy::unwrap_used)]

// Shared with other tests, which use the rest.
#[allow(dead_code)]
#[path = "boards/q35.rs"]
mod board;
#[allow(dead_code)]
#[path = "machine/driver.rs"]
mod driver;
#[allow(dead_code)]
#[path = "machine/rig.rs"]
mod rig;

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use board::{ECAM, PM_BASE, power_off};
use driver::{BUFFER, DISK, find, read_sector, start_driver, transact};
use ecr_vmm::VmOptions;
use ecr_vmm::config::{ChardevConfig, ResetAction, RngConfig};
use ecr_vmm::control::{Command, EventKind, Reply, ShutdownReason};
use ecr_vmm::hypervisor::fake::{Fake, GuestCpu};
use rig::{MIB, Rig, disk, function, read, read_u64};

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
                _ => return power_off(cpu),
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

/// A driver of the entropy device.
fn take_entropy(cpu: &GuestCpu) -> [u8; 64] {
    let doorbell = start_driver(cpu, find(cpu, 0x1044_1AF4));
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

#[test]
fn a_disk_is_read_through_its_queue() {
    let mut rig = Rig::new();
    let image = rig.image("disk.img");
    rig.config.disks.push(disk("drive-7", image.clone()));
    let (vm, _) = rig.start(|cpu| {
        let doorbell = start_driver(cpu, find(cpu, DISK));
        assert_eq!(read_sector(cpu, doorbell, 3), [3u8; 512]);
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
    rig.config.disks.push(disk("drive-7", image));
    let options = VmOptions { hypervisor: Arc::new(Fake::new()), paused: true, qmp: None };
    let text = ecr_vmm::start(rig.config.clone(), options).unwrap_err().to_string();
    assert!(text.contains("disk.img has 700 bytes, which is not a positive multiple"), "{text}");
}
