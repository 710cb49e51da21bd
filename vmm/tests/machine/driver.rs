// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! A virtio driver as small as it can be: one queue, one request at a time.

use ecr_vmm::hypervisor::fake::GuestCpu;

use crate::board::{MESSAGES, RAM};
use crate::rig::{MIB, bar, capability, function, read, read_u16};

/// Vendor and device id of a disk.
pub(crate) const DISK: u32 = 0x1042_1AF4;
/// Message that a driver gets when buffers were used.
pub(crate) const MESSAGE: u32 = 0x31;
/// Where a driver puts its rings and its data.
pub(crate) const RINGS: u64 = RAM + 4 * MIB;
pub(crate) const BUFFER: u64 = RAM + 5 * MIB;

/// The configuration space of the function on the root bus with this vendor and device id.
pub(crate) fn find(cpu: &GuestCpu, id: u32) -> u64 {
    let is_device = |slot: &u64| cpu.read_u32(function(*slot)) == id;
    function((0..32).find(is_device).unwrap())
}

/// Bring up the virtio device at `config`, whose BARs are placed, and its first queue, up to DRIVER_OK; returns
/// the address of the queue's doorbell.
pub(crate) fn start_driver(cpu: &GuestCpu, config: u64) -> u64 {
    [RINGS + 0x1000, RINGS + 0x2000].iter().for_each(|&ring| cpu.write(ring, &[0; 64]));
    let virtio = |kind: u8| capability(cpu, config, 9, |at| read::<4>(cpu, at)[3] == kind).unwrap();
    let structure = |at: u64| {
        let index = u64::from(read::<1>(cpu, at + 4)[0]);
        bar(cpu, config, index) + u64::from(cpu.read_u32(at + 8))
    };
    let (common, notify) = (structure(virtio(1)), virtio(2));
    cpu.write(config + 4, &6u16.to_le_bytes());

    let msix = capability(cpu, config, 0x11, |_| true).unwrap();
    let table = bar(cpu, config, u64::from(cpu.read_u32(msix + 4) & 7)) + 16;
    for (offset, value) in
        [(0, MESSAGES as u32), (4, (MESSAGES >> 32) as u32), (8, MESSAGE), (12, 0)]
    {
        cpu.write_u32(table + offset, value);
    }
    cpu.write(msix + 2, &0x8000u16.to_le_bytes());

    for status in [0u8, 1, 3] {
        cpu.write(common + 20, &[status]);
    }
    for (select, bits) in [(0, 0u32), (1, 1)] {
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

/// Make a chain of buffers (address, length, flags) available as the first one.
pub(crate) fn submit(cpu: &GuestCpu, doorbell: u64, buffers: &[(u64, u32, u16)]) {
    for (index, &(address, len, flags)) in (0u16..).zip(buffers) {
        let next = u16::from(usize::from(index) + 1 < buffers.len());
        cpu.write(RINGS + 16 * u64::from(index), &address.to_le_bytes());
        cpu.write_u32(RINGS + 16 * u64::from(index) + 8, len);
        cpu.write(RINGS + 16 * u64::from(index) + 12, &(flags | next).to_le_bytes());
        cpu.write(RINGS + 16 * u64::from(index) + 14, &(index + 1).to_le_bytes());
    }
    cpu.write(RINGS + 0x1002, &1u16.to_le_bytes());
    cpu.write(doorbell, &0u16.to_le_bytes());
}

/// Make a chain available as the first one, and wait until it is used; returns how many bytes were written to
/// it.
pub(crate) fn transact(cpu: &GuestCpu, doorbell: u64, buffers: &[(u64, u32, u16)]) -> u32 {
    submit(cpu, doorbell, buffers);
    cpu.wait_for_message(MESSAGE);
    assert_eq!(read_u16(cpu, RINGS + 0x2002), 1, "one chain was used");
    cpu.read_u32(RINGS + 0x2008)
}

const HEADER: u64 = BUFFER;
const DATA: u64 = BUFFER + 0x1000;
const STATUS: u64 = BUFFER + 0x2000;

/// The chain that reads a sector.
fn read_request(cpu: &GuestCpu, sector: u64) -> [(u64, u32, u16); 3] {
    // VIRTIO_BLK_T_IN and the sector.
    cpu.write(HEADER, &[0u64.to_le_bytes(), sector.to_le_bytes()].concat());
    [(HEADER, 16, 0), (DATA, 512, 2), (STATUS, 1, 2)]
}

/// Begin to read a sector, and do not wait.
pub(crate) fn submit_read(cpu: &GuestCpu, doorbell: u64, sector: u64) {
    submit(cpu, doorbell, &read_request(cpu, sector));
}

/// Read a sector of the disk whose queue's doorbell is at `doorbell`. The first request since it was started.
pub(crate) fn read_sector(cpu: &GuestCpu, doorbell: u64, sector: u64) -> [u8; 512] {
    assert_eq!(transact(cpu, doorbell, &read_request(cpu, sector)), 513);
    assert_eq!(read(cpu, STATUS), [0u8]);
    read(cpu, DATA)
}
