// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What a person who looks at the bus from the host wants to know.

use super::bridge::Forwarding;
use super::config::{bar, offset};
use super::host::{PciHost, Place};
use super::{Bar, PciFunction};

/// A function as its configuration space shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    /// Where it sits.
    pub place: Place,
    /// Number of its bus; 0 too where the bridge in front of it is not numbered.
    pub bus: u8,
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device: u16,
    /// Subsystem vendor.
    pub subsystem_vendor: u16,
    /// Subsystem.
    pub subsystem: u16,
    /// Base class and subclass.
    pub class: u16,
    /// Interrupt pin: 0 none, 1 INTA.
    pub interrupt_pin: u8,
    /// Interrupt line register.
    pub interrupt_line: u8,
    /// Base address registers that decode.
    pub bars: Vec<BarDescription>,
    /// What it forwards, if it is a bridge.
    pub bridge: Option<Forwarding>,
}

/// A base address register that decodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BarDescription {
    /// Where.
    pub bar: Bar,
    /// Whether reads have no side effects.
    pub prefetchable: bool,
    /// Whether it is 64 bits wide.
    pub wide: bool,
}

/// Describe all functions, in order.
pub fn describe(host: &PciHost) -> Vec<Description> {
    let functions = host.functions();
    let mut found: Vec<Description> = Vec::with_capacity(functions.len());
    // Bridges come before what is behind them.
    for (place, function) in functions {
        let bridge = found.iter().find(|it| place.bridge.is_some_and(|at| it.place == at.into()));
        let bus = bridge.and_then(|it| it.bridge).map_or(0, |forwarding| forwarding.secondary);
        found.push(describe_one(place, bus, &mut *function.lock()));
    }
    found
}

fn describe_one(place: Place, bus: u8, function: &mut dyn PciFunction) -> Description {
    let bars = function.bars().into_iter().map(|it| describe_bar(function, it)).collect();
    let [revision_and_class, line_and_pin] =
        [offset::REVISION_ID, offset::INTERRUPT_LINE].map(|at| read32(function, at).to_le_bytes());
    let [vendor, device] = halves(read32(function, offset::VENDOR_ID));
    // A bridge has other registers there.
    let [subsystem_vendor, subsystem] = match function.forwarding() {
        Some(_) => [0, 0],
        None => halves(read32(function, offset::SUBSYSTEM_VENDOR_ID)),
    };
    Description {
        place,
        bus,
        vendor,
        device,
        subsystem_vendor,
        subsystem,
        class: u16::from_le_bytes([revision_and_class[2], revision_and_class[3]]),
        interrupt_pin: line_and_pin[1],
        interrupt_line: line_and_pin[0],
        bars,
        bridge: function.forwarding(),
    }
}

fn describe_bar(function: &mut dyn PciFunction, it: Bar) -> BarDescription {
    let register = read32(function, offset::BAR0 + u16::from(it.index) * 4);
    let is_memory = register & bar::IO == 0;
    BarDescription {
        bar: it,
        prefetchable: is_memory && register & bar::PREFETCHABLE != 0,
        wide: is_memory && register & bar::WIDE != 0,
    }
}

fn read32(function: &mut dyn PciFunction, offset: u16) -> u32 {
    let mut data = [0; 4];
    function.config_read(offset, &mut data);
    u32::from_le_bytes(data)
}

fn halves(register: u32) -> [u16; 2] {
    [register as u16, (register >> 16) as u16]
}
