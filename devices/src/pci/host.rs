// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The buses: which function sits where, how configuration accesses reach it, and where its base address
//! registers decode.
//!
//! After each configuration write the function's BARs are compared with the address spaces, and moved.
//! A guest may program BARs that overlap: the first keeps its place, the other does not decode until
//! there is room. Behind a bridge of the root bus there is one more bus; its functions answer to the bus
//! number that the guest gave to the bridge, and decode only inside the windows that the bridge forwards.
//! Bridges behind bridges are not looked for.
//!
//! Lock order: root bus, function, address space. Address spaces hold no lock while a device runs.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use log::debug;
use parking_lot::Mutex;

use super::bridge::Forwarding;
use super::config::offset;
pub use super::place::{DevFn, Place};
use super::{Bar, BarSpace, PciFunction};
use crate::bus::{Access, Bus, IoDevice};

/// Bit of the header type register: there are functions besides function 0.
const MULTIFUNCTION: u8 = 1 << 7;

/// A function shared between its bus and whoever else controls it.
pub type SharedFunction = Arc<Mutex<dyn PciFunction>>;

/// Why the topology could not be changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PciError {
    /// A function is there already.
    #[error("PCI slot {0:?} is in use")]
    InUse(Place),
    /// No function is there.
    #[error("PCI slot {0:?} is empty")]
    Empty(Place),
}

/// The root bus, and the buses behind its bridges.
pub struct PciHost {
    memory: Arc<Bus>,
    ports: Arc<Bus>,
    functions: Mutex<Functions>,
}

type Functions = BTreeMap<Place, Slot>;

struct Slot {
    function: SharedFunction,
    /// What the function wants to decode, and what a bridge in front of it lets through.
    wanted: Vec<Bar>,
    /// What is on the buses.
    decoded: Vec<Bar>,
    /// What the function forwards, if it is a bridge.
    forwarding: Option<Forwarding>,
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

    /// Put a function on its bus.
    ///
    /// # Errors
    /// [`PciError::InUse`].
    pub fn add(&self, place: impl Into<Place>, function: SharedFunction) -> Result<(), PciError> {
        let place = place.into();
        let mut functions = self.functions.lock();
        if functions.contains_key(&place) {
            return Err(PciError::InUse(place));
        }
        let slot = Slot { function, wanted: Vec::new(), decoded: Vec::new(), forwarding: None };
        functions.insert(place, slot);
        self.follow(&mut functions, place);
        Ok(())
    }

    /// Take a function off its bus.
    ///
    /// # Errors
    /// [`PciError::Empty`].
    pub fn remove(&self, place: impl Into<Place>) -> Result<SharedFunction, PciError> {
        let place = place.into();
        let mut functions = self.functions.lock();
        let mut slot = functions.remove(&place).ok_or(PciError::Empty(place))?;
        slot.wanted.clear();
        self.withdraw(&mut slot);
        if slot.forwarding.is_some() {
            self.decode_behind(&mut functions, place.at);
        }
        self.fill_gaps(&mut functions);
        Ok(slot.function)
    }

    /// The functions there are, in order: the root bus first, then what is behind each bridge.
    pub fn functions(&self) -> Vec<(Place, SharedFunction)> {
        let functions = self.functions.lock();
        functions.iter().map(|(&at, slot)| (at, Arc::clone(&slot.function))).collect()
    }

    /// Reset all functions. Their BARs no longer decode.
    pub fn reset(&self) {
        let mut functions = self.functions.lock();
        for slot in functions.values() {
            slot.function.lock().reset();
        }
        let places: Vec<Place> = functions.keys().copied().collect();
        for place in places {
            self.follow(&mut functions, place);
        }
    }

    /// Read configuration space of a function on the bus with this number: 1, 2 or 4 bytes, naturally
    /// aligned. All ones where there is no function.
    pub fn config_read(&self, bus: u8, at: DevFn, offset: u16, data: &mut [u8]) -> Access {
        let functions = self.functions.lock();
        let Some((place, slot)) = find(&functions, bus, at) else {
            data.fill(0xff);
            return Access::Unclaimed;
        };
        slot.function.lock().config_read(offset, data);
        // Whether a device has more than one function is known to its bus only.
        let header_type = offset::HEADER_TYPE.wrapping_sub(offset);
        if at.function() == 0
            && let Some(byte) = data.get_mut(usize::from(header_type))
            && (1..8).any(|function| {
                let at = DevFn::new(at.device(), function);
                functions.contains_key(&Place { at, ..place })
            })
        {
            *byte |= MULTIFUNCTION;
        }
        Access::Done
    }

    /// Write configuration space: 1, 2 or 4 bytes, naturally aligned.
    pub fn config_write(&self, bus: u8, at: DevFn, offset: u16, data: &[u8]) -> Access {
        let mut functions = self.functions.lock();
        let Some((place, slot)) = find(&functions, bus, at) else { return Access::Unclaimed };
        slot.function.lock().config_write(offset, data);
        self.follow(&mut functions, place);
        Access::Done
    }

    /// Follow a change of a function's registers.
    fn follow(&self, functions: &mut Functions, place: Place) {
        self.decode(functions, place);
        let Some(slot) = functions.get_mut(&place).filter(|_| place.bridge.is_none()) else {
            return;
        };
        let forwarding = slot.function.lock().forwarding();
        if forwarding != slot.forwarding {
            slot.forwarding = forwarding;
            self.decode_behind(functions, place.at);
        }
    }

    /// Follow a change of the windows of `bridge`.
    fn decode_behind(&self, functions: &mut Functions, bridge: DevFn) {
        let behind = |place: &&Place| place.bridge == Some(bridge);
        let places: Vec<Place> = functions.keys().filter(behind).copied().collect();
        for place in places {
            self.decode(functions, place);
        }
    }

    /// Follow a change of a function's BARs.
    fn decode(&self, functions: &mut Functions, place: Place) {
        let Some(slot) = functions.get(&place) else { return };
        let mut wanted = slot.function.lock().bars();
        if let Some(bridge) = place.bridge {
            let forwarding = functions.get(&bridge.into()).and_then(|bridge| bridge.forwarding);
            wanted.retain(|bar| forwarding.is_some_and(|it| it.reaches(bar)));
        }
        let Some(slot) = functions.get_mut(&place).filter(|slot| slot.wanted != wanted) else {
            return;
        };
        slot.wanted = wanted;
        self.withdraw(slot);
        self.claim(slot);
        self.fill_gaps(functions);
    }

    /// Take off the buses what the function no longer wants.
    fn withdraw(&self, slot: &mut Slot) {
        let Slot { function, wanted, decoded, .. } = slot;
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
    fn fill_gaps(&self, functions: &mut Functions) {
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

/// The function that a configuration access to bus number `bus` reaches. Of two bridges that a guest gave
/// the same number, the first one answers.
fn find(functions: &Functions, bus: u8, at: DevFn) -> Option<(Place, &Slot)> {
    let place = if bus == 0 {
        at.into()
    } else {
        let leads_there = |slot: &Slot| slot.forwarding.is_some_and(|it| it.secondary == bus);
        let (bridge, _) = functions.iter().find(|(_, slot)| leads_there(slot))?;
        Place::behind(bridge.at, at)
    };
    functions.get(&place).map(|slot| (place, slot))
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

    /// Bus, function and register.
    fn decode(offset: u64, len: usize) -> Option<(u8, DevFn, u16)> {
        let bus = u8::try_from(offset / Self::BYTES_PER_BUS).ok()?;
        let at = DevFn::from_bits((offset >> 12) as u8);
        is_natural(offset, len).then_some((bus, at, (offset & 0xfff) as u16))
    }
}

impl IoDevice for Ecam {
    fn read(&mut self, offset: u64, data: &mut [u8]) -> Access {
        match Self::decode(offset, data.len()) {
            Some((bus, at, offset)) => self.0.config_read(bus, at, offset, data),
            None => Access::Unclaimed,
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Access {
        match Self::decode(offset, data.len()) {
            Some((bus, at, offset)) => self.0.config_write(bus, at, offset, data),
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

    /// Bus, function and register that the data port leads to.
    fn target(&self, port: u64, len: usize) -> Option<(u8, DevFn, u16)> {
        let [register, devfn, bus, _] = self.address.to_le_bytes();
        let offset = port.checked_sub(Self::DATA)?;
        (self.address & Self::ENABLE != 0 && is_natural(offset, len)).then_some((
            bus,
            DevFn::from_bits(devfn),
            u16::from(register) + offset as u16,
        ))
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
                let Some((bus, at, register)) = self.target(offset, len) else {
                    return Access::Unclaimed;
                };
                return self.host.config_read(bus, at, register, data);
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
                let Some((bus, at, register)) = self.target(offset, data.len()) else {
                    return Access::Unclaimed;
                };
                return self.host.config_write(bus, at, register, data);
            }
        }
        Access::Done
    }
}

#[cfg(test)]
mod tests;
