// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What the guest sees of a socket device, whoever carries its packets: section 5.10.

use serde::{Deserialize, Serialize};

use crate::memory::GuestMemory;
use crate::virtio::queue::{Chain, DeviceQueue, RingError};

/// Device type, section 5.10.1.
pub const DEVICE_TYPE: u32 = 19;

/// Queue of packets for the guest, section 5.10.2.
pub const RX: u16 = 0;
/// Queue of packets from the guest.
pub const TX: u16 = 1;
/// Queue of events for the guest.
pub const EVENT: u16 = 2;

/// Largest sizes of the queues.
pub const QUEUE_SIZES: [u16; 3] = [128; 3];

/// `virtio_vsock_event.id`: connections were lost, and the context id may have changed.
pub const EVENT_TRANSPORT_RESET: u32 = 0;

/// State that outlives the driver's queues. Connections do not.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockState {
    /// The device was active before, so the guest may believe in connections.
    pub was_active: bool,
}

/// Tell the driver, on the queue of events, that connections were lost. A driver that has given no
/// buffer for it has only just started, and has none.
///
/// # Errors
/// The ring is broken.
pub fn tell_transport_reset(
    events: &mut DeviceQueue,
    memory: &GuestMemory,
) -> Result<(), RingError> {
    let mut chain = Chain::default();
    if events.pop(memory, &mut chain)? {
        let event = EVENT_TRANSPORT_RESET.to_le_bytes();
        let written = chain.writable().write(memory, &event)?;
        events.add_used(memory, chain.head(), written)?;
        events.notify(memory)?;
    }
    Ok(())
}

/// A context id that a guest can have.
///
/// 0 to 2 have meanings of their own, and all ones stands for any; the upper half is reserved.
pub fn is_guest_cid(cid: u64) -> bool {
    (3..u64::from(u32::MAX)).contains(&cid)
}

/// Read the device configuration: the guest's context id.
pub fn config_read(cid: u64, offset: u64, data: &mut [u8]) {
    let config = cid.to_le_bytes();
    let rest = usize::try_from(offset).ok().and_then(|offset| config.get(offset..)).unwrap_or(&[]);
    data.fill(0);
    for (to, from) in data.iter_mut().zip(rest) {
        *to = *from;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configuration_is_the_cid_and_zeros_beyond() {
        let mut data = [0xff; 6];
        config_read(0x0807_0605_0403_0201, 4, &mut data);
        assert_eq!(data, [5, 6, 7, 8, 0, 0]);
        config_read(1, u64::MAX, &mut data);
        assert_eq!(data, [0; 6]);
    }

    #[test]
    fn guests_have_ids_from_three() {
        for (cid, good) in [(0, false), (2, false), (3, true), (0xffff_fffe, true)] {
            assert_eq!(is_guest_cid(cid), good, "{cid}");
        }
        assert!(!is_guest_cid(0xffff_ffff) && !is_guest_cid(1 << 32 | 3));
    }
}
