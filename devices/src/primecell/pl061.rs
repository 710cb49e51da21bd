// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! PL061 general-purpose input (Arm DDI 0190B): eight lines, one of them a key. Lines that the guest makes outputs lead
//! nowhere; hardware control is left out.
//!
//! The key stays down until the guest has looked at it, which takes a real key's part of being held for a while.

use serde::{Deserialize, Serialize};

use super::{identification, read_register, write_register};
use crate::bus::{Access, IoDevice};
use crate::irq::IrqLine;

/// Registers, section 3.2. The data register has an address for each mask.
mod register {
    pub(super) const DATA_END: u64 = 0x400;
    pub(super) const DIR: u64 = 0x400;
    pub(super) const IS: u64 = 0x404;
    pub(super) const IBE: u64 = 0x408;
    pub(super) const IEV: u64 = 0x40C;
    pub(super) const IE: u64 = 0x410;
    pub(super) const RIS: u64 = 0x414;
    pub(super) const MIS: u64 = 0x418;
    pub(super) const IC: u64 = 0x41C;
    pub(super) const AFSEL: u64 = 0x420;
}

const PART: u16 = 0x061;
const REVISION: u8 = 0;

/// Eight lines.
#[derive(Debug)]
pub struct Pl061 {
    // Wiring.
    irq: IrqLine,
    // State.
    state: State,
}

/// Each a bit for each line.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    /// Levels of the inputs.
    input: u8,
    /// What the guest drives the outputs to.
    output: u8,
    direction: u8,
    /// Interrupts of level-triggered lines follow the level, others wait for an edge.
    sense: u8,
    both_edges: u8,
    event: u8,
    mask: u8,
    /// Edges that the guest has not acknowledged.
    edges: u8,
    alternate: u8,
    /// Keys that the guest has yet to look at.
    pressed: u8,
}

impl Pl061 {
    /// Lines that are all low.
    pub fn new(irq: IrqLine) -> Self {
        Self { irq, state: State::default() }
    }

    /// Press the key at line `line`, 0 to 7, until the guest has looked at it.
    pub fn press(&mut self, line: u8) {
        let bit = 1 << (line & 7);
        self.state.pressed |= bit;
        self.drive(self.state.input | bit);
    }

    /// Back to the state after power-on.
    pub fn reset(&mut self) {
        self.state = State::default();
        self.update();
    }

    /// Set the levels of all inputs.
    fn drive(&mut self, input: u8) {
        let state = &mut self.state;
        let changed = (state.input ^ input) & !state.direction;
        let wanted = state.both_edges | !(input ^ state.event);
        state.edges |= changed & wanted & !state.sense;
        state.input = input;
        self.update();
    }

    fn raw_interrupts(&self) -> u8 {
        let state = &self.state;
        let levels = !(state.input ^ state.event) & !state.direction;
        state.sense & levels | !state.sense & state.edges
    }

    fn update(&self) {
        self.irq.set(self.raw_interrupts() & self.state.mask != 0);
    }

    fn read_data(&mut self, mask: u8) -> u8 {
        let state = &mut self.state;
        let value = state.direction & state.output | !state.direction & state.input;
        let seen = state.pressed & mask;
        if seen != 0 {
            state.pressed &= !seen;
            let released = state.input & !seen;
            self.drive(released);
        }
        value & mask
    }

    fn read_register(&mut self, offset: u64) -> u32 {
        let value = match offset {
            0..register::DATA_END => self.read_data((offset >> 2) as u8),
            register::DIR => self.state.direction,
            register::IS => self.state.sense,
            register::IBE => self.state.both_edges,
            register::IEV => self.state.event,
            register::IE => self.state.mask,
            register::RIS => self.raw_interrupts(),
            register::MIS => self.raw_interrupts() & self.state.mask,
            register::AFSEL => self.state.alternate,
            _ => return identification(offset, PART, REVISION).unwrap_or(0),
        };
        value.into()
    }

    fn write_register(&mut self, offset: u64, value: u8) {
        let state = &mut self.state;
        match offset {
            0..register::DATA_END => {
                let mask = (offset >> 2) as u8;
                state.output = state.output & !mask | value & mask;
            }
            register::DIR => state.direction = value,
            register::IS => state.sense = value,
            register::IBE => state.both_edges = value,
            register::IEV => state.event = value,
            register::IE => state.mask = value,
            register::IC => state.edges &= !value,
            register::AFSEL => state.alternate = value,
            _ => {}
        }
        self.update();
    }
}

impl IoDevice for Pl061 {
    fn read(&mut self, offset: u64, data: &mut [u8]) -> Access {
        read_register(offset, data, |offset| self.read_register(offset))
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Access {
        write_register(offset, data, |offset, value| self.write_register(offset, value as u8))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Level, accept_anything, identity, read, write};
    use super::*;

    const KEY: u8 = 3;
    const BIT: u32 = 1 << KEY;
    /// Where the data register shows only the key.
    const DATA: u64 = (BIT as u64) << 2;

    #[test]
    fn linux_knows_it() {
        let mut gpio = Pl061::new(IrqLine::detached());
        let (primecell, peripheral) = identity(&mut gpio);
        assert_eq!(primecell, 0xB105_F00D);
        // The identity and mask of drivers/gpio/gpio-pl061.c.
        assert_eq!(peripheral & 0x000F_FFFF, 0x0004_1061);
        accept_anything(&mut gpio);
    }

    #[test]
    fn a_key_is_down_until_the_guest_has_looked() {
        let (level, irq) = Level::new();
        let mut gpio = Pl061::new(irq);
        write(&mut gpio, register::IBE, BIT);
        write(&mut gpio, register::IE, BIT);
        gpio.press(KEY);
        assert!(level.is_high());
        write(&mut gpio, register::IC, BIT);
        assert!(!level.is_high());
        assert_eq!(read(&mut gpio, 1 << 2), 0, "another line");
        assert_eq!(read(&mut gpio, DATA), BIT);
        // It is up again, and says so.
        assert!(level.is_high() && read(&mut gpio, register::MIS) == BIT);
        assert_eq!(read(&mut gpio, DATA), 0);
        write(&mut gpio, register::IC, BIT);
        assert!(!level.is_high());
    }

    #[test]
    fn only_the_edge_that_is_asked_for_interrupts() {
        let (level, irq) = Level::new();
        let mut gpio = Pl061::new(irq);
        write(&mut gpio, register::IE, BIT);
        gpio.press(KEY);
        assert!(!level.is_high(), "falling edges only");
        assert_eq!(read(&mut gpio, DATA), BIT);
        assert!(level.is_high());
        write(&mut gpio, register::IEV, BIT);
        write(&mut gpio, register::IC, 0xFF);
        gpio.press(KEY);
        assert!(level.is_high());
        gpio.reset();
        assert!(!level.is_high());
    }

    #[test]
    fn outputs_keep_what_is_written_under_the_mask() {
        let mut gpio = Pl061::new(IrqLine::detached());
        write(&mut gpio, register::DIR, 0x0F);
        write(&mut gpio, 0x05 << 2, 0xFF);
        assert_eq!(read(&mut gpio, 0xFF << 2), 0x05);
    }
}
