// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What firmware does to PCI before it starts an operating system: number the buses behind bridges, size
//! the base address registers, give each an address, open each bridge's windows, and note which interrupt
//! each pin leads to. It goes through configuration space, as firmware would, and leaves functions disabled:
//! drivers enable them. Bridges are enabled.

use log::debug;

use super::bridge::{self, IO_GRANULARITY, MEMORY_GRANULARITY, register};
use super::config::{BARS, bar, command, offset};
use super::host::{DevFn, PciHost, Place};
use super::intx::Pin;

/// What a bridge's windows have room for at least, so that devices can be added behind it later. Thirty virtio
/// devices take less than 1 MiB of each kind of memory.
const IO_RESERVE: u64 = IO_GRANULARITY;
const MEMORY_RESERVE: u64 = 2 * MEMORY_GRANULARITY;

/// A free range of an address space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// First address.
    pub base: u64,
    /// Size in bytes.
    pub size: u64,
}

/// Where base address registers may be placed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Windows {
    /// I/O ports.
    pub io: Window,
    /// Memory below 4 GiB.
    pub memory32: Window,
    /// Memory for registers of 64 bits.
    pub memory64: Window,
}

/// Something found no place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no room for {what} of PCI function {place:?}, {size:#x} bytes: use fewer devices")]
pub struct NoRoom {
    /// The function.
    pub place: Place,
    /// What of it.
    pub what: What,
    /// Its size in bytes.
    pub size: u64,
}

/// What needs a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// This base address register.
    Bar(u8),
    /// A window of a bridge.
    Window,
}

impl std::fmt::Display for What {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Bar(index) => write!(f, "BAR {index}"),
            Self::Window => f.write_str("a window"),
        }
    }
}

/// Which window a register needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Space {
    Io,
    Memory32,
    Memory64,
}

/// Something that needs a place, aligned to its size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Request {
    place: Place,
    what: What,
    space: Space,
    size: u64,
}

/// Number all buses, place all base address registers and windows, and program the interrupt line registers
/// with `interrupts`, the inputs that the root bus's INTA to INTD lead to.
///
/// # Errors
/// [`NoRoom`]; some registers are then without a place.
pub fn assign(host: &PciHost, windows: &Windows, interrupts: [u8; 4]) -> Result<(), NoRoom> {
    let functions: Vec<Place> = host.functions().into_iter().map(|(place, _)| place).collect();
    let root = functions.iter().filter(|place| place.bridge.is_none());
    let mut requests = Vec::new();
    let mut bridges = Vec::new();
    for &place in root {
        let config = Config { host, bus: 0, place };
        requests.extend(config.prepare(interrupts));
        if config.read8(offset::HEADER_TYPE) & 0x7F == bridge::HEADER_TYPE {
            // There are at most 256 functions on the root bus, and two of them are no bridges.
            let bus = bridges.len() as u8 + 1;
            config.write(register::PRIMARY_BUS, &[0, bus, bus]);
            let behind = functions.iter().filter(|it| it.bridge == Some(place.at));
            let behind = behind.flat_map(|&place| Config { host, bus, place }.prepare(interrupts));
            let behind: Vec<Request> = behind.collect();
            requests.extend(window_requests(place, &behind));
            bridges.push((place, bus, behind));
        }
    }
    let placed = place(requests, windows)?;
    for (request, address) in &placed {
        Config { host, bus: 0, place: request.place }.put(request, *address);
    }
    for (bridge, bus, behind) in bridges {
        let inside = windows_of(bridge, &placed);
        for (request, address) in place(behind, &inside)? {
            Config { host, bus, place: request.place }.put(&request, address);
        }
        let enable = command::IO | command::MEMORY | command::BUS_MASTER;
        Config { host, bus: 0, place: bridge }.write(offset::COMMAND, &enable.to_le_bytes());
    }
    Ok(())
}

/// The windows that `bridge` needs for what is behind it, and for what will be.
fn window_requests(bridge: Place, behind: &[Request]) -> [Request; 3] {
    let reserves = [
        (Space::Io, IO_RESERVE),
        (Space::Memory32, MEMORY_RESERVE),
        (Space::Memory64, MEMORY_RESERVE),
    ];
    reserves.map(|(space, reserve)| {
        let needs = behind.iter().filter(|request| request.space == space);
        // Powers of two, the largest first, leave no gaps.
        let size = needs.map(|request| request.size).fold(0, u64::saturating_add);
        let size = size.checked_next_power_of_two().unwrap_or(u64::MAX).max(reserve);
        Request { place: bridge, what: What::Window, space, size }
    })
}

/// The windows that `bridge` was given.
fn windows_of(bridge: Place, placed: &[(Request, u64)]) -> Windows {
    let find = |space| {
        let is_it = |(request, _): &&(Request, u64)| {
            request.place == bridge && request.what == What::Window && request.space == space
        };
        let window = placed.iter().find(is_it);
        window.map_or(Window { base: 0, size: 0 }, |&(Request { size, .. }, base)| Window {
            base,
            size,
        })
    };
    Windows {
        io: find(Space::Io),
        memory32: find(Space::Memory32),
        memory64: find(Space::Memory64),
    }
}

/// Give each request an address aligned to its size. The largest come first, so that none leaves a gap.
fn place(mut requests: Vec<Request>, windows: &Windows) -> Result<Vec<(Request, u64)>, NoRoom> {
    requests.sort_by_key(|request| std::cmp::Reverse(request.size));
    let mut free = *windows;
    let place_one = |request: Request| {
        let window = match request.space {
            Space::Io => &mut free.io,
            Space::Memory32 => &mut free.memory32,
            Space::Memory64 => &mut free.memory64,
        };
        let Request { place, what, size, .. } = request;
        let address = window.take(size).ok_or(NoRoom { place, what, size })?;
        Ok((request, address))
    };
    requests.into_iter().map(place_one).collect()
}

impl Window {
    fn take(&mut self, size: u64) -> Option<u64> {
        let address = self.base.checked_next_multiple_of(size)?;
        let used = (address - self.base).checked_add(size)?;
        let left = self.size.checked_sub(used)?;
        *self = Self { base: address.checked_add(size)?, size: left };
        Some(address)
    }
}

/// The registers of one function, on the bus of this number.
struct Config<'a> {
    host: &'a PciHost,
    bus: u8,
    place: Place,
}

impl Config<'_> {
    /// Disable the function, tell it its interrupt, and find out what it needs.
    fn prepare(&self, interrupts: [u8; 4]) -> Vec<Request> {
        self.write(offset::COMMAND, &0u16.to_le_bytes());
        if let Some(pin) = self.pin() {
            let line = interrupts[usize::from(self.place.interrupt(pin))];
            self.write(offset::INTERRUPT_LINE, &[line]);
        }
        match self.read8(offset::HEADER_TYPE) & 0x7F {
            bridge::HEADER_TYPE => Vec::new(),
            _ => self.size_bars(),
        }
    }

    /// The registers that are there, sized as section 6.2.5.1 tells, with their old value put back.
    fn size_bars(&self) -> Vec<Request> {
        let mut requests = Vec::new();
        let mut index = 0;
        while index < BARS {
            let low = self.probe(index);
            let (space, mask) = if low & bar::IO != 0 {
                (Space::Io, !0 << 32 | u64::from(low & !bar::IO_FLAGS))
            } else if low & bar::WIDE != 0 && index + 1 < BARS {
                let high = u64::from(self.probe(index + 1));
                (Space::Memory64, high << 32 | u64::from(low & !bar::MEMORY_FLAGS))
            } else {
                (Space::Memory32, !0 << 32 | u64::from(low & !bar::MEMORY_FLAGS))
            };
            // What cannot be written is below the size; if that is everything, there is no register.
            let size = mask & mask.wrapping_neg();
            if low != 0 && size != 0 {
                let what = What::Bar(index);
                requests.push(Request { place: self.place, what, space, size });
            }
            index += if space == Space::Memory64 { 2 } else { 1 };
        }
        requests
    }

    /// Which bits of a register can be written, and its flags.
    fn probe(&self, index: u8) -> u32 {
        let at = offset::BAR0 + u16::from(index) * 4;
        let value = self.read32(at);
        self.write32(at, u32::MAX);
        let mask = self.read32(at);
        self.write32(at, value);
        mask
    }

    /// Tell the function where what it asked for is.
    fn put(&self, request: &Request, address: u64) {
        debug!("PCI {:?} {} at {address:#x}", request.place, request.what);
        match request.what {
            What::Bar(index) => self.put_bar(index, request.space, address),
            What::Window => self.put_window(request.space, address, address + (request.size - 1)),
        }
    }

    fn put_bar(&self, index: u8, space: Space, address: u64) {
        let at = offset::BAR0 + u16::from(index) * 4;
        self.write32(at, address as u32);
        if space == Space::Memory64 {
            self.write32(at + 4, (address >> 32) as u32);
        }
    }

    fn put_window(&self, space: Space, base: u64, limit: u64) {
        let memory = |at, base: u64, limit: u64| {
            self.write(at, &((base >> 16) as u16).to_le_bytes());
            self.write(at + 2, &((limit >> 16) as u16).to_le_bytes());
        };
        match space {
            Space::Io => self.write(register::IO_BASE, &[(base >> 8) as u8, (limit >> 8) as u8]),
            Space::Memory32 => memory(register::MEMORY_BASE, base, limit),
            Space::Memory64 => {
                memory(register::PREFETCHABLE_BASE, base, limit);
                self.write32(register::PREFETCHABLE_BASE_UPPER, (base >> 32) as u32);
                self.write32(register::PREFETCHABLE_LIMIT_UPPER, (limit >> 32) as u32);
            }
        }
    }

    fn pin(&self) -> Option<Pin> {
        let pin = self.read8(offset::INTERRUPT_PIN);
        [Pin::A, Pin::B, Pin::C, Pin::D].into_iter().find(|&known| known as u8 == pin)
    }

    fn at(&self) -> DevFn {
        self.place.at
    }

    fn read8(&self, at: u16) -> u8 {
        let mut data = [0];
        let _ = self.host.config_read(self.bus, self.at(), at, &mut data);
        data[0]
    }

    fn read32(&self, at: u16) -> u32 {
        let mut data = [0; 4];
        let _ = self.host.config_read(self.bus, self.at(), at, &mut data);
        u32::from_le_bytes(data)
    }

    fn write32(&self, at: u16, value: u32) {
        self.write(at, &value.to_le_bytes());
    }

    /// The function is there, so its configuration space answers.
    fn write(&self, at: u16, data: &[u8]) {
        let _ = self.host.config_write(self.bus, self.at(), at, data);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const WINDOWS: Windows = Windows {
        io: Window { base: 0x1000, size: 0x100 },
        memory32: Window { base: 0xC000_0000, size: 0x10_0000 },
        memory64: Window { base: 0x80_0000_0000, size: 1 << 30 },
    };

    fn request(index: u8, space: Space, size: u64) -> Request {
        Request { place: DevFn::new(1, 0).into(), what: What::Bar(index), space, size }
    }

    #[test]
    fn the_largest_come_first_in_each_space() {
        let requests = vec![
            request(0, Space::Memory32, 0x1000),
            request(1, Space::Memory32, 0x8000),
            request(2, Space::Io, 0x20),
            request(4, Space::Memory64, 0x4000),
        ];
        let placed = place(requests, &WINDOWS).unwrap();
        let mut places: Vec<_> =
            placed.iter().map(|(it, address)| (it.what.to_string(), *address)).collect();
        places.sort_unstable();
        let expected = [(0, 0xC000_8000), (1, 0xC000_0000), (2, 0x1000), (4, 0x80_0000_0000)];
        assert_eq!(
            places,
            expected.map(|(index, address)| (What::Bar(index).to_string(), address))
        );
    }

    #[test]
    fn a_full_window_is_reported() {
        let requests = vec![request(0, Space::Io, 0x80), request(1, Space::Io, 0x100)];
        let refused = place(requests, &WINDOWS).unwrap_err();
        assert_eq!((refused.what, refused.size), (What::Bar(0), 0x80));
        let text = "no room for BAR 0 of PCI function 01.0, 0x80 bytes: use fewer devices";
        assert_eq!(refused.to_string(), text);
    }

    proptest! {
        #[test]
        fn places_are_aligned_disjoint_and_inside(shifts in prop::collection::vec(4u32..19, 0..20)) {
            let requests: Vec<_> =
                shifts.iter().map(|shift| request(0, Space::Memory32, 1 << shift)).collect();
            let total: u64 = requests.iter().map(|request| request.size).sum();
            let Ok(mut placed) = place(requests, &WINDOWS) else {
                prop_assert!(total > WINDOWS.memory32.size);
                return Ok(());
            };
            placed.sort_by_key(|(_, address)| *address);
            let mut end = WINDOWS.memory32.base;
            for (request, address) in placed {
                prop_assert!(address >= end && address % request.size == 0);
                end = address + request.size;
            }
            prop_assert!(end <= WINDOWS.memory32.base + WINDOWS.memory32.size);
        }
    }
}
