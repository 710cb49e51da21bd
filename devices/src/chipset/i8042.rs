// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! i8042 keyboard controller, of which only the reset line is there: a guest that resets through it
//! (Linux `reboot=k`) gets its reset. There is no keyboard and no mouse; FADT says so.

use std::sync::Arc;

use super::{GuestRequest, GuestRequestSink};
use crate::bus::{Access, IoDevice};

/// Pulse output port: bit 0 of the output port is the processor's reset, active low.
const PULSE_RESET: u8 = 0xFE;

/// The command port. Its status always says: nothing to read, ready for a command.
pub struct I8042 {
    requests: Arc<dyn GuestRequestSink>,
}

impl std::fmt::Debug for I8042 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("I8042")
    }
}

impl I8042 {
    /// A controller whose reset line leads to `requests`.
    pub fn new(requests: Arc<dyn GuestRequestSink>) -> Self {
        Self { requests }
    }
}

impl IoDevice for I8042 {
    fn read(&mut self, _offset: u64, data: &mut [u8]) -> Access {
        data.fill(0);
        Access::Done
    }

    fn write(&mut self, _offset: u64, data: &[u8]) -> Access {
        if data == [PULSE_RESET] {
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
    fn only_the_reset_pulse_does_anything() {
        let requests = Requests::new();
        let mut device = I8042::new(Arc::clone(&requests) as _);
        assert_eq!(device.write(0, &[0xAD]), Access::Done);
        assert!(requests.take().is_empty());
        assert_eq!(device.write(0, &[0xFE]), Access::Done);
        assert_eq!(requests.take(), [GuestRequest::Reset]);
    }
}
