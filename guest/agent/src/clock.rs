// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! How long the kernel and this process have been running, and what time it is.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime, clock_settime};

/// Time since the kernel started its clock, suspended time included. `/proc/uptime` has the same, but in hundredths.
pub fn since_boot() -> Duration {
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from)
}

/// CPU time that this process has used, in all of its threads.
pub fn own_work() -> Duration {
    clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

/// Set the time of day.
pub fn set(seconds: i64, microseconds: i64) -> Result<()> {
    if !(0..1_000_000).contains(&microseconds) {
        bail!("{microseconds} is no number of microseconds within a second");
    }
    let time = TimeSpec::new(seconds, microseconds * 1000);
    clock_settime(ClockId::CLOCK_REALTIME, time)
        .with_context(|| format!("set the time to {seconds}.{microseconds:06}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_that_are_none() {
        assert!(set(0, -1).is_err());
        assert!(set(0, 1_000_000).is_err());
        assert!(set(-1, 0).is_err());
        assert!(set(i64::MAX, 0).is_err());
    }

    #[test]
    fn work_takes_time() {
        assert!(since_boot() > Duration::ZERO);
        assert!(own_work() > Duration::ZERO);
    }
}
