// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Arm PrimeCell peripherals, as QEMU's `virt` has them.

mod pl011;
mod pl031;
mod pl061;

pub use pl011::Pl011;
pub use pl031::Pl031;
pub use pl061::Pl061;

use crate::bus::Access;

/// Peripheral and PrimeCell identification: eight registers of one byte each, from here on.
const IDENTIFICATION: u64 = 0xFE0;
/// The PrimeCell's half.
const PRIMECELL_ID: [u8; 4] = [0x0D, 0xF0, 0x05, 0xB1];

/// Identification registers of part `part` of Arm Ltd., revision `revision`, by their address.
fn identification(offset: u64, part: u16, revision: u8) -> Option<u32> {
    let part = part.to_le_bytes();
    // Designer 0x41 stands across the second and the third.
    let peripheral = [part[0], 0x10 | part[1], revision << 4 | 0x04, 0];
    let index = usize::try_from(offset.checked_sub(IDENTIFICATION)? / 4).ok()?;
    peripheral.iter().chain(&PRIMECELL_ID).nth(index).map(|&byte| byte.into())
}

/// Registers are 32 bits wide; drivers read and write their low bytes, too. Calls `register` with the offset of one.
fn read_register(offset: u64, data: &mut [u8], register: impl FnOnce(u64) -> u32) -> Access {
    if !matches!(data.len(), 1 | 2 | 4) || !offset.is_multiple_of(4) {
        return Access::Unclaimed;
    }
    let value = register(offset).to_le_bytes();
    data.copy_from_slice(&value[..data.len()]);
    Access::Done
}

/// The same for a write; what is not written is zero.
fn write_register(offset: u64, data: &[u8], register: impl FnOnce(u64, u32)) -> Access {
    if !matches!(data.len(), 1 | 2 | 4) || !offset.is_multiple_of(4) {
        return Access::Unclaimed;
    }
    let mut value = [0; 4];
    value[..data.len()].copy_from_slice(data);
    register(offset, u32::from_le_bytes(value));
    Access::Done
}

#[cfg(test)]
mod testing {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use crate::bus::{Access, IoDevice};
    use crate::irq::{IrqLine, IrqSink};

    /// A line that remembers its level.
    #[derive(Default)]
    pub(super) struct Level(AtomicBool);

    impl IrqSink for Level {
        fn set_level(&self, high: bool) {
            self.0.store(high, Ordering::Relaxed);
        }
    }

    impl Level {
        pub(super) fn new() -> (Arc<Self>, IrqLine) {
            let level = Arc::new(Self::default());
            (Arc::clone(&level), IrqLine::new(level))
        }

        pub(super) fn is_high(&self) -> bool {
            self.0.load(Ordering::Relaxed)
        }
    }

    pub(super) fn read(device: &mut dyn IoDevice, offset: u64) -> u32 {
        let mut data = [0; 4];
        assert_eq!(device.read(offset, &mut data), Access::Done);
        u32::from_le_bytes(data)
    }

    pub(super) fn write(device: &mut dyn IoDevice, offset: u64, value: u32) {
        assert_eq!(device.write(offset, &value.to_le_bytes()), Access::Done);
    }

    /// What the AMBA bus of Linux puts together: CID and PID.
    pub(super) fn identity(device: &mut dyn IoDevice) -> (u32, u32) {
        let mut four =
            |from: u64| (0..4).fold(0, |id, n| id | read(device, from + n * 4) << (8 * n));
        (four(0xFF0), four(0xFE0))
    }

    /// Accesses that no driver makes have no effect, and do no harm.
    pub(super) fn accept_anything(device: &mut dyn IoDevice) {
        for offset in (0..0x1000).chain([u64::MAX, 1 << 40]) {
            for len in [1, 2, 3, 4, 8, 16] {
                let _ = device.read(offset, &mut vec![0; len]);
                let _ = device.write(offset, &vec![0xFF; len]);
            }
        }
    }
}
