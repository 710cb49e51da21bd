// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! PL011 serial port (Arm DDI 0183G). It also serves drivers of the generic UART of the Server Base System Architecture,
//! which never turn it on: it is always on. Characters leave at once, so there is no waiting to transmit; baud rate, modem
//! lines, DMA, loopback and reception errors are left out.

use std::collections::VecDeque;
use std::io::{self, Write};

use serde::{Deserialize, Serialize};

use super::{identification, read_register, write_register};
use crate::bus::{Access, IoDevice};
use crate::irq::IrqLine;

/// Registers, section 3.2.
mod register {
    pub(super) const DR: u64 = 0x00;
    pub(super) const FR: u64 = 0x18;
    pub(super) const ILPR: u64 = 0x20;
    pub(super) const IBRD: u64 = 0x24;
    pub(super) const FBRD: u64 = 0x28;
    pub(super) const LCR_H: u64 = 0x2C;
    pub(super) const CR: u64 = 0x30;
    pub(super) const IFLS: u64 = 0x34;
    pub(super) const IMSC: u64 = 0x38;
    pub(super) const RIS: u64 = 0x3C;
    pub(super) const MIS: u64 = 0x40;
    pub(super) const ICR: u64 = 0x44;
}
/// Flags, section 3.3.3.
mod flag {
    pub(super) const RXFE: u32 = 1 << 4;
    pub(super) const RXFF: u32 = 1 << 6;
    pub(super) const TXFE: u32 = 1 << 7;
}
/// Interrupts, section 3.3.11: receive, and transmit.
const RX: u32 = 1 << 4;
const TX: u32 = 1 << 5;

const PART: u16 = 0x011;
/// With FIFOs of 32 characters.
const REVISION: u8 = 3;
const FIFO: usize = 32;
/// Characters for the guest that wait, those in the FIFO included.
const BACKLOG: usize = 4096;

/// A character backend that takes everything at once, or drops it.
type Output = Box<dyn Write + Send>;

/// A serial port.
pub struct Pl011 {
    // Wiring.
    irq: IrqLine,
    output: Output,
    on_room: Box<dyn Fn() + Send>,
    /// What the line was told last. An interrupt controller that has no processors yet takes no calls, and there may be
    /// characters by then.
    high: bool,
    // State.
    received: VecDeque<u8>,
    /// Characters were refused for want of room.
    starved: bool,
    state: State,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    ilpr: u32,
    ibrd: u32,
    fbrd: u32,
    lcr_h: u32,
    cr: u32,
    ifls: u32,
    imsc: u32,
    /// There is room to transmit again, and the guest has not acknowledged it.
    tx: bool,
}

impl Default for State {
    /// Section 3.2.
    fn default() -> Self {
        Self { ilpr: 0, ibrd: 0, fbrd: 0, lcr_h: 0, cr: 0x300, ifls: 0x12, imsc: 0, tx: false }
    }
}

impl std::fmt::Debug for Pl011 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pl011").field("state", &self.state).finish_non_exhaustive()
    }
}

impl Pl011 {
    /// A port whose output goes to `output`, which must never block. `on_room` is called when there is room
    /// again for characters that [`Self::receive`] refused.
    pub fn new(irq: IrqLine, output: Output, on_room: Box<dyn Fn() + Send>) -> Self {
        let (received, state) = (VecDeque::new(), State::default());
        Self { irq, output, on_room, high: false, received, starved: false, state }
    }

    /// Characters for the guest. Returns how many were taken; the rest is to be offered later.
    pub fn receive(&mut self, bytes: &[u8]) -> usize {
        let taken = bytes.len().min(BACKLOG - self.received.len());
        self.received.extend(&bytes[..taken]);
        self.starved = taken < bytes.len();
        self.update();
        taken
    }

    /// Back to the state after power-on. What was received for the guest stays.
    pub fn reset(&mut self) {
        self.state = State::default();
        self.update();
    }

    /// What would interrupt: reception while there is something to read, whatever the guest acknowledges.
    fn raw_interrupts(&self) -> u32 {
        let rx = if self.received.is_empty() { 0 } else { RX };
        rx | if self.state.tx { TX } else { 0 }
    }

    fn update(&mut self) {
        let high = self.raw_interrupts() & self.state.imsc != 0;
        if high != self.high {
            self.high = high;
            self.irq.set(high);
        }
    }

    fn flags(&self) -> u32 {
        let received = match self.received.len() {
            0 => flag::RXFE,
            FIFO.. => flag::RXFF,
            _ => 0,
        };
        received | flag::TXFE
    }

    fn take_character(&mut self) -> u32 {
        let character = self.received.pop_front().unwrap_or(0);
        if self.starved && self.received.len() <= BACKLOG / 2 {
            self.starved = false;
            (self.on_room)();
        }
        self.update();
        character.into()
    }

    fn read_register(&mut self, offset: u64) -> u32 {
        match offset {
            register::DR => self.take_character(),
            register::FR => self.flags(),
            register::ILPR => self.state.ilpr,
            register::IBRD => self.state.ibrd,
            register::FBRD => self.state.fbrd,
            register::LCR_H => self.state.lcr_h,
            register::CR => self.state.cr,
            register::IFLS => self.state.ifls,
            register::IMSC => self.state.imsc,
            register::RIS => self.raw_interrupts(),
            register::MIS => self.raw_interrupts() & self.state.imsc,
            _ => identification(offset, PART, REVISION).unwrap_or(0),
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            register::DR => self.transmit(value as u8),
            register::ILPR => self.state.ilpr = value & 0xFF,
            register::IBRD => self.state.ibrd = value & 0xFFFF,
            register::FBRD => self.state.fbrd = value & 0x3F,
            register::LCR_H => self.state.lcr_h = value & 0xFF,
            register::CR => self.state.cr = value & 0xFFFF,
            register::IFLS => self.state.ifls = value & 0x3F,
            register::IMSC => self.state.imsc = value & 0x7FF,
            register::ICR if value & TX != 0 => self.state.tx = false,
            _ => {}
        }
        self.update();
    }

    fn transmit(&mut self, character: u8) {
        if let Err(error) = self.output.write_all(&[character])
            && error.kind() != io::ErrorKind::WouldBlock
        {
            log::debug!("serial output: {error}");
        }
        self.state.tx = true;
    }
}

impl IoDevice for Pl011 {
    fn read(&mut self, offset: u64, data: &mut [u8]) -> Access {
        read_register(offset, data, |offset| self.read_register(offset))
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Access {
        write_register(offset, data, |offset, value| self.write_register(offset, value))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use parking_lot::Mutex;

    use super::super::testing::{Level, accept_anything, identity, read, write};
    use super::*;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().extend(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn port() -> (Pl011, Arc<Level>, Sink) {
        let ((level, irq), sink) = (Level::new(), Sink::default());
        (Pl011::new(irq, Box::new(sink.clone()), Box::new(|| ())), level, sink)
    }

    #[test]
    fn linux_knows_it() {
        let (mut port, ..) = port();
        let (primecell, peripheral) = identity(&mut port);
        assert_eq!(primecell, 0xB105_F00D);
        // The identity and mask of drivers/tty/serial/amba-pl011.c.
        assert_eq!(peripheral & 0x000F_FFFF, 0x0004_1011);
        accept_anything(&mut port);
    }

    /// On a GICv2, KVM takes a call before there are vCPUs for a sign that there will be none.
    #[test]
    fn characters_that_come_before_the_guest_runs_do_not_touch_the_line() {
        struct Untouchable;
        impl crate::irq::IrqSink for Untouchable {
            fn set_level(&self, high: bool) {
                panic!("set to {high}");
            }
        }
        let irq = IrqLine::new(Arc::new(Untouchable));
        let mut port = Pl011::new(irq, Box::new(Sink::default()), Box::new(|| ()));
        port.reset();
        assert_eq!(port.receive(b"early"), 5);
        assert_eq!(read(&mut port, register::DR), u32::from(b'e'));
    }

    #[test]
    fn it_transmits_without_being_turned_on_and_says_when_it_may_go_on() {
        let (mut port, level, sink) = port();
        write(&mut port, register::IMSC, TX);
        assert!(!level.is_high());
        assert_eq!(port.write(register::DR, b"h"), Access::Done);
        write(&mut port, register::DR, u32::from(b'i'));
        assert_eq!(*sink.0.lock(), b"hi");
        assert!(level.is_high() && read(&mut port, register::MIS) == TX);
        write(&mut port, register::ICR, 0x7FF);
        assert!(!level.is_high());
        assert_eq!(read(&mut port, register::FR), flag::TXFE | flag::RXFE);
    }

    #[test]
    fn it_interrupts_until_all_is_read() {
        let (mut port, level, _) = port();
        assert_eq!(port.receive(b"ab"), 2);
        assert!(!level.is_high(), "masked");
        write(&mut port, register::IMSC, RX);
        write(&mut port, register::ICR, RX);
        assert!(level.is_high());
        assert_eq!([read(&mut port, register::DR), read(&mut port, register::DR)], [97, 98]);
        assert!(!level.is_high());
        assert_eq!(read(&mut port, register::FR) & flag::RXFE, flag::RXFE);
    }

    #[test]
    fn what_waits_is_bounded_and_room_is_told_once() {
        let room = Arc::new(Mutex::new(0));
        let on_room = {
            let room = Arc::clone(&room);
            Box::new(move || *room.lock() += 1)
        };
        let mut port = Pl011::new(IrqLine::detached(), Box::new(Sink::default()), on_room);
        assert_eq!(port.receive(&[7; 6000]), BACKLOG);
        assert_eq!(read(&mut port, register::FR) & flag::RXFF, flag::RXFF);
        for _ in 0..BACKLOG {
            assert_eq!(read(&mut port, register::DR), 7);
        }
        assert_eq!(*room.lock(), 1);
    }
}
