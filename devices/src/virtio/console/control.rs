// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Control messages of a multiport console, section 5.3.6.2, and what is still to be said about a port.

use serde::{Deserialize, Serialize};

/// Size of [`Control`] on the wire.
pub const CONTROL_SIZE: usize = 8;

/// Driver to device: the driver is ready (`value` 1), or failed to start.
pub const DEVICE_READY: u16 = 0;
/// Device to driver: there is a port.
pub const PORT_ADD: u16 = 1;
/// Driver to device: the driver has set the port up (`value` 1), or failed to.
pub const PORT_READY: u16 = 3;
/// Device to driver: the port is a console.
pub const CONSOLE_PORT: u16 = 4;
/// Either way: the sender's side of the port is open (`value` 1) or closed.
pub const PORT_OPEN: u16 = 6;
/// Device to driver: the port's name follows, without a terminator.
pub const PORT_NAME: u16 = 7;

/// `struct virtio_console_control`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Control {
    /// Number of the port.
    pub id: u32,
    /// What it is about.
    pub event: u16,
    /// Depends on the event.
    pub value: u16,
}

impl Control {
    /// Read the little-endian wire form.
    pub fn from_bytes(bytes: [u8; CONTROL_SIZE]) -> Self {
        let [i0, i1, i2, i3, e0, e1, v0, v1] = bytes;
        Self {
            id: u32::from_le_bytes([i0, i1, i2, i3]),
            event: u16::from_le_bytes([e0, e1]),
            value: u16::from_le_bytes([v0, v1]),
        }
    }

    /// The little-endian wire form.
    pub fn to_bytes(self) -> [u8; CONTROL_SIZE] {
        let ([i0, i1, i2, i3], [e0, e1], [v0, v1]) =
            (self.id.to_le_bytes(), self.event.to_le_bytes(), self.value.to_le_bytes());
        [i0, i1, i2, i3, e0, e1, v0, v1]
    }
}

/// What the driver has yet to be told about a port. It takes the place of a queue of messages, so a
/// driver that asks again and again without reading costs nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outbox {
    /// [`PORT_ADD`].
    pub add: bool,
    /// [`CONSOLE_PORT`].
    pub console: bool,
    /// [`PORT_NAME`].
    pub name: bool,
    /// [`PORT_OPEN`], with what is the case when it is sent.
    pub open: bool,
}

impl Outbox {
    /// Take the next event to be sent: what a port is comes before whether it is open.
    pub fn take(&mut self) -> Option<u16> {
        [
            (&mut self.add, PORT_ADD),
            (&mut self.console, CONSOLE_PORT),
            (&mut self.name, PORT_NAME),
            (&mut self.open, PORT_OPEN),
        ]
        .into_iter()
        .find_map(|(due, event)| std::mem::take(due).then_some(event))
    }

    /// Whether there is nothing to say.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}
