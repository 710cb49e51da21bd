// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

use super::*;
use crate::pci::assign::{Window, Windows, assign};
use crate::pci::bridge::{PciBridge, register};
use crate::pci::config::{BarKind, ConfigSpace, Identity, command};
use crate::pci::describe::describe;
use proptest::prelude::*;

/// A function with a register in each space, which remembers where its memory BAR is.
struct Plain {
    config: ConfigSpace,
    moved: Vec<(u8, Option<u64>)>,
}

impl PciFunction for Plain {
    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        self.config.read(offset, data);
    }
    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
    }
    fn bars(&self) -> Vec<Bar> {
        self.config.bars()
    }
    fn bar_moved(&mut self, index: u8, address: Option<u64>) {
        self.moved.push((index, address));
    }
    fn bar_read(&mut self, index: u8, offset: u64, data: &mut [u8]) -> Access {
        data.fill(index << 4 | offset as u8);
        Access::Done
    }
    fn bar_write(&mut self, _index: u8, _offset: u64, _data: &[u8]) -> Access {
        Access::Done
    }
    fn reset(&mut self) {
        self.config.reset();
    }
}

struct Fixture {
    memory: Arc<Bus>,
    ports: Arc<Bus>,
    host: Arc<PciHost>,
    functions: Vec<Arc<Mutex<Plain>>>,
}

fn plain() -> Plain {
    let mut config = ConfigSpace::new(&Identity {
        vendor: 0x1234,
        device: 0x5678,
        revision: 0,
        class: 0x00_FF_00,
        subsystem_vendor: 0,
        subsystem: 0,
    });
    config.add_bar(0, BarKind::Memory32, 0x1000);
    config.add_bar(1, BarKind::Io, 0x20);
    config.add_bar(2, BarKind::Memory64, 0x4000);
    config.set_interrupt_pin(1);
    Plain { config, moved: Vec::new() }
}

fn fixture(at: &[DevFn]) -> Fixture {
    let (memory, ports) = (Arc::new(Bus::new()), Arc::new(Bus::new()));
    let host = Arc::new(PciHost::new(Arc::clone(&memory), Arc::clone(&ports)));
    let functions: Vec<_> = at.iter().map(|_| Arc::new(Mutex::new(plain()))).collect();
    for (&at, function) in at.iter().zip(&functions) {
        host.add(at, Arc::clone(function) as SharedFunction).unwrap();
    }
    Fixture { memory, ports, host, functions }
}

const A: DevFn = DevFn::new(1, 0);
const B: DevFn = DevFn::new(2, 0);

fn write32(host: &PciHost, at: DevFn, offset: u16, value: u32) {
    assert_eq!(host.config_write(0, at, offset, &value.to_le_bytes()), Access::Done);
}

fn read32(host: &PciHost, at: DevFn, offset: u16) -> u32 {
    let mut data = [0; 4];
    let _ = host.config_read(0, at, offset, &mut data);
    u32::from_le_bytes(data)
}

fn enable(host: &PciHost, at: DevFn) {
    write32(host, at, offset::COMMAND, (command::MEMORY | command::IO).into());
}

fn answers(bus: &Bus, address: u64) -> bool {
    bus.read(address, &mut [0; 4]) == Access::Done
}

#[test]
fn an_empty_slot_reads_ones() {
    let Fixture { host, .. } = fixture(&[A]);
    assert_eq!(read32(&host, A, 0), 0x5678_1234);
    assert_eq!(read32(&host, B, 0), u32::MAX);
    assert_eq!(host.config_write(0, B, 0, &[0]), Access::Unclaimed);
    let again = host.add(A, Arc::new(Mutex::new(plain())));
    assert_eq!(again, Err(PciError::InUse(A.into())));
    assert_eq!(host.remove(B).err(), Some(PciError::Empty(B.into())));
}

#[test]
fn linux_sizes_moves_and_enables_bars() {
    let Fixture { host, memory, ports, functions } = fixture(&[A]);
    let sizes: Vec<u32> = (0..5)
        .map(|index| {
            write32(&host, A, offset::BAR0 + index * 4, u32::MAX);
            read32(&host, A, offset::BAR0 + index * 4)
        })
        .collect();
    assert_eq!(sizes, [0xFFFF_F000, 0xFFFF_FFE1, 0xFFFF_C00C, 0xFFFF_FFFF, 0]);
    write32(&host, A, offset::BAR0, 0xC000_0000);
    write32(&host, A, offset::BAR0 + 4, 0x2000);
    write32(&host, A, offset::BAR0 + 8, 0);
    write32(&host, A, offset::BAR0 + 12, 0x80);
    assert!(!answers(&memory, 0xC000_0000), "not yet enabled");
    enable(&host, A);
    let mut data = [0];
    assert_eq!(memory.read(0xC000_0003, &mut data), Access::Done);
    assert_eq!(data, [0x03]);
    assert_eq!(ports.read(0x2001, &mut data), Access::Done);
    assert_eq!(data, [0x11]);
    assert!(answers(&memory, 0x80_0000_0000));
    write32(&host, A, offset::BAR0, 0xC100_0000);
    assert!(!answers(&memory, 0xC000_0000));
    assert!(answers(&memory, 0xC100_0000));
    write32(&host, A, offset::COMMAND, 0);
    assert!(!answers(&memory, 0xC100_0000) && !answers(&ports, 0x2000));
    let moved = functions[0].lock().moved.clone();
    let of_bar0: Vec<_> = moved.iter().filter(|it| it.0 == 0).map(|it| it.1).collect();
    assert_eq!(of_bar0, [Some(0xC000_0000), None, Some(0xC100_0000), None]);
}

#[test]
fn the_second_of_two_overlapping_bars_waits_for_room() {
    let Fixture { host, memory, functions, .. } = fixture(&[A, B]);
    for at in [A, B] {
        write32(&host, at, offset::BAR0, 0xC000_0000);
        enable(&host, at);
    }
    assert_eq!(functions[1].lock().moved, []);
    write32(&host, A, offset::BAR0, 0xC000_1000);
    assert!(answers(&memory, 0xC000_0000) && answers(&memory, 0xC000_1000));
    assert_eq!(functions[1].lock().moved, [(0, Some(0xC000_0000))]);
    host.remove(A).unwrap();
    assert!(!answers(&memory, 0xC000_1000));
}

#[test]
fn function_zero_tells_of_the_others() {
    let with_others = fixture(&[DevFn::new(3, 0), DevFn::new(3, 2), DevFn::new(4, 0)]).host;
    let header = |at| read32(&with_others, at, 0x0C) >> 16 & 0xFF;
    assert_eq!(header(DevFn::new(3, 0)), 0x80);
    assert_eq!(header(DevFn::new(3, 2)), 0);
    assert_eq!(header(DevFn::new(4, 0)), 0);
}

#[test]
fn reset_takes_all_bars_off() {
    let Fixture { host, memory, .. } = fixture(&[A]);
    write32(&host, A, offset::BAR0, 0xC000_0000);
    enable(&host, A);
    host.reset();
    assert!(!answers(&memory, 0xC000_0000));
    assert_eq!(read32(&host, A, offset::BAR0), 0);
}

#[test]
fn firmware_gives_every_bar_a_place() {
    let Fixture { host, memory, ports, .. } = fixture(&[A, B]);
    let windows = Windows {
        io: Window { base: 0x1000, size: 0x1000 },
        memory32: Window { base: 0xC000_0000, size: 0x1000_0000 },
        memory64: Window { base: 0x80_0000_0000, size: 0x1_0000_0000 },
    };
    assign(&host, &windows, [16, 17, 18, 19]).unwrap();
    let registers = |at| [0x10, 0x14, 0x18, 0x1C].map(|offset| read32(&host, at, offset));
    assert_eq!(registers(A), [0xC000_0000, 0x1001, 0xC, 0x80]);
    assert_eq!(registers(B), [0xC000_1000, 0x1021, 0x400C, 0x80]);
    let lines = [A, B].map(|at| read32(&host, at, 0x3C));
    assert_eq!(lines, [0x0111, 0x0112], "INTA of slots 1 and 2 are the bus's INTB and INTC");
    assert!(!answers(&memory, 0xC000_0000));
    [A, B].into_iter().for_each(|at| enable(&host, at));
    for address in [0xC000_0000, 0xC000_1000, 0x80_0000_0000, 0x80_0000_4000] {
        assert!(answers(&memory, address), "{address:#x}");
    }
    assert!(answers(&ports, 0x1000) && answers(&ports, 0x1020));
}

#[test]
fn the_host_can_look_at_its_functions() {
    let Fixture { host, .. } = fixture(&[A]);
    write32(&host, A, offset::BAR0, 0xC000_0000);
    write32(&host, A, offset::BAR0 + 12, 0x80);
    write32(&host, A, offset::COMMAND, command::MEMORY.into());
    let [found] = describe(&host).try_into().unwrap();
    assert_eq!((found.place, found.vendor, found.device), (A.into(), 0x1234, 0x5678));
    assert_eq!((found.class, found.interrupt_pin), (0x00FF, 1));
    let bars: Vec<_> = found
        .bars
        .iter()
        .map(|it| (it.bar.index, it.bar.address, it.prefetchable, it.wide))
        .collect();
    assert_eq!(bars, [(0, 0xC000_0000, false, false), (2, 0x80_0000_0000, true, true)]);
}

#[test]
fn ecam_reaches_the_functions_of_bus_0() {
    let mut ecam = Ecam::new(fixture(&[A]).host);
    let mut data = [0; 2];
    assert_eq!(ecam.read(1 << 15 | 2, &mut data), Access::Done);
    assert_eq!(data, 0x5678u16.to_le_bytes());
    assert_eq!(ecam.read(1 << 15 | 3, &mut data), Access::Unclaimed);
    assert_eq!(ecam.read(1 << 20 | 1 << 15, &mut data), Access::Unclaimed);
    assert_eq!(ecam.read(1 << 15, &mut [0; 8]), Access::Unclaimed);
}

#[test]
fn config_ports_follow_mechanism_1() {
    struct Between;
    impl IoDevice for Between {
        fn read(&mut self, _offset: u64, data: &mut [u8]) -> Access {
            data.fill(0x42);
            Access::Done
        }
        fn write(&mut self, _offset: u64, _data: &[u8]) -> Access {
            Access::Done
        }
    }
    let mut ports = ConfigPorts::new(fixture(&[A]).host, Some(Box::new(Between)));
    let mut data = [0; 4];
    assert_eq!(ports.read(4, &mut data), Access::Unclaimed, "not enabled");
    assert_eq!(ports.write(0, &0x8000_0803u32.to_le_bytes()), Access::Done);
    assert_eq!(ports.read(0, &mut data), Access::Done);
    assert_eq!(data, 0x8000_0800u32.to_le_bytes());
    assert_eq!(ports.read(4, &mut data), Access::Done);
    assert_eq!(data, 0x5678_1234u32.to_le_bytes());
    assert_eq!(ports.read(6, &mut data[..2]), Access::Done);
    assert_eq!(data[..2], 0x5678u16.to_le_bytes());
    assert_eq!(ports.read(1, &mut data[..1]), Access::Done);
    assert_eq!(data[0], 0x42);
    assert_eq!(ports.read(2, &mut data[..2]), Access::Unclaimed);
    assert_eq!(ports.write(0, &0x8001_0800u32.to_le_bytes()), Access::Done);
    assert_eq!(ports.read(4, &mut data), Access::Unclaimed, "bus 1 is empty");
}

proptest! {
    #[test]
    fn no_guest_can_leave_a_range_behind(
        accesses in prop::collection::vec((0u64..0x20_000, 0usize..5, any::<[u8; 4]>()), 0..100),
        addresses in prop::collection::vec((0u16..6, prop::sample::select(
            vec![0u32, 0x1000, 0xC000_0000, 0xC000_1000, 0xFFFF_F000, u32::MAX])), 0..20),
    ) {
        let Fixture { host, memory, ports, .. } = fixture(&[DevFn::new(0, 0), A, B]);
        let all = [DevFn::new(0, 0), A, B];
        all.into_iter().for_each(|at| enable(&host, at));
        for (bar, value) in addresses {
            all.into_iter().for_each(|at| write32(&host, at, offset::BAR0 + bar * 4, value));
        }
        let mut ecam = Ecam::new(Arc::clone(&host));
        for (offset, len, mut data) in accesses {
            let _ = ecam.write(offset, &data[..len]);
            let _ = ecam.read(offset, &mut data[..len]);
        }
        for (at, _) in host.functions() {
            host.remove(at).unwrap();
        }
        prop_assert_eq!(format!("{:?} {:?}", memory, ports), "{} {}");
    }
}

/// A bridge in slot 2 with a function in slot `slot` behind it.
fn bridged(slot: u8) -> (Fixture, Place) {
    let fixture = fixture(&[]);
    let place = Place::behind(B, DevFn::new(slot, 0));
    fixture.host.add(B, Arc::new(Mutex::new(PciBridge::new()))).unwrap();
    fixture.host.add(place, Arc::new(Mutex::new(plain()))).unwrap();
    (fixture, place)
}

const WINDOWS: Windows = Windows {
    io: Window { base: 0x1000, size: 0x8000 },
    memory32: Window { base: 0xC000_0000, size: 0x1000_0000 },
    memory64: Window { base: 0x80_0000_0000, size: 0x1_0000_0000 },
};

fn read_behind(host: &PciHost, bus: u8, slot: u8, offset: u16) -> u32 {
    let mut data = [0; 4];
    let _ = host.config_read(bus, DevFn::new(slot, 0), offset, &mut data);
    u32::from_le_bytes(data)
}

#[test]
fn a_bridge_answers_for_the_bus_number_that_it_was_given() {
    let (Fixture { host, .. }, _) = bridged(5);
    let found = |bus| read_behind(&host, bus, 5, 0) == 0x5678_1234;
    assert!((0..=255).all(|bus| !found(bus)), "not numbered");
    for bus in [1, 9, 255] {
        assert_eq!(host.config_write(0, B, register::SECONDARY_BUS, &[bus, bus]), Access::Done);
        assert_eq!((0..=255).filter(|&bus| found(bus)).collect::<Vec<u8>>(), [bus]);
    }
    host.remove(B).unwrap();
    assert!(!found(255));
}

#[test]
fn firmware_numbers_buses_and_opens_windows() {
    let (Fixture { host, memory, ports, .. }, _) = bridged(5);
    host.add(A, Arc::new(Mutex::new(plain()))).unwrap();
    assign(&host, &WINDOWS, [16, 17, 18, 19]).unwrap();
    let bridge = host.functions().iter().find_map(|(_, it)| it.lock().forwarding()).unwrap();
    assert_eq!((bridge.secondary, bridge.subordinate), (1, 1));
    let sizes = [bridge.io, bridge.memory, bridge.prefetchable].map(|it| it.limit - it.base + 1);
    assert_eq!(sizes, [0x1000, 0x20_0000, 0x20_0000]);
    let registers = [0x10, 0x14, 0x18, 0x1C].map(|at| read_behind(&host, 1, 5, at));
    let inside = [
        u64::from(registers[0]),
        u64::from(registers[1] & !1),
        u64::from(registers[2] & !0xF) | u64::from(registers[3]) << 32,
    ];
    assert_eq!(inside, [bridge.memory.base, bridge.io.base, bridge.prefetchable.base]);
    // INTA of slot 5 is INTB of its bus, and the bridge in slot 2 turns that into the root bus's INTD.
    assert_eq!(read_behind(&host, 1, 5, 0x3C), 0x0113);
    let enable = (command::MEMORY | command::IO).to_le_bytes();
    assert_eq!(host.config_write(1, DevFn::new(5, 0), offset::COMMAND, &enable), Access::Done);
    assert!(answers(&memory, inside[0]) && answers(&memory, inside[2]));
    assert!(answers(&ports, inside[1]));
    let found = describe(&host);
    let behind = found.iter().find(|it| it.place.bridge == Some(B)).unwrap();
    assert_eq!((behind.bus, behind.bars.len()), (1, 3));
}

#[test]
fn a_window_that_moves_takes_what_is_behind_it_along() {
    let (Fixture { host, memory, .. }, place) = bridged(1);
    assign(&host, &WINDOWS, [16; 4]).unwrap();
    let enable = command::MEMORY.to_le_bytes();
    assert_eq!(host.config_write(1, place.at, offset::COMMAND, &enable), Access::Done);
    let bar = u64::from(read_behind(&host, 1, 1, offset::BAR0));
    assert!(answers(&memory, bar));
    let window = |base: u16, limit: u16| u32::from(base) | u32::from(limit) << 16;
    write32(&host, B, register::MEMORY_BASE, window(0xD000, 0xD000));
    assert!(!answers(&memory, bar), "outside");
    write32(&host, B, register::MEMORY_BASE, window((bar >> 16) as u16, (bar >> 16) as u16));
    assert!(answers(&memory, bar));
    write32(&host, B, offset::COMMAND, 0);
    assert!(!answers(&memory, bar), "the bridge forwards nothing");
    write32(&host, B, offset::COMMAND, command::MEMORY.into());
    assert!(answers(&memory, bar));
    host.remove(place).unwrap();
    assert!(!answers(&memory, bar));
}

#[test]
fn thirty_devices_fit_behind_a_bridge() {
    let (Fixture { host, .. }, _) = bridged(1);
    for slot in 2..=30 {
        let place = Place::behind(B, DevFn::new(slot, 0));
        host.add(place, Arc::new(Mutex::new(plain()))).unwrap();
    }
    assign(&host, &WINDOWS, [16; 4]).unwrap();
    for slot in 1..=30 {
        assert_ne!(read_behind(&host, 1, slot, offset::BAR0), 0, "{slot}");
    }
}

proptest! {
    #[test]
    fn no_guest_can_leave_a_range_behind_a_bridge(
        writes in prop::collection::vec(
            (prop::sample::select(vec![0x04u16, 0x18, 0x1C, 0x20, 0x24, 0x28, 0x2C]), any::<[u8; 4]>()), 0..40),
        moves in prop::collection::vec((0u16..5, any::<u32>()), 0..20),
    ) {
        let (Fixture { host, memory, ports, .. }, place) = bridged(3);
        assign(&host, &WINDOWS, [16; 4]).unwrap();
        let _ = host.config_write(1, place.at, offset::COMMAND, &[3, 0]);
        for (bar, value) in moves {
            let _ = host.config_write(1, place.at, offset::BAR0 + bar * 4, &value.to_le_bytes());
        }
        for (at, data) in writes {
            let _ = host.config_write(0, B, at, &data);
            let _ = describe(&host);
        }
        for (place, _) in host.functions() {
            host.remove(place).unwrap();
        }
        prop_assert_eq!(format!("{:?} {:?}", memory, ports), "{} {}");
    }
}
