// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What tests of whole machines must know of a q35.

use ecr_vmm::config::MachineType;
use ecr_vmm::hypervisor::Exit;
use ecr_vmm::hypervisor::fake::GuestCpu;

pub(crate) const MACHINE: MachineType = MachineType::Q35;
pub(crate) const ECAM: u64 = 0xB000_0000;
/// Where RAM begins.
pub(crate) const RAM: u64 = 0;
/// Where messages go.
pub(crate) const MESSAGES: u64 = 0xFEE0_0000;
/// Slots of the root bus that the chipset has.
pub(crate) const CHIPSET: &[&str] = &["00", "1f"];
pub(crate) const PM_BASE: u16 = 0x600;
const ENTRY: u64 = 1 << 20;
const SCI: u32 = 9;
const GPE0_STATUS: u16 = PM_BASE + 0x20;
const GPE0_ENABLE: u16 = PM_BASE + 0x28;
const PCI_EVENT: u8 = 1 << 1;
const HOTPLUG: u16 = 0xCC0;

/// Enable the event of PCI hot-plug.
pub(crate) fn listen(cpu: &GuestCpu) {
    cpu.port_write(GPE0_ENABLE, &[PCI_EVENT]);
}

/// Wait for the event, and take it.
pub(crate) fn wait_for_hotplug(cpu: &GuestCpu) {
    cpu.wait_for_line(SCI);
    cpu.port_write(GPE0_STATUS, &[PCI_EVENT]);
}

/// A register of PCI hot-plug, by its offset.
pub(crate) fn hotplug_read(cpu: &GuestCpu, offset: u16) -> u32 {
    let mut data = [0; 4];
    cpu.port_read(HOTPLUG + offset, &mut data);
    u32::from_le_bytes(data)
}

/// The same for a write, of any width.
pub(crate) fn hotplug_write(cpu: &GuestCpu, offset: u16, data: &[u8]) {
    cpu.port_write(HOTPLUG + offset, data);
}

/// The least that can be booted: an ELF file with a PVH entry and one empty page.
pub(crate) fn kernel() -> Vec<u8> {
    const NOTE: usize = 0x100;
    const PAGE: usize = 0x200;
    let mut image = vec![0; PAGE + 0x1000];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x7fELF\x02\x01\x01");
    put(18, &62u16.to_le_bytes());
    put(32, &64u64.to_le_bytes());
    put(54, &56u16.to_le_bytes());
    put(56, &2u16.to_le_bytes());
    for (at, kind, offset, address, size) in
        [(64, 1u32, PAGE as u64, ENTRY, 0x1000u64), (120, 4, NOTE as u64, 0, 20)]
    {
        put(at, &kind.to_le_bytes());
        put(at + 8, &offset.to_le_bytes());
        put(at + 24, &address.to_le_bytes());
        put(at + 32, &size.to_le_bytes());
        put(at + 40, &size.to_le_bytes());
    }
    for (at, value) in [(0, 4u32), (4, 4), (8, 18), (16, ENTRY as u32)] {
        put(NOTE + at, &value.to_le_bytes());
    }
    put(NOTE + 12, b"Xen\0");
    image
}

/// Enter S5 as ACPI tells: SLP_TYP 5 and SLP_EN.
pub(crate) fn power_off(cpu: &GuestCpu) -> Exit {
    cpu.port_write(PM_BASE + 4, &(5u16 << 10 | 1 << 13).to_le_bytes());
    cpu.halt()
}
