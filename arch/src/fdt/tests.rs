// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

use std::io::Write;
use std::process::{Command, Stdio};

use super::*;
use crate::golden::golden;
use crate::layout::virt::{self, Request, VirtMap, interrupt};
use crate::layout::{GIB, MIB};

fn machine(cpus: u32, gic: Gic) -> Description<'static> {
    let map = VirtMap::new(&Request {
        ram: GIB,
        max_ram: GIB,
        max_cpus: cpus,
        address_bits: 48,
        ..Request::default()
    })
    .unwrap();
    let device = |at, spi| Device { at, spi };
    Description {
        cpus,
        ram: map.ram,
        gic,
        timers: interrupt::TIMERS,
        uart: Some(device(virt::UART, interrupt::UART)),
        rtc: virt::RTC,
        gpio: device(virt::GPIO, interrupt::GPIO),
        power_key: 3,
        pci: PciHost {
            ecam: Range::new(map.ecam.base, MIB),
            memory: vec![virt::PCI_WINDOW_32, map.pci_window_64],
            io: virt::PCI_WINDOW_IO,
            interrupts: interrupt::PCI,
        },
        chosen: Chosen {
            cmdline: "console=hvc0 quiet",
            initrd: Some(Range::new(0x4160_0000, 5000)),
            seed: Some(Seed { kaslr: 0x0123_4567_89AB_CDEF, rng: [0x5A; 32] }),
            efi: Some(EfiTables {
                system_table: 0x4148_0000,
                memory_map: Range::new(0x4148_1000, 240),
                descriptor_size: 48,
                descriptor_version: 1,
            }),
        },
    }
}

fn gic_v3(cpus: u32) -> Gic {
    let request =
        Request { ram: GIB, max_ram: GIB, max_cpus: cpus, address_bits: 48, ..Request::default() };
    Gic::V3 {
        distributor: virt::GIC_DISTRIBUTOR,
        redistributors: VirtMap::new(&request).unwrap().redistributors,
        its: Some(virt::GIC_ITS),
        maintenance: interrupt::GIC_MAINTENANCE,
    }
}

const GIC_V2: Gic = Gic::V2 {
    distributor: virt::GIC_DISTRIBUTOR,
    cpu_interface: virt::GIC_CPU_INTERFACE,
    frame: virt::GIC_V2M,
};

/// The tree's source, by the device tree compiler, which must have nothing to say about it.
fn source(machine: &Description<'_>) -> Option<String> {
    let child = Command::new("dtc")
        .args(["-I", "dtb", "-O", "dts"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let Ok(mut child) = child else {
        eprintln!("SKIPPED: no dtc on this machine (Debian package device-tree-compiler)");
        return None;
    };
    child.stdin.take().unwrap().write_all(&build(machine).unwrap()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    Some(String::from_utf8(output.stdout).unwrap())
}

#[test]
fn trees_are_the_golden_ones() {
    for (name, machine) in [("gicv3", machine(2, gic_v3(2))), ("gicv2", machine(2, GIC_V2))] {
        if let Some(text) = source(&machine) {
            golden(&format!("virt/{name}.dts"), &text);
        }
    }
}

#[test]
fn what_is_not_there_is_not_described() {
    let mut machine = machine(1, gic_v3(1));
    machine.uart = None;
    machine.chosen.efi = None;
    machine.chosen.initrd = None;
    let Gic::V3 { its, .. } = &mut machine.gic else { unreachable!() };
    *its = None;
    let Some(text) = source(&machine) else { return };
    for absent in ["pl011", "stdout-path", "uefi", "initrd", "its", "msi"] {
        assert!(!text.contains(absent), "{absent}: {text}");
    }
}

#[test]
fn the_largest_machine_has_two_regions_and_fits_its_room() {
    let tree = build(&machine(512, gic_v3(512))).unwrap();
    assert!(tree.len() < 256 << 10, "{} bytes", tree.len());
    let Some(text) = source(&machine(512, gic_v3(512))) else { return };
    assert!(text.contains("cpu@1f0f") && text.contains("#redistributor-regions = <0x02>"));
}
