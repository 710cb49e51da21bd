// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! PL031 real-time clock (Arm DDI 0224C). The registers are `vm-superio`'s; here they meet our bus. Left out: the alarm.
//!
//! The clock runs from the start, and to start one that runs changes nothing. `vm-superio` would go back to the host's
//! time, and Linux starts it at every probe.

use vm_superio::Rtc;
use vm_superio::rtc_pl031::NoEvents;

use super::{read_register, write_register};
use crate::bus::{Access, IoDevice};

/// Control register, which starts the clock.
const CR: u64 = 0x0C;

/// A clock that begins with the host's time.
pub struct Pl031(Rtc<NoEvents>);

impl std::fmt::Debug for Pl031 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Pl031")
    }
}

impl Default for Pl031 {
    fn default() -> Self {
        Self(Rtc::new())
    }
}

impl Pl031 {
    /// Back to the state after power-on.
    pub fn reset(&mut self) {
        *self = Self::default();
    }
}

impl IoDevice for Pl031 {
    fn read(&mut self, offset: u64, data: &mut [u8]) -> Access {
        read_register(offset, data, |offset| {
            let mut value = [0; 4];
            if let Ok(offset) = offset.try_into() {
                self.0.read(offset, &mut value);
            }
            u32::from_le_bytes(value)
        })
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Access {
        write_register(offset, data, |offset, value| {
            if offset != CR
                && let Ok(offset) = offset.try_into()
            {
                self.0.write(offset, &value.to_le_bytes());
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::{SystemTime, UNIX_EPOCH};

    use super::super::testing::{accept_anything, identity, read, write};
    use super::*;

    const DR: u64 = 0x00;
    const LR: u64 = 0x08;

    #[test]
    fn linux_knows_it() {
        let mut clock = Pl031::default();
        let (primecell, peripheral) = identity(&mut clock);
        assert_eq!(primecell, 0xB105_F00D);
        // The identity and mask of drivers/rtc/rtc-pl031.c.
        assert_eq!(peripheral & 0x000F_FFFF, 0x0004_1031);
        accept_anything(&mut clock);
    }

    #[test]
    fn it_shows_the_time_and_can_be_set() {
        let mut clock = Pl031::default();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() as u32;
        assert!(read(&mut clock, DR).wrapping_sub(now) < 60);
        write(&mut clock, LR, 1000);
        assert!((1000..1060).contains(&read(&mut clock, DR)));
        write(&mut clock, CR, 1);
        assert!((1000..1060).contains(&read(&mut clock, DR)), "still set");
        clock.reset();
        assert!(read(&mut clock, DR) >= now);
    }
}
