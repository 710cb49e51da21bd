// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! One driver's use of a device, from ACKNOWLEDGE to reset (VIRTIO 1.2, sections 2.1, 2.2 and 3.1):
//! status, feature negotiation, the set-up of queues and the moment when the device starts.
//!
//! Left out: resetting single queues, and all that legacy drivers need.

use std::fmt;
use std::io;
use std::sync::Arc;

use log::{Level, log};
use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryBackend};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::memory::{GuestMemory, GuestMemoryHandle};
use crate::virtio::{ActivateError, Activation, ActiveQueue, VirtioDevice, VirtioInterrupt};

/// Bits of the device status, section 2.1.
pub mod status {
    /// The guest has noticed the device.
    pub const ACKNOWLEDGE: u8 = 1;
    /// The guest knows how to drive it.
    pub const DRIVER: u8 = 1 << 1;
    /// The driver is ready.
    pub const DRIVER_OK: u8 = 1 << 2;
    /// Features are agreed on.
    pub const FEATURES_OK: u8 = 1 << 3;
    /// Only a reset helps.
    pub const NEEDS_RESET: u8 = 1 << 6;
    /// The driver has given up.
    pub const FAILED: u8 = 1 << 7;
}

/// Feature bits of transport and rings, section 6, that all our devices have.
pub mod feature {
    /// Descriptors may lie in tables of their own.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// Either side says after which buffer it wants to hear.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// Not a legacy device.
    pub const VERSION_1: u64 = 1 << 32;
    pub(super) const ALL: u64 = INDIRECT_DESC | EVENT_IDX | VERSION_1;
}

/// A device and the driver that uses it.
pub struct Session {
    // Configuration.
    offered: u64,
    // Wiring.
    device: Box<dyn VirtioDevice>,
    memory: GuestMemoryHandle,
    interrupt: Arc<dyn VirtioInterrupt>,
    kicks: Vec<(u16, Arc<EventFd>)>,
    reported: bool,
    // State.
    state: SessionState,
}

/// What the driver has set up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionState {
    status: u8,
    features: u64,
    queues: Vec<QueueSetup>,
}

/// A queue as the driver describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueSetup {
    /// Entries.
    pub size: u16,
    /// The description is complete.
    pub enabled: bool,
    /// Guest-physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest-physical address of the available ring, also called driver area.
    pub available: u64,
    /// Guest-physical address of the used ring, also called device area.
    pub used: u64,
}

/// What a write of the status has led to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Transition {
    /// Nothing but other status bits.
    None,
    /// The device serves its queues.
    Started,
    /// The device cannot serve its queues: it needs a reset.
    Failed,
    /// All is as at the beginning.
    Reset,
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session").field("state", &self.state).finish_non_exhaustive()
    }
}

impl Session {
    /// A device that no driver has found yet.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: GuestMemoryHandle,
        interrupt: Arc<dyn VirtioInterrupt>,
    ) -> Self {
        let offered = device.features() | feature::ALL & device.ring_features();
        let state = SessionState::new(device.as_ref());
        Self { offered, device, memory, interrupt, kicks: Vec::new(), reported: false, state }
    }

    /// The device.
    pub fn device(&self) -> &dyn VirtioDevice {
        self.device.as_ref()
    }

    /// The device, to write its configuration.
    pub fn device_mut(&mut self) -> &mut dyn VirtioDevice {
        self.device.as_mut()
    }

    /// Features that the device offers.
    pub fn offered_features(&self) -> u64 {
        self.offered
    }

    /// Features that the driver wants.
    pub fn driver_features(&self) -> u64 {
        self.state.features
    }

    /// Take what the driver wants. Ignored once features are agreed on.
    pub fn set_driver_features(&mut self, features: u64) {
        if self.state.status & status::FEATURES_OK == 0 {
            self.state.features = features;
        }
    }

    /// Number of queues.
    pub fn queue_count(&self) -> u16 {
        self.state.queues.len() as u16
    }

    /// Queue `index` as it is set up, if there is one.
    pub fn queue(&self, index: u16) -> Option<&QueueSetup> {
        self.state.queues.get(usize::from(index))
    }

    /// Queue `index`, if there is one and it may be changed: it is not enabled, and the device does not run.
    pub fn queue_mut(&mut self, index: u16) -> Option<&mut QueueSetup> {
        let running = self.state.status & status::DRIVER_OK != 0;
        let queue = self.state.queues.get_mut(usize::from(index))?;
        (!running && !queue.enabled).then_some(queue)
    }

    /// How the driver makes each queue in use known, while the device runs.
    pub fn kicks(&self) -> &[(u16, Arc<EventFd>)] {
        &self.kicks
    }

    /// The driver has made buffers available in queue `index`.
    pub fn kick(&self, index: u16) {
        if let Some((_, kick)) = self.kicks.iter().find(|(queue, _)| *queue == index) {
            // Fails only where the counter is full, and then the reader is awake anyway.
            let _ = kick.write(1);
        }
    }

    /// Status as the driver has written it.
    pub fn status(&self) -> u8 {
        self.state.status
    }

    /// Take a status from the driver. Zero resets; otherwise bits are only ever added.
    pub fn write_status(&mut self, value: u8) -> Transition {
        if value == 0 {
            self.reset();
            return Transition::Reset;
        }
        let added = value & !self.state.status;
        self.state.status |= added & (status::ACKNOWLEDGE | status::DRIVER | status::FAILED);
        if added & status::FEATURES_OK != 0 && self.features_agree() {
            self.state.status |= status::FEATURES_OK;
        }
        let start = added & status::DRIVER_OK != 0;
        if !start || self.state.status & status::FEATURES_OK == 0 {
            return Transition::None;
        }
        self.state.status |= status::DRIVER_OK;
        match self.start() {
            Ok(()) => Transition::Started,
            Err(error) => {
                self.report(&error);
                self.kicks.clear();
                Transition::Failed
            }
        }
    }

    /// A guest can fail as often as it likes: only the first time is worth a warning.
    fn report(&mut self, error: &ActivateError) {
        let first = !std::mem::replace(&mut self.reported, true);
        let level = if first { Level::Warn } else { Level::Debug };
        log!(level, "start virtio device of type {}: {error}", self.device.device_type());
    }

    fn features_agree(&self) -> bool {
        self.state.features & !self.offered == 0 && self.state.features & feature::VERSION_1 != 0
    }

    fn start(&mut self) -> Result<(), ActivateError> {
        let mut queues = Vec::new();
        for (index, setup) in (0..).zip(&self.state.queues).filter(|(_, setup)| setup.enabled) {
            let max_size = self.device.queue_max_sizes()[usize::from(index)];
            let attempted = || format!("use queue {index}, {setup:x?}");
            let failed = |source| ActivateError { attempted: attempted(), source };
            let queue = self.build_queue(max_size, setup).map_err(failed)?;
            let kick = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(failed)?;
            self.kicks.push((index, Arc::new(kick.try_clone().map_err(failed)?)));
            queues.push(ActiveQueue { index, queue, kick });
        }
        self.device.activate(Activation {
            memory: self.memory.clone(),
            features: self.state.features,
            queues,
            interrupt: Arc::clone(&self.interrupt),
        })
    }

    fn build_queue(&self, max_size: u16, setup: &QueueSetup) -> io::Result<Queue> {
        let invalid = |error: virtio_queue::Error| {
            io::Error::new(io::ErrorKind::InvalidInput, error.to_string())
        };
        let mut queue = Queue::new(max_size).map_err(invalid)?;
        queue.try_set_size(setup.size).map_err(invalid)?;
        queue.try_set_desc_table_address(GuestAddress(setup.descriptors)).map_err(invalid)?;
        queue.try_set_avail_ring_address(GuestAddress(setup.available)).map_err(invalid)?;
        queue.try_set_used_ring_address(GuestAddress(setup.used)).map_err(invalid)?;
        queue.set_event_idx(self.state.features & feature::EVENT_IDX != 0);
        queue.set_ready(true);
        if !setup.is_inside(&self.memory.memory()) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "its rings are not all in guest memory",
            ));
        }
        Ok(queue)
    }

    /// Stop the device and forget the driver.
    pub fn reset(&mut self) {
        drop(self.device.deactivate());
        self.kicks.clear();
        self.state = SessionState::new(self.device.as_ref());
    }
}

impl QueueSetup {
    /// Whether all three rings lie in guest memory, section 2.7. As `Queue::is_valid`, which logs an error
    /// each time.
    fn is_inside(&self, memory: &GuestMemory) -> bool {
        const DESCRIPTOR: usize = 16;
        const AVAILABLE: (usize, usize) = (6, 2);
        const USED: (usize, usize) = (6, 8);
        let entries = usize::from(self.size);
        let rings = [
            (self.descriptors, entries * DESCRIPTOR),
            (self.available, AVAILABLE.0 + entries * AVAILABLE.1),
            (self.used, USED.0 + entries * USED.1),
        ];
        rings.iter().all(|&(address, size)| memory.check_range(GuestAddress(address), size))
    }
}

impl SessionState {
    fn new(device: &dyn VirtioDevice) -> Self {
        let queues = device.queue_max_sizes().iter().map(|&size| QueueSetup {
            size,
            enabled: false,
            descriptors: 0,
            available: 0,
            used: 0,
        });
        Self { status: 0, features: 0, queues: queues.collect() }
    }
}
