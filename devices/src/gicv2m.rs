// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! GICv2m frame (Arm Base System Architecture, DEN0094, appendix on GICv2m): what a driver reads to learn which
//! interrupts it may hand out to messages. The messages themselves go to the hypervisor; what a processor writes here has
//! no effect.

use crate::bus::{Access, IoDevice};

/// `MSI_TYPER`: first interrupt in bits 25 to 16, how many in bits 9 to 0.
const TYPE: u64 = 0x008;
/// Ten bits each.
const FIELD: u32 = 0x3FF;

/// The frame.
#[derive(Debug)]
pub struct GicV2m {
    first: u32,
    count: u32,
}

impl GicV2m {
    /// A frame that hands out `count` interrupts, from INTID `first` on.
    pub fn new(first: u32, count: u32) -> Self {
        Self { first, count }
    }
}

impl IoDevice for GicV2m {
    fn read(&mut self, offset: u64, data: &mut [u8]) -> Access {
        let Ok(data) = <&mut [u8; 4]>::try_from(data) else { return Access::Unclaimed };
        let value = match offset {
            TYPE => (self.first & FIELD) << 16 | self.count & FIELD,
            _ => 0,
        };
        *data = value.to_le_bytes();
        Access::Done
    }

    fn write(&mut self, _offset: u64, _data: &[u8]) -> Access {
        Access::Done
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_says_which_interrupts_it_hands_out() {
        let mut frame = GicV2m::new(80, 64);
        let mut data = [0; 4];
        assert_eq!(frame.read(TYPE, &mut data), Access::Done);
        assert_eq!(u32::from_le_bytes(data), 80 << 16 | 64);
        assert_eq!(frame.read(TYPE, &mut data[..1]), Access::Unclaimed);
        assert_eq!(frame.write(0x40, &data), Access::Done);
    }
}
