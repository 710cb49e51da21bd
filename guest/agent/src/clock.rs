// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! How long the kernel and this process have been running, and what time it is.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime, clock_settime};

/// A time of day that has been set is later than this one, of 2001.
const LONG_AGO: i64 = 1_000_000_000;
/// The hypervisor's clock, by the name that Linux gives it (`drivers/ptp/ptp_kvm_common.c`).
const HOST_CLOCK: &str = "KVM virtual PTP";

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

/// Ask the host for the time of day if no clock of the machine has told it, and Linux began in 1970. On aarch64 that is
/// so with ACPI, which has no name for the clock that QEMU's `virt` has.
pub fn set_from_host() -> Result<()> {
    let now = clock_gettime(ClockId::CLOCK_REALTIME).context("read the time")?;
    if now.tv_sec() > LONG_AGO {
        return Ok(());
    }
    let clocks = fs::read_dir("/sys/class/ptp").context("look for clocks of the host")?;
    let is_hosts = |directory: &fs::DirEntry| {
        fs::read_to_string(directory.path().join("clock_name"))
            .is_ok_and(|name| name.trim() == HOST_CLOCK)
    };
    let clock = clocks.flatten().find(is_hosts).with_context(|| format!("no {HOST_CLOCK}"))?;
    let device = format!("/dev/{}", clock.file_name().display());
    let file = File::open(&device).with_context(|| format!("open {device}"))?;
    let time =
        clock_gettime(of_descriptor(file.as_raw_fd())).with_context(|| format!("read {device}"))?;
    set(time.tv_sec(), time.tv_nsec() / 1000)
}

/// The clock behind an open descriptor: `FD_TO_CLOCKID` of Linux (`include/linux/posix-timers.h`).
const fn of_descriptor(descriptor: i32) -> ClockId {
    ClockId::from_raw(!descriptor << 3 | 3)
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
