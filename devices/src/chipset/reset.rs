// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Reset control register (ICH9 datasheet, section 13.7.5).

use std::sync::Arc;

use super::{GuestRequest, GuestRequestSink};
use crate::bus::{Access, IoDevice};

const SYSTEM_RESET: u8 = 1 << 1;
const RESET_CPU: u8 = 1 << 2;

/// One port; a reset happens when [`ResetControl::VALUE`] is written.
pub struct ResetControl {
    requests: Arc<dyn GuestRequestSink>,
    value: u8,
}

impl std::fmt::Debug for ResetControl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ResetControl").field("value", &self.value).finish_non_exhaustive()
    }
}

impl ResetControl {
    /// What ACPI tells a guest to write.
    pub const VALUE: u8 = SYSTEM_RESET | RESET_CPU;

    /// A register whose reset leads to `requests`.
    pub fn new(requests: Arc<dyn GuestRequestSink>) -> Self {
        Self { requests, value: 0 }
    }
}

impl IoDevice for ResetControl {
    fn read(&mut self, _offset: u64, data: &mut [u8]) -> Access {
        data.fill(self.value);
        Access::Done
    }

    fn write(&mut self, _offset: u64, data: &[u8]) -> Access {
        let [value] = *data else { return Access::Unclaimed };
        self.value = value & SYSTEM_RESET;
        if value & RESET_CPU != 0 {
            self.requests.request(GuestRequest::Reset);
        }
        Access::Done
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chipset::testing::Requests;

    #[test]
    fn the_cpu_bit_resets_and_the_system_bit_is_kept() {
        let requests = Requests::new();
        let mut device = ResetControl::new(Arc::clone(&requests) as _);
        assert_eq!(device.write(0, &[SYSTEM_RESET]), Access::Done);
        assert!(requests.take().is_empty());
        let mut value = [0];
        assert_eq!(device.read(0, &mut value), Access::Done);
        assert_eq!(value, [SYSTEM_RESET]);
        assert_eq!(device.write(0, &[ResetControl::VALUE]), Access::Done);
        assert_eq!(requests.take(), [GuestRequest::Reset]);
    }
}
