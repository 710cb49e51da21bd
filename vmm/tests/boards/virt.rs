// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What tests of whole machines must know of a virt.

use ecr_vmm::config::MachineType;
use ecr_vmm::hypervisor::fake::GuestCpu;
use ecr_vmm::hypervisor::{Exit, ShutdownKind};

pub(crate) const MACHINE: MachineType = MachineType::Virt;
pub(crate) const ECAM: u64 = 0x40_1000_0000;
/// Where RAM begins.
pub(crate) const RAM: u64 = 1 << 30;
/// Where messages go: the translation register of the ITS.
pub(crate) const MESSAGES: u64 = 0x0809_0040;
/// Slots of the root bus that the chipset has.
pub(crate) const CHIPSET: &[&str] = &["00", "1f"];
/// Shared interrupt of the generic event device.
pub(crate) const GED_INTERRUPT: u32 = 9;
pub(crate) const GED: u64 = 0x0908_0000;
const PCI_EVENT: u32 = 1 << 4;
const HOTPLUG: u64 = 0x090C_0000;

/// The event device is always on.
pub(crate) fn listen(_cpu: &GuestCpu) {}

/// Wait for the event of PCI hot-plug, and take it.
pub(crate) fn wait_for_hotplug(cpu: &GuestCpu) {
    loop {
        cpu.wait_for_edge(GED_INTERRUPT);
        // Several events may be taken at once.
        if cpu.read_u32(GED) & PCI_EVENT != 0 {
            return;
        }
    }
}

/// A register of PCI hot-plug, by its offset.
pub(crate) fn hotplug_read(cpu: &GuestCpu, offset: u16) -> u32 {
    cpu.read_u32(HOTPLUG + u64::from(offset))
}

/// The same for a write, of any width.
pub(crate) fn hotplug_write(cpu: &GuestCpu, offset: u16, data: &[u8]) {
    cpu.write(HOTPLUG + u64::from(offset), data);
}

/// The least that can be booted: the header of an EFI kernel that needs 2 MiB.
pub(crate) fn kernel() -> Vec<u8> {
    let mut image = vec![0; 4096];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"MZ");
    put(16, &(2u64 << 20).to_le_bytes());
    put(56, b"ARMd");
    image
}

/// As PSCI does it.
pub(crate) fn power_off(_cpu: &GuestCpu) -> Exit {
    Exit::Shutdown(ShutdownKind::PowerOff)
}

/// The same.
pub(crate) fn reboot(_cpu: &GuestCpu) -> Exit {
    Exit::Shutdown(ShutdownKind::Reset)
}
