// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Interrupt pins (PCI Local Bus Specification 3.0, sections 2.2.6 and 6.2.2; PCI-to-PCI Bridge
//! Architecture Specification 1.2, section 9.1).

use std::sync::Arc;

use parking_lot::Mutex;

use crate::irq::IrqLine;

/// An interrupt pin; its value is that of the interrupt pin register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
#[allow(missing_docs)] // The names are the specification's.
pub enum Pin {
    A = 1,
    B = 2,
    C = 3,
    D = 4,
}

/// Which of the parent bus's four interrupts the pin of a device leads to, 0 for INTA.
pub const fn swizzle(slot: u8, pin: Pin) -> u8 {
    (slot % 4 + (pin as u8 - 1)) % 4
}

/// The pin of one function: level triggered, and silent while the command register says so. Clones are
/// the same pin, so that a data path can drive it without its function.
#[derive(Debug, Clone)]
pub struct Intx {
    line: IrqLine,
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    asserted: bool,
    disabled: bool,
}

impl Intx {
    /// A pin that drives `line`.
    pub fn new(line: IrqLine) -> Self {
        Self { line, state: Arc::default() }
    }

    /// Whether the function wants to interrupt.
    pub fn set(&self, asserted: bool) {
        self.change(|state| state.asserted = asserted);
    }

    /// Follow the Interrupt Disable bit of the command register.
    pub fn set_disabled(&self, disabled: bool) {
        self.change(|state| state.disabled = disabled);
    }

    /// The Interrupt Status bit of the status register: it does not depend on Interrupt Disable.
    pub fn is_asserted(&self) -> bool {
        self.state.lock().asserted
    }

    /// The line changes under the lock, so that two changes cannot swap their edges.
    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.state.lock();
        let before = state.asserted && !state.disabled;
        change(&mut state);
        let now = state.asserted && !state.disabled;
        if now != before {
            self.line.set(now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::irq::IrqSink;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<bool>>);

    impl IrqSink for Recorder {
        fn set_level(&self, high: bool) {
            self.0.lock().push(high);
        }
    }

    #[test]
    fn a_disabled_pin_keeps_its_interrupt_but_not_its_line() {
        let sink = Arc::new(Recorder::default());
        let pin = Intx::new(IrqLine::new(Arc::clone(&sink) as Arc<dyn IrqSink>));
        pin.set(true);
        pin.set(true);
        pin.set_disabled(true);
        assert!(pin.is_asserted());
        pin.set_disabled(false);
        pin.set(false);
        assert_eq!(*sink.0.lock(), [true, false, true, false]);
    }

    #[test]
    fn pins_rotate_with_the_slot() {
        assert_eq!(swizzle(0, Pin::A), 0);
        assert_eq!(swizzle(3, Pin::A), 3);
        assert_eq!(swizzle(3, Pin::B), 0);
        assert_eq!(swizzle(31, Pin::D), 2);
    }
}
