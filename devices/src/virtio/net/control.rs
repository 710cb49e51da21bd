// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Commands of the driver, section 5.1.6.5: how many pairs of queues it uses, and what frames it accepts. To
//! all others, which a driver may not send without their features, the answer is an error.

use std::io;
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET, VIRTIO_NET_CTRL_MQ,
    VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
    VIRTIO_NET_F_MQ, VIRTIO_NET_OK,
};
use vm_memory::GuestAddressSpace;

use super::registers::{GUEST_OFFLOADS, accepted, has};
use crate::backend::tap::NetBackend;
use crate::io_thread::Worker;
use crate::memory::{GuestMemory, GuestMemoryHandle};
use crate::virtio::ActiveQueue;
use crate::virtio::queue::{Buffers, Chain, DeviceQueue, RingError};

/// The pairs of queues' ends on the host, in their order.
pub(crate) type Backends = Arc<[Arc<dyn NetBackend>]>;

/// Let frames arrive in the first `pairs` queues.
///
/// # Errors
/// The host refused.
pub(crate) fn use_pairs(backends: &[Arc<dyn NetBackend>], pairs: usize) -> io::Result<()> {
    // First the new ones: frames always find one.
    let (used, unused) = backends.split_at(pairs.min(backends.len()));
    used.iter().try_for_each(|backend| backend.set_enabled(true))?;
    unused.iter().try_for_each(|backend| backend.set_enabled(false))
}

/// Let frames arrive as a driver with `features` accepts them. What one queue of an interface is told holds for
/// all of them.
///
/// # Errors
/// The host refused.
pub(crate) fn use_offloads(backends: &[Arc<dyn NetBackend>], features: u64) -> io::Result<()> {
    match backends.first() {
        Some(first) => first.set_offloads(accepted(features) & first.offloads()),
        None => Ok(()),
    }
}

/// What a driver begins with: one pair of queues, section 5.1.5, and all that it has agreed to.
///
/// # Errors
/// The host refused.
pub(crate) fn begin(backends: &[Arc<dyn NetBackend>], features: u64) -> io::Result<()> {
    use_pairs(backends, 1)?;
    use_offloads(backends, features)
}

/// Serves the control queue.
pub(crate) struct ControlWorker {
    // wiring
    memory: GuestMemoryHandle,
    backends: Backends,
    // configuration
    features: u64,
    // state
    queue: DeviceQueue,
    chain: Chain,
}

impl ControlWorker {
    pub(crate) fn new(
        memory: GuestMemoryHandle,
        backends: Backends,
        features: u64,
        queue: DeviceQueue,
    ) -> Self {
        Self { memory, backends, features, queue, chain: Chain::default() }
    }

    fn serve(&mut self) -> Result<(), RingError> {
        let Self { memory, backends, features, queue, chain } = self;
        let memory = memory.memory();
        queue.serve(&memory, chain, |chain| {
            let answer = chain.writable();
            if answer.is_empty() {
                const RULE: &str = "has no room for the answer to a command";
                return Err(RingError::Request { head: chain.head(), rule: RULE });
            }
            let ack = match obey(&memory, backends, *features, chain.readable())? {
                true => VIRTIO_NET_OK,
                false => VIRTIO_NET_ERR,
            };
            Ok(Some(answer.write(&memory, &[ack as u8])?))
        })?;
        queue.notify(&memory)
    }
}

/// Carry out a command; says whether that was possible.
fn obey(
    memory: &GuestMemory,
    backends: &[Arc<dyn NetBackend>],
    features: u64,
    command: Buffers<'_>,
) -> Result<bool, RingError> {
    let Some((header, data)) = command.split_at(2) else { return Ok(false) };
    let mut kind = [0; 2];
    header.read(memory, &mut kind)?;
    let done = match kind.map(u32::from) {
        [VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET] if has(features, VIRTIO_NET_F_MQ) => {
            let Some(pairs) = argument(memory, data)?.map(u16::from_le_bytes) else {
                return Ok(false);
            };
            if !(1..=backends.len()).contains(&usize::from(pairs)) {
                return Ok(false);
            }
            use_pairs(backends, pairs.into())
        }
        [VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET]
            if has(features, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS) =>
        {
            let Some(offloads) = argument(memory, data)?.map(u64::from_le_bytes) else {
                return Ok(false);
            };
            if offloads & !(features & GUEST_OFFLOADS) != 0 {
                return Ok(false);
            }
            use_offloads(backends, offloads)
        }
        _ => return Ok(false),
    };
    if let Err(error) = &done {
        // A guest can do this as often as it likes.
        log::debug!("carry out command {kind:?} of a network driver: {error}");
    }
    Ok(done.is_ok())
}

/// The argument of a command, if there is one of the right size.
fn argument<const N: usize>(
    memory: &GuestMemory,
    data: Buffers<'_>,
) -> Result<Option<[u8; N]>, RingError> {
    if data.len() != N as u64 {
        return Ok(None);
    }
    let mut bytes = [0; N];
    data.read(memory, &mut bytes)?;
    Ok(Some(bytes))
}

impl MutEventSubscriber for ControlWorker {
    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::new(self.queue.kick(), EventSet::IN)) {
            self.queue.fail(&error);
        }
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        // A second wake-up for a kick that was already read finds nothing to read.
        let _ = self.queue.kick().read();
        if !self.queue.has_failed()
            && let Err(error) = self.serve()
        {
            self.queue.fail(&error);
        }
    }
}

impl Worker for ControlWorker {
    fn into_queues(self: Box<Self>) -> Vec<ActiveQueue> {
        vec![self.queue.into_active()]
    }
}
