// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What firmware does to a PCI bus before it starts an operating system: size the base address registers,
//! give each an address, and note which interrupt each pin leads to. It goes through configuration space,
//! as firmware would, and leaves the functions disabled: drivers enable them.

use log::debug;

use super::config::{BARS, bar, offset};
use super::host::{DevFn, PciHost};
use super::intx::{Pin, swizzle};

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

/// A register found no place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no room for BAR {index} of PCI function {function:?}, {size:#x} bytes: use fewer devices")]
pub struct NoRoom {
    /// The function.
    pub function: DevFn,
    /// The register.
    pub index: u8,
    /// Its size in bytes.
    pub size: u64,
}

/// Which window a register needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Space {
    Io,
    Memory32,
    Memory64,
}

/// A register that needs a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Request {
    function: DevFn,
    index: u8,
    space: Space,
    size: u64,
}

/// Place all base address registers, and program the interrupt line registers with `interrupts`, the inputs
/// that the bus's INTA to INTD lead to.
///
/// # Errors
/// [`NoRoom`]; some registers are then without a place.
pub fn assign(host: &PciHost, windows: &Windows, interrupts: [u8; 4]) -> Result<(), NoRoom> {
    let mut requests = Vec::new();
    for (at, _) in host.functions() {
        let function = Config { host, at };
        function.write(offset::COMMAND, &0u16.to_le_bytes());
        requests.extend(function.size_bars());
        if let Some(pin) = function.pin() {
            let line = interrupts[usize::from(swizzle(at.device(), pin))];
            function.write(offset::INTERRUPT_LINE, &[line]);
        }
    }
    for (request, address) in place(requests, windows)? {
        debug!("PCI {:?} BAR {} at {address:#x}", request.function, request.index);
        Config { host, at: request.function }.place_bar(&request, address);
    }
    Ok(())
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
        let Request { function, index, size, .. } = request;
        let address = window.take(size).ok_or(NoRoom { function, index, size })?;
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

/// The registers of one function.
struct Config<'a> {
    host: &'a PciHost,
    at: DevFn,
}

impl Config<'_> {
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
                requests.push(Request { function: self.at, index, space, size });
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

    fn place_bar(&self, request: &Request, address: u64) {
        let at = offset::BAR0 + u16::from(request.index) * 4;
        self.write32(at, address as u32);
        if request.space == Space::Memory64 {
            self.write32(at + 4, (address >> 32) as u32);
        }
    }

    fn pin(&self) -> Option<Pin> {
        let mut pin = [0];
        let _ = self.host.config_read(self.at, offset::INTERRUPT_PIN, &mut pin);
        [Pin::A, Pin::B, Pin::C, Pin::D].into_iter().find(|&known| known as u8 == pin[0])
    }

    fn read32(&self, at: u16) -> u32 {
        let mut data = [0; 4];
        let _ = self.host.config_read(self.at, at, &mut data);
        u32::from_le_bytes(data)
    }

    fn write32(&self, at: u16, value: u32) {
        self.write(at, &value.to_le_bytes());
    }

    /// The function is there, so its configuration space answers.
    fn write(&self, at: u16, data: &[u8]) {
        let _ = self.host.config_write(self.at, at, data);
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
        Request { function: DevFn::new(1, 0), index, space, size }
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
        let mut places: Vec<_> = placed.iter().map(|(it, address)| (it.index, *address)).collect();
        places.sort_unstable();
        let expected = [(0, 0xC000_8000), (1, 0xC000_0000), (2, 0x1000), (4, 0x80_0000_0000)];
        assert_eq!(places, expected);
    }

    #[test]
    fn a_full_window_is_reported() {
        let requests = vec![request(0, Space::Io, 0x80), request(1, Space::Io, 0x100)];
        let refused = place(requests, &WINDOWS).unwrap_err();
        assert_eq!((refused.index, refused.size), (0, 0x80));
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
