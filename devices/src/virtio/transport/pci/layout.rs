// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Where the structures of a virtio PCI function lie, and the capabilities that say so (VIRTIO 1.2,
//! section 4.1.4).

use crate::pci::cap::{self, Capability};

/// MSI-X has this BAR to itself.
pub(super) const MSIX_BAR: u8 = 1;
/// All virtio structures.
pub(super) const VIRTIO_BAR: u8 = 4;
pub(super) const VIRTIO_BAR_SIZE: u64 = 0x4000;
/// Distance between the notification addresses of two queues.
const NOTIFY_MULTIPLIER: u32 = 4;

/// A structure in [`VIRTIO_BAR`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Structure {
    Common,
    Isr,
    Device,
    Notify,
}

/// Each structure has a page.
const PAGE: u64 = 0x1000;
const STRUCTURES: [Structure; 4] =
    [Structure::Common, Structure::Isr, Structure::Device, Structure::Notify];

/// The structure at `offset` of the BAR, and the offset into it.
pub(super) fn find(offset: u64) -> Option<(Structure, u64)> {
    let structure = STRUCTURES.get(usize::try_from(offset / PAGE).ok()?)?;
    Some((*structure, offset % PAGE))
}

/// Where in the BAR the driver makes buffers of queue `index` known.
pub(super) fn notify_offset(index: u16) -> u64 {
    Structure::Notify.offset() + u64::from(index) * u64::from(NOTIFY_MULTIPLIER)
}

/// The queue whose notification address is at `offset` of its structure.
pub(super) fn notify_queue(offset: u64) -> Option<u16> {
    u16::try_from(offset / u64::from(NOTIFY_MULTIPLIER)).ok()
}

/// Most queues that have a notification address.
pub(super) const MAX_QUEUES: usize = (PAGE / NOTIFY_MULTIPLIER as u64) as usize;

impl Structure {
    /// `cfg_type` of its capability.
    const fn config_type(self) -> u8 {
        match self {
            Self::Common => 1,
            Self::Notify => 2,
            Self::Isr => 3,
            Self::Device => 4,
        }
    }

    const fn offset(self) -> u64 {
        PAGE * match self {
            Self::Common => 0,
            Self::Isr => 1,
            Self::Device => 2,
            Self::Notify => 3,
        }
    }
}

/// The capabilities that lead to the structures.
pub(super) fn capabilities() -> [Capability; 4] {
    STRUCTURES.map(|structure| {
        let (extra, multiplier) = match structure {
            Structure::Notify => (4, NOTIFY_MULTIPLIER.to_le_bytes()),
            _ => (0, [0; 4]),
        };
        let (offset, length) = (structure.offset() as u32, PAGE as u32);
        let body = body(structure.config_type(), VIRTIO_BAR, offset, length, &multiplier[..extra]);
        Capability::new(cap::id::VENDOR, body)
    })
}

/// Registers of the capability that reaches BARs through configuration space, section 4.1.4.9.
pub(super) mod window {
    /// Which BAR.
    pub(in super::super) const BAR: u16 = 4;
    /// Where in the BAR.
    pub(in super::super) const OFFSET: u16 = 8;
    /// How many bytes.
    pub(in super::super) const LENGTH: u16 = 12;
    /// What is read or written there.
    pub(in super::super) const DATA: u16 = 16;
}

/// The capability that reaches BARs through configuration space.
pub(super) fn window_capability() -> Capability {
    const CONFIG_TYPE: u8 = 5;
    Capability::new(cap::id::VENDOR, body(CONFIG_TYPE, 0, 0, 0, &[0; 4]))
        .writable(window::BAR.into(), &[0xff])
        .writable(window::OFFSET.into(), &[0xff; 12])
}

/// `struct virtio_pci_cap` behind its two bytes of PCI header.
fn body(config_type: u8, bar: u8, offset: u32, length: u32, extra: &[u8]) -> Vec<u8> {
    const HEADER: u8 = 16;
    let len = HEADER + extra.len() as u8;
    let mut body = vec![len, config_type, bar, 0, 0, 0];
    body.extend(offset.to_le_bytes());
    body.extend(length.to_le_bytes());
    body.extend(extra);
    body
}
