// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Whole virt machines on the fake hypervisor: what a guest finds, what it can do, and what its owner is told.
//! Runs on any host.

// All of this is test code; clippy's own exception covers functions marked `#[test]` only.
#![allow(clippy::unwrap_used)]

// Shared with other tests, which use the rest.
#[allow(dead_code)]
#[path = "boards/virt.rs"]
mod board;
#[path = "virt_fake/device_tree.rs"]
mod device_tree;
#[allow(dead_code)]
#[path = "machine/driver.rs"]
mod driver;
#[allow(dead_code)]
#[path = "machine/rig.rs"]
mod rig;

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;

use board::{GED, GED_INTERRUPT, RAM, power_off, reboot};
use device_tree::property;
use driver::{BUFFER, DISK, MESSAGE, find, read_sector, start_driver, submit, transact};
use ecr_vmm::VmOptions;
use ecr_vmm::config::{ChardevConfig, GicVersion, NvdimmConfig, RngConfig};
use ecr_vmm::control::{Command, EventKind, ShutdownReason};
use ecr_vmm::hypervisor::fake::{Fake, GuestCpu};
use ecr_vmm::hypervisor::{Exit, GicParts, GicSupport};
use rig::{MIB, Rig, disk, function, read, read_u64};

/// Where the device tree lies: behind the kernel.
const TREE: u64 = RAM + 2 * MIB;
const UART: u64 = 0x0900_0000;
const GPIO: u64 = 0x0903_0000;
const GPIO_INTERRUPT: u32 = 7;

fn be(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |value, &byte| value << 8 | u64::from(byte))
}

/// The table with this signature, found as an operating system finds it: device tree, EFI, ACPI.
fn acpi_table(cpu: &GuestCpu, signature: &[u8; 4]) -> Option<u64> {
    let system = be(&property(cpu, TREE, "chosen", "linux,uefi-system-table")?);
    assert_eq!(&read::<8>(cpu, system), b"IBI SYST");
    let (count, entries) = (read_u64(cpu, system + 104), read_u64(cpu, system + 112));
    let acpi_20 = 0x11d3_e4f1_8868_e871_u64;
    let mut entries = (0..count).map(|index| entries + index * 24);
    let entry = entries.find(|&entry| read_u64(cpu, entry) == acpi_20).unwrap();
    let rsdp = read_u64(cpu, entry + 16);
    assert_eq!(&read::<8>(cpu, rsdp), b"RSD PTR ");
    let xsdt = read_u64(cpu, rsdp + 24);
    let end = xsdt + u64::from(cpu.read_u32(xsdt + 4));
    let mut tables = (xsdt + 36..end).step_by(8).map(|at| read_u64(cpu, at));
    tables.find(|&table| &read::<4>(cpu, table) == signature)
}

fn bootargs(cpu: &GuestCpu) -> String {
    String::from_utf8(property(cpu, TREE, "chosen", "bootargs").unwrap()).unwrap()
}

fn run<P>(rig: &Rig, program: P) -> ShutdownReason
where
    P: Fn(&GuestCpu) -> Exit + Send + Sync + 'static,
{
    let (vm, _) = rig.start(program);
    vm.send(Command::Cont).unwrap();
    vm.wait()
}

/// Why a machine cannot be built on `fake`.
fn refusal(rig: &Rig, fake: Fake) -> String {
    let options = VmOptions { hypervisor: Arc::new(fake), paused: true, qmp: None };
    ecr_vmm::start(rig.config.clone(), options).unwrap_err().to_string()
}

#[test]
fn acpi_the_device_tree_and_registers_agree_on_where_things_are() {
    let mut rig = Rig::new();
    rig.config.serial = ChardevConfig::Null;
    rig.config.bridges = 1;
    let reason = run(&rig, |cpu| {
        let ecam = read_u64(cpu, acpi_table(cpu, b"MCFG").unwrap() + 44);
        assert_eq!(ecam, board::ECAM);
        let reg = property(cpu, TREE, "pcie@4010000000", "reg").unwrap();
        assert_eq!((be(&reg[..8]), be(&reg[8..])), (ecam, 2 * MIB), "two buses");
        assert_eq!(cpu.read_u32(ecam), 0x0008_1B36, "the host bridge");
        let uart = property(cpu, TREE, "serial@9000000", "reg").unwrap();
        assert_eq!(be(&uart[..8]), UART);
        assert_eq!(cpu.read_u32(UART + 0xFE0), 0x11, "a PL011");
        let spcr = acpi_table(cpu, b"SPCR").unwrap();
        assert_eq!((read_u64(cpu, spcr + 44), cpu.read_u32(spcr + 54)), (UART, 33));
        power_off(cpu)
    });
    assert_eq!(reason, ShutdownReason::GuestShutdown);
}

#[test]
fn a_kernel_that_can_is_asked_to_use_acpi() {
    let mut rig = Rig::new();
    rig.config.boot.cmdline = "quiet".into();
    let reason = run(&rig, |cpu| {
        assert_eq!(bootargs(cpu), "acpi=on quiet\0");
        power_off(cpu)
    });
    assert_eq!(reason, ShutdownReason::GuestShutdown);
}

/// Neither a kernel without EFI, nor a machine without ACPI, nor a kernel that is told so has tables.
#[test]
fn without_acpi_there_is_the_device_tree_alone() {
    let mut without_efi = Rig::new();
    let mut kernel = board::kernel();
    kernel[..2].fill(0);
    fs::write(&without_efi.config.boot.kernel, kernel).unwrap();
    without_efi.config.boot.cmdline = "quiet".into();
    let mut without_acpi = Rig::new();
    without_acpi.config.acpi = false;
    without_acpi.config.boot.cmdline = "quiet".into();
    let mut told = Rig::new();
    told.config.boot.cmdline = "quiet acpi=off".into();
    for (mut rig, remedy) in [
        (without_efi, "CONFIG_ACPI"),
        (without_acpi, "leave acpi on"),
        (told, "take acpi=off out of the kernel's command line"),
    ] {
        rig.config.bridges = 1;
        let cmdline = rig.config.boot.cmdline.clone();
        let (vm, _) = rig.start(move |cpu| {
            assert_eq!(property(cpu, TREE, "chosen", "linux,uefi-system-table"), None);
            assert_eq!(bootargs(cpu), format!("{cmdline}\0"));
            power_off(cpu)
        });
        let late = Command::AddDisk(disk("late", rig.image("late.img")));
        let text = vm.send(late).unwrap_err().to_string();
        assert!(text.contains("would not learn of new devices"), "{text}");
        assert!(text.contains(remedy), "{text}");
        vm.send(Command::Cont).unwrap();
        assert_eq!(vm.wait(), ShutdownReason::GuestShutdown);
        let image = rig.dir.path().join("image");
        fs::File::create(&image).unwrap().set_len(2 * MIB).unwrap();
        rig.config.nvdimm = Some(NvdimmConfig { id: "image".into(), path: image });
        let text = refusal(&rig, Fake::new());
        assert!(text.contains("persistent memory") && text.contains(remedy), "{text}");
    }
}

#[test]
fn each_start_has_clean_memory_and_seeds_of_its_own() {
    const SCRATCH: u64 = RAM + 32 * MIB;
    let starts = AtomicU32::new(0);
    let (told, seeds) = mpsc::channel();
    let (vm, _) = Rig::new().start(move |cpu| {
        assert_eq!(read_u64(cpu, SCRATCH), 0, "memory is clear");
        cpu.write(SCRATCH, &[0xFF; 8]);
        for seed in ["kaslr-seed", "rng-seed"] {
            told.send(property(cpu, TREE, "chosen", seed).unwrap()).unwrap();
        }
        match starts.fetch_add(1, Ordering::Relaxed) {
            0 | 1 => reboot(cpu),
            _ => power_off(cpu),
        }
    });
    let events = vm.events();
    vm.send(Command::Cont).unwrap();
    assert_eq!(vm.wait(), ShutdownReason::GuestShutdown);
    let kinds: Vec<_> = events.iter().map(|event| event.kind).collect();
    let reset = EventKind::Reset { guest: true };
    let end = EventKind::Shutdown(ShutdownReason::GuestShutdown);
    assert_eq!(kinds, [EventKind::Resume, reset.clone(), reset, end]);
    let mut seeds: Vec<_> = seeds.iter().collect();
    assert_eq!(seeds.len(), 6);
    seeds.sort();
    seeds.dedup();
    assert_eq!(seeds.len(), 6, "no seed twice");
}

/// A guest listens to the event device or to the key, as its tables tell.
#[test]
fn the_power_button_is_an_event_and_a_key() {
    const KEY: u32 = 1 << 3;
    const DATA: u64 = GPIO + ((KEY as u64) << 2);
    let (listening, listens) = mpsc::channel();
    let (vm, _) = Rig::new().start(move |cpu| {
        // Both edges, and interrupts.
        cpu.write_u32(GPIO + 0x408, KEY);
        cpu.write_u32(GPIO + 0x410, KEY);
        listening.send(()).unwrap();
        cpu.wait_for_edge(GED_INTERRUPT);
        assert_eq!(cpu.read_u32(GED), 2);
        assert_eq!(cpu.read_u32(GED), 0);
        cpu.wait_for_line(GPIO_INTERRUPT);
        cpu.write_u32(GPIO + 0x41C, KEY);
        assert_eq!((cpu.read_u32(DATA), cpu.read_u32(DATA)), (KEY, 0));
        power_off(cpu)
    });
    vm.send(Command::Cont).unwrap();
    listens.recv().unwrap();
    vm.send(Command::Powerdown).unwrap();
    assert_eq!(vm.wait(), ShutdownReason::GuestShutdown);
}

#[test]
fn a_panic_is_told() {
    let (vm, _) = Rig::new().start(|cpu| {
        let config = find(cpu, 0x0011_1B36);
        // Memory space.
        cpu.write(config + 4, &2u16.to_le_bytes());
        let register = rig::bar(cpu, config, 0);
        assert_eq!(read::<1>(cpu, register)[0] & 1, 1);
        cpu.write(register, &[1]);
        cpu.halt()
    });
    let events = vm.events();
    vm.send(Command::Cont).unwrap();
    assert_eq!(vm.wait(), ShutdownReason::GuestPanic);
    assert!(events.iter().any(|event| event.kind == EventKind::GuestPanicked));
}

#[test]
fn what_the_guest_says_last_is_in_the_reason_of_a_failure() {
    let mut rig = Rig::new();
    let log = rig.dir.path().join("serial");
    rig.config.serial = ChardevConfig::File { path: log.clone() };
    let reason = run(&rig, |cpu| {
        b"giving up\n".iter().for_each(|byte| cpu.write(UART, &[*byte]));
        panic!("no more");
    });
    let ShutdownReason::Failed(reason) = reason else { panic!("the VM did not fail") };
    assert!(reason.contains("no more") && reason.ends_with("giving up"), "{reason}");
    assert_eq!(fs::read(log).unwrap(), b"giving up\n");
}

#[test]
fn a_disk_is_read_through_its_queue_and_its_message_says_who_sent_it() {
    let mut rig = Rig::new();
    rig.config.rng = Some(RngConfig::default());
    rig.config.disks.push(disk("drive-7", rig.image("disk.img")));
    let (vm, fake) = rig.start(|cpu| {
        let doorbell = start_driver(cpu, find(cpu, DISK));
        assert_eq!(read_sector(cpu, doorbell, 3), [3u8; 512]);
        let doorbell = start_driver(cpu, function(1));
        assert_eq!(transact(cpu, doorbell, &[(BUFFER, 64, 2)]), 64);
        power_off(cpu)
    });
    vm.send(Command::Cont).unwrap();
    assert_eq!(vm.wait(), ShutdownReason::GuestShutdown);
    let messages = fake.vm().unwrap().messages();
    let sent: Vec<_> = messages.iter().map(|it| (it.address, it.data, it.requester)).collect();
    assert_eq!(
        sent,
        [(board::MESSAGES, MESSAGE, 2 << 3), (board::MESSAGES, MESSAGE, 1 << 3)],
        "slots 2 and 1 of the root bus"
    );
}

#[test]
fn the_interrupt_controller_is_the_one_that_is_asked_for() {
    let all = GicSupport { v2: true, v3: true, its: true };
    let none = GicSupport::default();
    let gic = |wanted: GicVersion, support: GicSupport, cpus: u32| {
        let mut rig = Rig::new();
        rig.config.gic = wanted;
        rig.config.cpus.boot = cpus;
        rig.config.cpus.max = cpus;
        let fake = Arc::new(Fake::new().with_gic(support));
        let options = VmOptions { hypervisor: Arc::clone(&fake) as _, paused: true, qmp: None };
        let vm = ecr_vmm::start(rig.config.clone(), options).map_err(|error| error.to_string())?;
        drop(vm);
        Ok::<_, String>(fake.vm().unwrap().gic().unwrap().parts)
    };
    let regions = |parts: &GicParts| match parts {
        GicParts::V3 { redistributors, its } => (redistributors.len(), its.is_some()),
        GicParts::V2 { .. } => (0, false),
    };
    assert_eq!(regions(&gic(GicVersion::Host, all, 1).unwrap()), (1, true));
    assert_eq!(regions(&gic(GicVersion::V3, all, 124).unwrap()), (2, true));
    assert_eq!(regions(&gic(GicVersion::V2, all, 8).unwrap()), (0, false));
    let old = GicSupport { v2: true, ..none };
    assert_eq!(regions(&gic(GicVersion::Host, old, 8).unwrap()), (0, false));
    let without_its = GicSupport { v3: true, ..none };
    assert_eq!(regions(&gic(GicVersion::Host, without_its, 1).unwrap()), (1, false));
    for (wanted, support, cpus, words) in [
        (GicVersion::V3, old, 1, "gic-version=3 was asked for"),
        (GicVersion::V2, without_its, 1, "gic-version=2 was asked for"),
        (GicVersion::Host, none, 1, "no interrupt controller for guests"),
        (GicVersion::V3, none, 1, "no interrupt controller for guests"),
        (GicVersion::Host, all, 513, "more than the 512"),
        (GicVersion::Host, old, 9, "at most 8"),
        (GicVersion::V2, all, 9, "GICv2 can interrupt"),
    ] {
        let text = gic(wanted, support, cpus).unwrap_err();
        assert!(text.contains(words), "{text}");
    }
}

#[test]
fn what_the_hosts_addresses_do_not_reach_is_refused_in_words() {
    let mut rig = Rig::new();
    rig.config.memory.max = Some(512 << 30);
    rig.config.memory.slots = 10;
    let mut capabilities = ecr_vmm::hypervisor::Hypervisor::capabilities(&Fake::new()).clone();
    capabilities.physical_address_bits = 36;
    let text = refusal(&rig, Fake::new().with_capabilities(capabilities));
    assert!(text.contains("36-bit") && text.contains("40 bits would be needed"), "{text}");
    rig.config.memory.max = None;
    rig.config.memory.slots = 0;
    fs::write(&rig.config.boot.kernel, b"\x7fELF").unwrap();
    let text = refusal(&rig, Fake::new());
    assert!(text.contains("it is an ELF file"), "{text}");
}

/// Whatever a guest writes to the registers of the board, nothing breaks.
#[test]
fn no_write_to_the_chipset_breaks_it() {
    let mut rig = Rig::new();
    rig.config.serial = ChardevConfig::Null;
    rig.config.bridges = 1;
    rig.config.rng = Some(RngConfig::default());
    let reason = run(&rig, |cpu| {
        for base in [0x0900_0000, 0x0901_0000, GPIO, GED, 0x090C_0000, 0x3EFF_0000] {
            for offset in (0..0x40).chain(0x400..0x440).chain(0xFE0..0x1000) {
                for width in [1, 2, 4, 8] {
                    cpu.write(base + offset, &[0xA5; 8][..width]);
                    cpu.read(base + offset, &mut [0; 8][..width]);
                }
            }
        }
        let doorbell = start_driver(cpu, find(cpu, 0x1044_1AF4));
        submit(cpu, doorbell, &[(BUFFER, 64, 2)]);
        cpu.wait_for_message(MESSAGE);
        power_off(cpu)
    });
    assert_eq!(reason, ShutdownReason::GuestShutdown);
}
