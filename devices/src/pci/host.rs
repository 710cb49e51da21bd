// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The root bus: which function sits where, how configuration accesses reach it, and where its base
//! address registers decode.
//!
//! After each configuration write the function's BARs are compared with the address spaces, and moved.
//! A guest may program BARs that overlap: the first keeps its place, the other does not decode until
//! there is room. There are no bridges: all other buses are empty.
//!
//! Lock order: root bus, function, address space. Address spaces hold no lock while a device runs.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use log::debug;
use parking_lot::Mutex;

use super::config::offset;
use super::{Bar, BarSpace, PciFunction};
use crate::bus::{Access, Bus, IoDevice};

/// Bit of the header type register: there are functions besides function 0.
const MULTIFUNCTION: u8 = 1 << 7;

/// A function shared between its bus and whoever else controls it.
pub type SharedFunction = Arc<Mutex<dyn PciFunction>>;

/// Device and function number.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DevFn(u8);

impl DevFn {
    /// Device 0..=31, function 0..=7; higher bits are ignored.
    pub const fn new(device: u8, function: u8) -> Self {
        Self((device & 31) << 3 | function & 7)
    }

    /// As it stands in a requester id.
    pub const fn bits(self) -> u8 {
        self.0
    }

    /// Device number, also called slot.
    pub const fn device(self) -> u8 {
        self.0 >> 3
    }

    /// Function number.
    pub const fn function(self) -> u8 {
        self.0 & 7
    }
}

impl fmt::Debug for DevFn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x}.{}", self.device(), self.function())
    }
}

/// Why the topology could not be changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PciError {
    /// A function is there already.
    #[error("PCI slot {0:?} is in use")]
    InUse(DevFn),
    /// No function is there.
    #[error("PCI slot {0:?} is empty")]
    Empty(DevFn),
}

/// The root bus.
pub struct PciHost {
    memory: Arc<Bus>,
    ports: Arc<Bus>,
    functions: Mutex<BTreeMap<DevFn, Slot>>,
}

struct Slot {
    function: SharedFunction,
    /// What the function wants to decode.
    wanted: Vec<Bar>,
    /// What is on the buses.
    decoded: Vec<Bar>,
}

impl fmt::Debug for PciHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let functions = self.functions.lock();
        f.debug_map().entries(functions.iter().map(|(at, slot)| (at, &slot.decoded))).finish()
    }
}

impl PciHost {
    /// An empty bus whose functions decode in these address spaces.
    pub fn new(memory: Arc<Bus>, ports: Arc<Bus>) -> Self {
        Self { memory, ports, functions: Mutex::default() }
    }

    /// Put a function on the bus.
    ///
    /// # Errors
    /// [`PciError::InUse`].
    pub fn add(&self, at: DevFn, function: SharedFunction) -> Result<(), PciError> {
        let mut functions = self.functions.lock();
        if functions.contains_key(&at) {
            return Err(PciError::InUse(at));
        }
        functions.insert(at, Slot { function, wanted: Vec::new(), decoded: Vec::new() });
        self.decode(&mut functions, at);
        Ok(())
    }

    /// Take a function off the bus.
    ///
    /// # Errors
    /// [`PciError::Empty`].
    pub fn remove(&self, at: DevFn) -> Result<SharedFunction, PciError> {
        let mut functions = self.functions.lock();
        let mut slot = functions.remove(&at).ok_or(PciError::Empty(at))?;
        slot.wanted.clear();
        self.withdraw(&mut slot);
        self.fill_gaps(&mut functions);
        Ok(slot.function)
    }

    /// The functions there are, in order.
    pub fn functions(&self) -> Vec<(DevFn, SharedFunction)> {
        let functions = self.functions.lock();
        functions.iter().map(|(&at, slot)| (at, Arc::clone(&slot.function))).collect()
    }

    /// Reset all functions. Their BARs no longer decode.
    pub fn reset(&self) {
        let mut functions = self.functions.lock();
        for slot in functions.values_mut() {
            slot.function.lock().reset();
            slot.wanted = slot.function.lock().bars();
            self.withdraw(slot);
        }
        self.fill_gaps(&mut functions);
    }

    /// Read configuration space: 1, 2 or 4 bytes, naturally aligned. All ones where there is no function.
    pub fn config_read(&self, at: DevFn, offset: u16, data: &mut [u8]) -> Access {
        let functions = self.functions.lock();
        let Some(slot) = functions.get(&at) else {
            data.fill(0xff);
            return Access::Unclaimed;
        };
        slot.function.lock().config_read(offset, data);
        // Whether a device has more than one function is known to its bus only.
        let header_type = offset::HEADER_TYPE.wrapping_sub(offset);
        if at.function() == 0
            && let Some(byte) = data.get_mut(usize::from(header_type))
            && functions.range(DevFn(at.0 + 1)..=DevFn(at.0 | 7)).next().is_some()
        {
            *byte |= MULTIFUNCTION;
        }
        Access::Done
    }

    /// Write configuration space: 1, 2 or 4 bytes, naturally aligned.
    pub fn config_write(&self, at: DevFn, offset: u16, data: &[u8]) -> Access {
        let mut functions = self.functions.lock();
        let Some(slot) = functions.get(&at) else { return Access::Unclaimed };
        slot.function.lock().config_write(offset, data);
        self.decode(&mut functions, at);
        Access::Done
    }

    /// Follow a change of a function's BARs.
    fn decode(&self, functions: &mut BTreeMap<DevFn, Slot>, at: DevFn) {
        let Some(slot) = functions.get_mut(&at) else { return };
        let wanted = slot.function.lock().bars();
        if wanted != slot.wanted {
            slot.wanted = wanted;
            self.withdraw(slot);
            self.claim(slot);
            self.fill_gaps(functions);
        }
    }

    /// Take off the buses what the function no longer wants.
    fn withdraw(&self, slot: &mut Slot) {
        let Slot { function, wanted, decoded } = slot;
        decoded.retain(|bar| {
            let keep = wanted.contains(bar);
            if !keep {
                if let Err(error) = self.bus(bar.space).remove(bar.address) {
                    debug!("stop decoding {bar:x?}: {error}");
                }
                function.lock().bar_moved(bar.index, None);
            }
            keep
        });
    }

    /// Put on the buses what the function wants and what is free.
    fn claim(&self, slot: &mut Slot) {
        for bar in &slot.wanted {
            if slot.decoded.contains(bar) {
                continue;
            }
            let window = BarWindow { function: Arc::clone(&slot.function), index: bar.index };
            let device = Arc::new(Mutex::new(window));
            match self.bus(bar.space).insert(bar.address, bar.size, device) {
                Ok(()) => {
                    slot.decoded.push(*bar);
                    slot.function.lock().bar_moved(bar.index, Some(bar.address));
                }
                Err(error) => debug!("decode {bar:x?}: {error}"),
            }
        }
    }

    /// Something may have made room for those who found none.
    fn fill_gaps(&self, functions: &mut BTreeMap<DevFn, Slot>) {
        for slot in functions.values_mut() {
            self.claim(slot);
        }
    }

    fn bus(&self, space: BarSpace) -> &Bus {
        match space {
            BarSpace::Memory => &self.memory,
            BarSpace::Io => &self.ports,
        }
    }
}

/// A BAR as an address space sees it.
struct BarWindow {
    function: SharedFunction,
    index: u8,
}

impl IoDevice for BarWindow {
    fn read(&mut self, offset: u64, data: &mut [u8]) -> Access {
        self.function.lock().bar_read(self.index, offset, data)
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Access {
        self.function.lock().bar_write(self.index, offset, data)
    }
}

/// Whether an access of `len` bytes is one that configuration space knows.
fn is_natural(offset: u64, len: usize) -> bool {
    matches!(len, 1 | 2 | 4) && offset.is_multiple_of(len as u64)
}

/// Configuration space in memory: 4 KiB for each function (PCI Express Base Specification 2.0, section
/// 7.2.2).
#[derive(Debug)]
pub struct Ecam(Arc<PciHost>);

impl Ecam {
    /// Memory for one bus.
    pub const BYTES_PER_BUS: u64 = 1 << 20;

    /// The window onto `host`.
    pub fn new(host: Arc<PciHost>) -> Self {
        Self(host)
    }

    fn decode(offset: u64, len: usize) -> Option<(DevFn, u16)> {
        (offset < Self::BYTES_PER_BUS && is_natural(offset, len))
            .then_some((DevFn((offset >> 12) as u8), (offset & 0xfff) as u16))
    }
}

impl IoDevice for Ecam {
    fn read(&mut self, offset: u64, data: &mut [u8]) -> Access {
        match Self::decode(offset, data.len()) {
            Some((at, offset)) => self.0.config_read(at, offset, data),
            None => Access::Unclaimed,
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Access {
        match Self::decode(offset, data.len()) {
            Some((at, offset)) => self.0.config_write(at, offset, data),
            None => Access::Unclaimed,
        }
    }
}

/// Configuration mechanism #1 (PCI Local Bus Specification 3.0, section 3.2.2.3.2): an address and a data
/// register of four bytes each, the address first.
pub struct ConfigPorts {
    host: Arc<PciHost>,
    /// Only whole double words reach the address register: bytes in between belong to other devices.
    /// Chipsets keep a reset control register there.
    between: Option<Box<dyn IoDevice>>,
    address: u32,
}

impl fmt::Debug for ConfigPorts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConfigPorts").field("address", &self.address).finish_non_exhaustive()
    }
}

impl ConfigPorts {
    /// Ports that are used.
    pub const SIZE: u64 = 8;
    const ENABLE: u32 = 1 << 31;
    const ADDRESS_WRITABLE: u32 = 0x80FF_FFFC;
    const DATA: u64 = 4;
    const BETWEEN: u64 = 1;

    /// The ports onto `host`. Byte accesses to the second of them go to `between`, at offset 0.
    pub fn new(host: Arc<PciHost>, between: Option<Box<dyn IoDevice>>) -> Self {
        Self { host, between, address: 0 }
    }

    /// Function and register that the data port leads to.
    fn target(&self, port: u64, len: usize) -> Option<(DevFn, u16)> {
        let [register, devfn, bus, _] = self.address.to_le_bytes();
        let offset = port.checked_sub(Self::DATA)?;
        (self.address & Self::ENABLE != 0 && bus == 0 && is_natural(offset, len))
            .then_some((DevFn(devfn), u16::from(register) + offset as u16))
    }
}

impl IoDevice for ConfigPorts {
    fn read(&mut self, offset: u64, data: &mut [u8]) -> Access {
        match (offset, data.len()) {
            (0, 4) => data.copy_from_slice(&self.address.to_le_bytes()),
            (Self::BETWEEN, 1) => {
                return self.between.as_mut().map_or(Access::Unclaimed, |it| it.read(0, data));
            }
            (offset, len) => {
                let Some((at, register)) = self.target(offset, len) else {
                    return Access::Unclaimed;
                };
                return self.host.config_read(at, register, data);
            }
        }
        Access::Done
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Access {
        match (offset, data) {
            (0, &[a, b, c, d]) => {
                self.address = u32::from_le_bytes([a, b, c, d]) & Self::ADDRESS_WRITABLE;
            }
            (Self::BETWEEN, [_]) => {
                return self.between.as_mut().map_or(Access::Unclaimed, |it| it.write(0, data));
            }
            (offset, data) => {
                let Some((at, register)) = self.target(offset, data.len()) else {
                    return Access::Unclaimed;
                };
                return self.host.config_write(at, register, data);
            }
        }
        Access::Done
    }
}

#[cfg(test)]
mod tests {
    use super::super::assign::{Window, Windows, assign};
    use super::super::config::{BarKind, ConfigSpace, Identity, command};
    use super::super::describe::describe;
    use super::*;
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
        assert_eq!(host.config_write(at, offset, &value.to_le_bytes()), Access::Done);
    }

    fn read32(host: &PciHost, at: DevFn, offset: u16) -> u32 {
        let mut data = [0; 4];
        let _ = host.config_read(at, offset, &mut data);
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
        assert_eq!(host.config_write(B, 0, &[0]), Access::Unclaimed);
        let again = host.add(A, Arc::new(Mutex::new(plain())));
        assert_eq!(again, Err(PciError::InUse(A)));
        assert_eq!(host.remove(B).err(), Some(PciError::Empty(B)));
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
        assert_eq!((found.at, found.vendor, found.device), (A, 0x1234, 0x5678));
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
}
