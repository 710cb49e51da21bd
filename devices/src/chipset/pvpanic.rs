// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! pvpanic: a guest kernel says that it has panicked (QEMU `docs/specs/pvpanic.rst`).

use std::sync::Arc;

use super::{GuestRequest, GuestRequestSink};
use crate::bus::{Access, IoDevice};

const PANICKED: u8 = 1;
const CRASH_LOADED: u8 = 1 << 1;

/// One port: reads say which events are understood, writes report them.
pub struct Pvpanic {
    requests: Arc<dyn GuestRequestSink>,
}

impl std::fmt::Debug for Pvpanic {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Pvpanic")
    }
}

impl Pvpanic {
    /// A device that tells `requests`.
    pub fn new(requests: Arc<dyn GuestRequestSink>) -> Self {
        Self { requests }
    }
}

impl IoDevice for Pvpanic {
    fn read(&mut self, _offset: u64, data: &mut [u8]) -> Access {
        data.fill(PANICKED | CRASH_LOADED);
        Access::Done
    }

    fn write(&mut self, _offset: u64, data: &[u8]) -> Access {
        let events = data.first().copied().unwrap_or(0);
        if events & PANICKED != 0 {
            self.requests.request(GuestRequest::Panicked);
        } else if events & CRASH_LOADED != 0 {
            self.requests.request(GuestRequest::CrashLoaded);
        }
        Access::Done
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chipset::testing::Requests;

    #[test]
    fn both_events_are_offered_and_reported() {
        let requests = Requests::new();
        let mut device = Pvpanic::new(Arc::clone(&requests) as _);
        let mut offered = [0];
        assert_eq!(device.read(0, &mut offered), Access::Done);
        assert_eq!(offered, [3]);
        for (written, reported) in
            [(0, vec![]), (1, vec![GuestRequest::Panicked]), (2, vec![GuestRequest::CrashLoaded])]
        {
            assert_eq!(device.write(0, &[written]), Access::Done);
            assert_eq!(requests.take(), reported);
        }
    }
}
