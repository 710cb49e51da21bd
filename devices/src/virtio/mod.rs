// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Virtio devices, split from the transport that carries them.
//!
//! Virtual I/O Device (VIRTIO) Version 1.2. Only the modern interface; split virtqueues only.

pub mod blk;
pub mod console;
pub mod net;
pub mod queue;
pub mod rng;
pub mod transport;
pub mod vsock;

#[cfg(test)]
pub(crate) mod test_driver;
#[cfg(test)]
mod test_interrupt;

use std::fmt;
use std::sync::Arc;

use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use crate::memory::GuestMemoryHandle;

/// A virtio device without its transport.
///
/// The data path runs elsewhere: [`VirtioDevice::activate`] is given the queues by value, moves them to
/// the thread that will serve them, and [`VirtioDevice::deactivate`] brings them back. Nothing in the data
/// path takes a lock that a vCPU could hold.
pub trait VirtioDevice: Send {
    /// Device type, section 5.
    fn device_type(&self) -> u32;

    /// Largest size of each queue; its length is the number of queues.
    fn queue_max_sizes(&self) -> &[u16];

    /// Device features offered, without those of the transport and ring (bits 24..=40), which the
    /// transport adds.
    fn features(&self) -> u64;

    /// Features of transport and ring that whoever serves the queues can do; the transport offers no others.
    fn ring_features(&self) -> u64 {
        u64::MAX
    }

    /// Read device configuration; what lies outside of it reads as zero.
    fn config_read(&self, offset: u64, data: &mut [u8]);

    /// Write device configuration; what is not writable is ignored.
    fn config_write(&mut self, _offset: u64, _data: &[u8]) {}

    /// The driver has set DRIVER_OK: serve the queues.
    ///
    /// # Errors
    /// The device cannot work; the transport sets DEVICE_NEEDS_RESET.
    fn activate(&mut self, context: Activation) -> Result<(), ActivateError>;

    /// Stop serving, complete or drop what is in flight, and give the queues back, in their order, with
    /// their indices. Also the way to a consistent state for a snapshot. Does nothing when not active.
    fn deactivate(&mut self) -> Vec<ActiveQueue>;
}

/// What a device is given when its driver is ready.
#[derive(Debug)]
pub struct Activation {
    /// Guest memory.
    pub memory: GuestMemoryHandle,
    /// Features that driver and device agreed on.
    pub features: u64,
    /// The queues that the driver enabled, in order.
    pub queues: Vec<ActiveQueue>,
    /// How to interrupt the driver.
    pub interrupt: Arc<dyn VirtioInterrupt>,
}

/// A queue in use.
#[derive(Debug)]
pub struct ActiveQueue {
    /// Its number in the device.
    pub index: u16,
    /// Its rings.
    pub queue: Queue,
    /// The driver has made buffers available.
    pub kick: EventFd,
}

/// How a device interrupts its driver.
pub trait VirtioInterrupt: Send + Sync {
    /// Used buffers of queue `index`, section 2.3. The caller has asked the queue whether the driver
    /// wants to hear.
    fn queue(&self, index: u16);

    /// The device's configuration has changed.
    fn config(&self);

    /// The device met an error from which only a reset recovers: set DEVICE_NEEDS_RESET.
    fn needs_reset(&self);

    /// An eventfd that does what [`Self::queue`] does, for a data path outside this process.
    ///
    /// # Errors
    /// No interrupt route is left.
    fn queue_eventfd(&self, index: u16) -> std::io::Result<EventFd>;
}

impl fmt::Debug for dyn VirtioInterrupt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("VirtioInterrupt")
    }
}

/// Why a device could not start to serve its queues.
#[derive(Debug, thiserror::Error)]
#[error("{attempted}: {source}")]
pub struct ActivateError {
    /// What was attempted, with its value.
    pub attempted: String,
    /// Why it failed.
    pub source: std::io::Error,
}
