// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Real-time clock and CMOS memory: Motorola MC146818A, as in ICH9 (datasheet, section 13.6).
//!
//! Time is the host's, in UTC, BCD and 24-hour mode; the guest cannot set it. No alarm, no periodic
//! interrupt, no square wave. An update is never in progress, so a guest need not wait for its end.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::bus::{Access, IoDevice};

const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
const DAY_OF_WEEK: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const STATUS_A: u8 = 0x0A;
const STATUS_B: u8 = 0x0B;
const STATUS_C: u8 = 0x0C;
const STATUS_D: u8 = 0x0D;
const CENTURY: u8 = 0x32;
/// Memory between 16 MiB and 4 GiB in units of 64 KiB, and above 4 GiB likewise: read by firmware.
const MEMORY_ABOVE_16_MIB: u8 = 0x34;
const MEMORY_ABOVE_4_GIB: u8 = 0x5B;

/// 32.768 kHz time base, 1024 Hz rate.
const STATUS_A_VALUE: u8 = 0x26;
/// 24-hour mode, BCD.
const STATUS_B_VALUE: u8 = 0x02;
/// Memory and time are valid.
const STATUS_D_VALUE: u8 = 0x80;
const INDEX_MASK: u8 = 0x7F;

/// The clock and its memory. Two ports: index and data.
#[derive(Debug)]
pub struct Cmos {
    clock: fn() -> SystemTime,
    state: State,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct State {
    index: u8,
    memory: Vec<u8>,
}

impl Cmos {
    /// Tell firmware of RAM that ends at `low_end` below 4 GiB and of `high` bytes above.
    pub fn new(low_end: u64, high: u64) -> Self {
        let mut memory = vec![0; usize::from(INDEX_MASK) + 1];
        let above_16_mib = low_end.saturating_sub(16 << 20) >> 16;
        let put = |memory: &mut Vec<u8>, at: u8, value: u64, bytes: usize| {
            let at = usize::from(at);
            memory[at..at + bytes].copy_from_slice(&value.to_le_bytes()[..bytes]);
        };
        put(&mut memory, MEMORY_ABOVE_16_MIB, above_16_mib.min(0xFFFF), 2);
        put(&mut memory, MEMORY_ABOVE_4_GIB, (high >> 16).min(0xFF_FFFF), 3);
        Self { clock: SystemTime::now, state: State { index: 0, memory } }
    }

    fn register(&self) -> u8 {
        let now = || DateTime::from((self.clock)());
        match self.state.index {
            SECONDS => bcd(now().second),
            MINUTES => bcd(now().minute),
            HOURS => bcd(now().hour),
            DAY_OF_WEEK => bcd(now().day_of_week),
            DAY => bcd(now().day),
            MONTH => bcd(now().month),
            YEAR => bcd(now().year % 100),
            CENTURY => bcd(now().year / 100),
            STATUS_A => STATUS_A_VALUE,
            STATUS_B => STATUS_B_VALUE,
            STATUS_C => 0,
            STATUS_D => STATUS_D_VALUE,
            index => self.state.memory[usize::from(index & INDEX_MASK)],
        }
    }
}

impl IoDevice for Cmos {
    fn read(&mut self, offset: u64, data: &mut [u8]) -> Access {
        match data {
            [byte] => *byte = if offset == 0 { self.state.index } else { self.register() },
            _ => return Access::Unclaimed,
        }
        Access::Done
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Access {
        match (offset, data) {
            (0, [index]) => self.state.index = index & INDEX_MASK,
            (_, [value]) => match self.state.index {
                SECONDS..=STATUS_D | CENTURY => {}
                index => self.state.memory[usize::from(index & INDEX_MASK)] = *value,
            },
            _ => return Access::Unclaimed,
        }
        Access::Done
    }
}

fn bcd(value: u64) -> u8 {
    (value / 10 % 10 * 16 + value % 10) as u8
}

/// A date of the proleptic Gregorian calendar, UTC.
struct DateTime {
    year: u64,
    month: u64,
    day: u64,
    /// 1 is Sunday.
    day_of_week: u64,
    hour: u64,
    minute: u64,
    second: u64,
}

impl From<SystemTime> for DateTime {
    fn from(time: SystemTime) -> Self {
        let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let days = seconds / 86_400;
        // Count from 1 March of year 0, so that leap days come last in a year. 146097 days are 400 years.
        let shifted = days + 719_468;
        let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
        let year_of_era =
            (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let march_month = (5 * day_of_year + 2) / 153;
        let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
        Self {
            year: era * 400 + year_of_era + u64::from(month <= 2),
            month,
            day: day_of_year - (153 * march_month + 2) / 5 + 1,
            day_of_week: (days + 4) % 7 + 1,
            hour: seconds / 3_600 % 24,
            minute: seconds / 60 % 60,
            second: seconds % 60,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn read(cmos: &mut Cmos, index: u8) -> u8 {
        assert_eq!(cmos.write(0, &[index]), Access::Done);
        let mut data = [0];
        assert_eq!(cmos.read(1, &mut data), Access::Done);
        data[0]
    }

    #[test]
    fn time_is_utc_in_bcd() {
        let mut cmos = Cmos::new(0, 0);
        // 2024-02-29 23:59:58, a Thursday.
        cmos.clock = || UNIX_EPOCH + Duration::from_secs(1_709_251_198);
        let all = [CENTURY, YEAR, MONTH, DAY, DAY_OF_WEEK, HOURS, MINUTES, SECONDS];
        let read = all.map(|index| read(&mut cmos, index));
        assert_eq!(read, [0x20, 0x24, 0x02, 0x29, 0x05, 0x23, 0x59, 0x58]);
        cmos.clock = || UNIX_EPOCH;
        assert_eq!(
            [YEAR, MONTH, DAY, DAY_OF_WEEK].map(|i| super::tests::read(&mut cmos, i)),
            [0x70, 1, 1, 5]
        );
    }

    #[test]
    fn an_update_is_never_in_progress() {
        assert_eq!(read(&mut Cmos::new(0, 0), STATUS_A) & 0x80, 0);
    }

    #[test]
    fn firmware_reads_the_size_of_memory() {
        let mut cmos = Cmos::new(2 << 30, 4 << 30);
        let bytes = [0x34, 0x35, 0x5B, 0x5C, 0x5D].map(|index| read(&mut cmos, index));
        assert_eq!(u16::from_le_bytes([bytes[0], bytes[1]]), 0x7F00);
        assert_eq!(bytes[2..], [0, 0, 1]);
    }

    #[test]
    fn memory_is_kept_and_the_clock_is_not_set() {
        let mut cmos = Cmos::new(0, 0);
        for (index, kept) in [(0x40, true), (STATUS_D, false)] {
            assert_eq!(cmos.write(0, &[index]), Access::Done);
            assert_eq!(cmos.write(1, &[0x5A]), Access::Done);
            assert_eq!(read(&mut cmos, index) == 0x5A, kept);
        }
        assert_eq!(cmos.write(1, &[1, 2]), Access::Unclaimed);
    }
}
