// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Capabilities in configuration space (PCI Local Bus Specification 3.0, section 6.7).

/// Capability identifiers, appendix H.
pub mod id {
    /// Vendor specific; virtio uses it.
    pub const VENDOR: u8 = 0x09;
    /// MSI-X.
    pub const MSIX: u8 = 0x11;
}

/// A capability before it has a place in configuration space.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Capability {
    pub(super) id: u8,
    /// What follows the identifier and the pointer to the next capability.
    pub(super) body: Vec<u8>,
    /// For each byte of `body`, the bits that the guest can write.
    pub(super) writable: Vec<u8>,
}

impl Capability {
    /// A capability that the guest can only read. `body` is what follows the two bytes of identifier and
    /// next pointer.
    pub fn new(id: u8, body: impl Into<Vec<u8>>) -> Self {
        let body = body.into();
        let writable = vec![0; body.len()];
        Self { id, body, writable }
    }

    /// Let the guest write the bits of `mask` from byte `offset` of the capability on, counted from its
    /// identifier as the specifications do.
    ///
    /// # Panics
    /// The mask reaches outside of the body: a mistake in the device model.
    #[must_use]
    pub fn writable(mut self, offset: usize, mask: &[u8]) -> Self {
        let start = offset - HEADER_LEN;
        self.writable[start..start + mask.len()].copy_from_slice(mask);
        self
    }

    /// Length with its header.
    pub(super) fn len(&self) -> usize {
        HEADER_LEN + self.body.len()
    }
}

/// Identifier and next pointer.
pub(super) const HEADER_LEN: usize = 2;
