// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! How long the kernel has been running.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

/// Time since the kernel started its clock, suspended time included. `/proc/uptime` has the same, but in hundredths.
pub fn since_boot() -> Duration {
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from)
}
