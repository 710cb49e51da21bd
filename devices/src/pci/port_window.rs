// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! I/O ports in memory, for processors that have no others.

use std::sync::Arc;

use crate::bus::{Access, Bus, IoDevice};

/// A window onto ports, from port 0 on.
#[derive(Debug)]
pub struct PortWindow(Arc<Bus>);

impl PortWindow {
    /// A window onto `ports`.
    pub fn new(ports: Arc<Bus>) -> Self {
        Self(ports)
    }
}

impl IoDevice for PortWindow {
    fn read(&mut self, offset: u64, data: &mut [u8]) -> Access {
        self.0.read(offset, data)
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Access {
        self.0.write(offset, data)
    }
}
