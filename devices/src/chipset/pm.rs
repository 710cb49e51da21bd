// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! ACPI fixed hardware: PM1 event and control blocks, PM timer, GPE0 (ACPI 6.5, section 4.8; register
//! places as in the ICH9 datasheet, section 13.8.3).
//!
//! ACPI mode is always on. Of the sleep states there is S5, off. The timer runs, but its overflow raises no
//! event.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::{GuestRequest, GuestRequestSink};
use crate::bus::{Access, IoDevice};
use crate::irq::IrqLine;

const PM1_STATUS: usize = 0x00;
const PM1_ENABLE: usize = 0x02;
const PM1_CONTROL: usize = 0x04;
const PM_TIMER: usize = 0x08;
const GPE0_STATUS: usize = 0x20;
const GPE0_ENABLE: usize = 0x28;
const GPE0_BYTES: usize = 8;

const POWER_BUTTON: u16 = 1 << 8;
const SCI_ENABLE: u16 = 1;
const SLEEP_TYPE_SHIFT: u16 = 10;
const SLEEP_TYPE_MASK: u16 = 7;
const SLEEP_ENABLE: u16 = 1 << 13;
/// Sleep type of S5, as the name space tells it.
const SLEEP_TYPE_OFF: u16 = 5;
const TIMER_HZ: u128 = 3_579_545;

/// The power management block: [`PowerManagement::PORTS`] ports.
pub struct PowerManagement {
    sci: IrqLine,
    requests: Arc<dyn GuestRequestSink>,
    started: Instant,
    state: State,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct State {
    pm1_status: u16,
    pm1_enable: u16,
    pm1_control: u16,
    gpe0_status: [u8; GPE0_BYTES],
    gpe0_enable: [u8; GPE0_BYTES],
}

impl std::fmt::Debug for PowerManagement {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PowerManagement").field("state", &self.state).finish_non_exhaustive()
    }
}

impl PowerManagement {
    /// Ports that the block takes.
    pub const PORTS: u64 = 0x80;

    /// A block that interrupts through `sci` and powers off through `requests`.
    pub fn new(sci: IrqLine, requests: Arc<dyn GuestRequestSink>) -> Self {
        Self { sci, requests, started: Instant::now(), state: State::default() }
    }

    /// Press the power button.
    pub fn press_power_button(&mut self) {
        self.state.pm1_status |= POWER_BUTTON;
        self.update_sci();
    }

    /// Raise general-purpose event `event`; the guest's method `_E` with that number handles it.
    ///
    /// # Panics
    /// There are 64 events: a mistake in the board.
    pub fn raise_event(&mut self, event: u8) {
        self.state.gpe0_status[usize::from(event / 8)] |= 1 << (event % 8);
        self.update_sci();
    }

    /// Back to the state after power-on.
    pub fn reset(&mut self) {
        self.state = State::default();
        self.update_sci();
    }

    fn update_sci(&self) {
        let State { pm1_status, pm1_enable, gpe0_status, gpe0_enable, .. } = &self.state;
        let general =
            gpe0_status.iter().zip(gpe0_enable).any(|(status, enable)| status & enable != 0);
        self.sci.set(pm1_status & pm1_enable != 0 || general);
    }

    fn timer(&self, elapsed: Duration) -> u32 {
        // The counter has 32 bits and wraps around.
        (elapsed.as_nanos() * TIMER_HZ / 1_000_000_000) as u32
    }

    /// All registers, as they lie in the block.
    fn registers(&self) -> [u8; Self::PORTS as usize] {
        let mut block = [0; Self::PORTS as usize];
        let mut put = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
        put(PM1_STATUS, &self.state.pm1_status.to_le_bytes());
        put(PM1_ENABLE, &self.state.pm1_enable.to_le_bytes());
        put(PM1_CONTROL, &(self.state.pm1_control | SCI_ENABLE).to_le_bytes());
        put(PM_TIMER, &self.timer(self.started.elapsed()).to_le_bytes());
        put(GPE0_STATUS, &self.state.gpe0_status);
        put(GPE0_ENABLE, &self.state.gpe0_enable);
        block
    }

    fn write_byte(&mut self, at: usize, value: u8) {
        let state = &mut self.state;
        let in_word = |register: u16, at: usize| {
            let shift = at % 2 * 8;
            (register & !(0xFF << shift), u16::from(value) << shift)
        };
        match at {
            PM1_STATUS..PM1_ENABLE => state.pm1_status &= !in_word(0, at).1,
            PM1_ENABLE..PM1_CONTROL => {
                let (kept, new) = in_word(state.pm1_enable, at);
                state.pm1_enable = kept | new;
            }
            PM1_CONTROL..0x06 => {
                let (kept, new) = in_word(state.pm1_control, at);
                let written = kept | new;
                state.pm1_control = written & !SLEEP_ENABLE;
                if written & SLEEP_ENABLE != 0
                    && written >> SLEEP_TYPE_SHIFT & SLEEP_TYPE_MASK == SLEEP_TYPE_OFF
                {
                    self.requests.request(GuestRequest::PowerOff);
                }
            }
            GPE0_STATUS..GPE0_ENABLE => state.gpe0_status[at - GPE0_STATUS] &= !value,
            GPE0_ENABLE..0x30 => state.gpe0_enable[at - GPE0_ENABLE] = value,
            _ => {}
        }
    }
}

impl IoDevice for PowerManagement {
    fn read(&mut self, offset: u64, data: &mut [u8]) -> Access {
        let block = self.registers();
        let Some(registers) =
            usize::try_from(offset).ok().and_then(|at| block.get(at..at.checked_add(data.len())?))
        else {
            return Access::Unclaimed;
        };
        data.copy_from_slice(registers);
        Access::Done
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Access {
        let Ok(offset) = usize::try_from(offset) else { return Access::Unclaimed };
        for (at, value) in (offset..).zip(data) {
            self.write_byte(at, *value);
        }
        self.update_sci();
        Access::Done
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chipset::testing::Requests;
    use crate::irq::IrqSink;
    use parking_lot::Mutex;

    #[derive(Default)]
    struct Level(Mutex<bool>);

    impl IrqSink for Level {
        fn set_level(&self, high: bool) {
            *self.0.lock() = high;
        }
    }

    fn device() -> (PowerManagement, Arc<Level>, Arc<Requests>) {
        let (level, requests) = (Arc::new(Level::default()), Requests::new());
        let device = PowerManagement::new(
            IrqLine::new(Arc::clone(&level) as _),
            Arc::clone(&requests) as Arc<dyn GuestRequestSink>,
        );
        (device, level, requests)
    }

    fn read16(device: &mut PowerManagement, at: u64) -> u16 {
        let mut data = [0; 2];
        assert_eq!(device.read(at, &mut data), Access::Done);
        u16::from_le_bytes(data)
    }

    #[test]
    fn the_power_button_interrupts_until_its_status_is_cleared() {
        let (mut device, level, _) = device();
        device.press_power_button();
        assert!(!*level.0.lock(), "not enabled");
        assert_eq!(device.write(2, &POWER_BUTTON.to_le_bytes()), Access::Done);
        assert!(*level.0.lock());
        assert_eq!(read16(&mut device, 0), POWER_BUTTON);
        assert_eq!(device.write(0, &POWER_BUTTON.to_le_bytes()), Access::Done);
        assert!(!*level.0.lock());
        assert_eq!(read16(&mut device, 0), 0);
    }

    #[test]
    fn a_general_purpose_event_interrupts_while_it_is_enabled() {
        let (mut device, level, _) = device();
        device.raise_event(1);
        assert!(!*level.0.lock(), "not enabled");
        assert_eq!(device.write(GPE0_ENABLE as u64, &[1 << 1]), Access::Done);
        assert!(*level.0.lock());
        assert_eq!(device.write(GPE0_STATUS as u64, &[0xFF]), Access::Done);
        assert!(!*level.0.lock());
        device.raise_event(63);
        assert_eq!(read16(&mut device, GPE0_STATUS as u64 + 6), 0x8000);
    }

    #[test]
    fn soft_off_powers_off_and_other_sleep_types_do_not() {
        let (mut device, _, requests) = device();
        for (value, off) in [
            (5 << 10, false),
            (1 << 13, false),
            (1 << 10 | 1 << 13, false),
            (5 << 10 | 1 << 13, true),
        ] {
            assert_eq!(device.write(4, &u16::to_le_bytes(value)), Access::Done);
            assert_eq!(requests.take().contains(&GuestRequest::PowerOff), off, "{value:#x}");
        }
        // ACPI mode is on and SLP_EN reads as zero.
        assert_eq!(read16(&mut device, 4) & (SCI_ENABLE | SLEEP_ENABLE), SCI_ENABLE);
    }

    #[test]
    fn the_timer_runs_at_its_frequency_and_wraps() {
        let (device, ..) = device();
        assert_eq!(device.timer(Duration::from_secs(1)), 3_579_545);
        assert_eq!(device.timer(Duration::from_secs(1200)), (3_579_545u64 * 1200) as u32);
    }

    #[test]
    fn accesses_of_any_size_stay_inside_the_block() {
        let (mut device, ..) = device();
        assert_eq!(device.read(0x7D, &mut [0; 4]), Access::Unclaimed);
        assert_eq!(device.write(0x7D, &[0xFF; 4]), Access::Done);
        assert_eq!(device.read(u64::MAX, &mut [0; 4]), Access::Unclaimed);
    }
}
