// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Where a function sits. Bus numbers are not part of it: a guest may renumber buses at any time.

use std::fmt;

use super::intx::{Pin, swizzle};

/// Device and function number.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DevFn(u8);

impl DevFn {
    /// Device 0..=31, function 0..=7; higher bits are ignored.
    pub const fn new(device: u8, function: u8) -> Self {
        Self((device & 31) << 3 | function & 7)
    }

    /// From a requester id.
    pub const fn from_bits(bits: u8) -> Self {
        Self(bits)
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

/// A place in the topology: on the root bus, or on the bus behind one of its bridges.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    /// The bridge, itself on the root bus.
    pub bridge: Option<DevFn>,
    /// Device and function on its own bus.
    pub at: DevFn,
}

impl Place {
    /// Behind `bridge`.
    pub const fn behind(bridge: DevFn, at: DevFn) -> Self {
        Self { bridge: Some(bridge), at }
    }

    /// The requester id with which interrupt controllers see its messages (PCI Express Base 6.0, section 2.2.6.2). A
    /// conventional bridge puts its own in place of those behind it (PCI Express to PCI/PCI-X Bridge Specification 1.0,
    /// section 2.3), so that is always one of the root bus, number 0.
    pub const fn requester(self) -> u16 {
        match self.bridge {
            Some(bridge) => bridge.bits() as u16,
            None => self.at.bits() as u16,
        }
    }

    /// Which of the root bus's four interrupts `pin` leads to, 0 for INTA.
    pub const fn interrupt(self, pin: Pin) -> u8 {
        let on_its_bus = swizzle(self.at.device(), pin);
        match self.bridge {
            Some(bridge) => (on_its_bus + bridge.device()) % 4,
            None => on_its_bus,
        }
    }
}

impl From<DevFn> for Place {
    fn from(at: DevFn) -> Self {
        Self { bridge: None, at }
    }
}

impl fmt::Debug for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.bridge {
            Some(bridge) => write!(f, "{bridge:?}/{:?}", self.at),
            None => write!(f, "{:?}", self.at),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interrupts_rotate_once_more_behind_a_bridge() {
        let bridge = DevFn::new(2, 0);
        let behind = Place::behind(bridge, DevFn::new(1, 0));
        assert_eq!(Place::from(DevFn::new(1, 0)).interrupt(Pin::A), 1);
        assert_eq!(behind.interrupt(Pin::A), 3);
        assert_eq!(behind.interrupt(Pin::B), 0);
        assert_eq!(format!("{behind:?}"), "02.0/01.0");
    }

    #[test]
    fn a_bridge_speaks_for_those_behind_it() {
        let bridge = DevFn::new(2, 0);
        assert_eq!(Place::from(DevFn::new(3, 1)).requester(), 0x19);
        assert_eq!(Place::behind(bridge, DevFn::new(3, 0)).requester(), 0x10);
    }
}
