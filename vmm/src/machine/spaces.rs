// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The machine's two address spaces, as a vCPU reaches them.

use ecr_devices::bus::{Access, Bus};

use crate::hypervisor::IoHandler;
use std::sync::Arc;

/// Memory and I/O ports.
#[derive(Debug, Default)]
pub(crate) struct AddressSpaces {
    pub(crate) memory: Arc<Bus>,
    pub(crate) ports: Arc<Bus>,
}

impl IoHandler for AddressSpaces {
    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        if self.memory.read(address, data) == Access::Unclaimed {
            log::trace!("guest read of unclaimed memory at {address:#x}");
        }
    }

    fn mmio_write(&self, address: u64, data: &[u8]) {
        if self.memory.write(address, data) == Access::Unclaimed {
            log::trace!("guest write to unclaimed memory at {address:#x}");
        }
    }

    fn pio_read(&self, port: u16, data: &mut [u8]) {
        if self.ports.read(port.into(), data) == Access::Unclaimed {
            log::trace!("guest read of unclaimed port {port:#x}");
        }
    }

    fn pio_write(&self, port: u16, data: &[u8]) {
        if self.ports.write(port.into(), data) == Access::Unclaimed {
            log::trace!("guest write to unclaimed port {port:#x}");
        }
    }
}
