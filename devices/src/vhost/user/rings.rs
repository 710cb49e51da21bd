// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! A device's queues at another process: agree on features, hand rings over, take them back.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VringConfigData};
use virtio_queue::QueueT;
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryBackend};
use vmm_sys_util::eventfd::EventFd;

use super::VhostUserError;
use super::connection::{Connection, OnLost};
use super::memory::UserMemory;
use crate::io_thread::{IoHandle, WorkerSet};
use crate::memory::{GuestMemory, GuestMemoryHandle, MemoryListener};
use crate::vhost::kernel::ring_parts;
use crate::virtio::{Activation, ActiveQueue, VirtioInterrupt};

/// There are protocol features, and rings are enabled one by one.
const F_PROTOCOL_FEATURES: u64 = 1 << 30;
/// Not a legacy device.
const F_VERSION_1: u64 = 1 << 32;

/// Queues at another process.
#[derive(Debug)]
pub(super) struct Rings {
    // Configuration.
    features: u64,
    protocol: VhostUserProtocolFeatures,
    /// Most queues that the daemon serves.
    most: u64,
    // Wiring; the watch ends first.
    _watch: WorkerSet,
    connection: Arc<Connection>,
}

/// Queues that the daemon has.
#[derive(Debug)]
pub(super) struct GivenRings {
    memory: GuestMemoryHandle,
    queues: Vec<ActiveQueue>,
    /// The hypervisor forgets a trigger when its last descriptor is closed, and the daemon's end may be it.
    _calls: Vec<EventFd>,
}

impl Rings {
    /// Connect to the daemon at `path`, for a device of at most `queues` queues.
    pub(super) fn connect(
        path: &Path,
        queues: u64,
        io: &IoHandle,
        on_lost: OnLost,
    ) -> Result<Self, VhostUserError> {
        let (connection, watch) = Connection::open(path, queues, io, on_lost)?;
        let features = connection.begin("ask for its features", |frontend| {
            frontend.set_owner()?;
            frontend.get_features()
        })?;
        if features & F_VERSION_1 == 0 {
            return Err(connection.unfit("it knows legacy devices only: use a newer one"));
        }
        let mut protocol = VhostUserProtocolFeatures::empty();
        if features & F_PROTOCOL_FEATURES != 0 {
            let known = VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK;
            protocol = connection.exchange("agree on the protocol", |frontend| {
                let protocol = frontend.get_protocol_features()? & known;
                frontend.set_protocol_features(protocol)?;
                if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
                    frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
                }
                Ok(protocol)
            })?;
        }
        let most = if protocol.contains(VhostUserProtocolFeatures::MQ) {
            connection.exchange("ask how many queues it serves", Frontend::get_queue_num)?
        } else {
            queues
        };
        Ok(Self { features, protocol, most, _watch: watch, connection })
    }

    /// Features that the daemon offers.
    pub(super) fn features(&self) -> u64 {
        self.features
    }

    /// Most queues that the daemon serves.
    pub(super) fn most(&self) -> u64 {
        self.most
    }

    /// Say that the daemon cannot be used.
    pub(super) fn unfit(&self, problem: impl Into<String>) -> VhostUserError {
        self.connection.unfit(problem)
    }

    /// Keeps the daemon's map of guest memory.
    pub(super) fn memory_listener(&self) -> Box<dyn MemoryListener> {
        let acknowledges = self.protocol.contains(VhostUserProtocolFeatures::REPLY_ACK);
        Box::new(UserMemory::new(&self.connection, acknowledges))
    }

    /// Hand the queues of `context` over.
    pub(super) fn give(&self, context: Activation) -> Result<GivenRings, VhostUserError> {
        let Activation { memory, features, queues, interrupt } = context;
        let protocol = self.features & F_PROTOCOL_FEATURES;
        let view = memory.memory();
        let mut rings = Vec::new();
        for queue in &queues {
            rings.push(self.describe(queue, &view, &interrupt)?);
        }
        let features = features & self.features | protocol;
        let attempted = format!("give it {} queues, with features {features:#x}", queues.len());
        let given = self.connection.exchange(&attempted, |frontend| {
            frontend.set_features(features)?;
            for (queue, (config, call)) in queues.iter().zip(&rings) {
                give(frontend, queue, config, call)?;
                if protocol != 0 {
                    frontend.set_vring_enable(queue.index.into(), true)?;
                }
            }
            Ok(())
        });
        if let Err(error) = given {
            // The rings may become other memory of the guest's, so nobody may write there.
            self.stop(&queues);
            return Err(error);
        }
        for queue in &queues {
            // Buffers that came before the daemon had the doorbell.
            let _ = queue.kick.write(1);
        }
        let calls = rings.into_iter().map(|(_, call)| call).collect();
        drop(view);
        Ok(GivenRings { memory, queues, _calls: calls })
    }

    /// What the daemon has to know of a queue: its place in this process, and its interrupt.
    fn describe(
        &self,
        queue: &ActiveQueue,
        memory: &GuestMemory,
        interrupt: &Arc<dyn VirtioInterrupt>,
    ) -> Result<(VringConfigData, EventFd), VhostUserError> {
        let index = queue.index;
        let failed = |problem: String| self.unfit(format!("queue {index}: {problem}"));
        let config = host_addresses(queue, memory)
            .ok_or_else(|| failed("its rings are not in single pieces of memory".into()))?;
        let call = interrupt.queue_eventfd(index).map_err(|error| failed(error.to_string()))?;
        Ok((config, call))
    }

    /// Stop the daemon's use of queues; returns where it has come to in each, if it says so.
    fn stop(&self, queues: &[ActiveQueue]) -> Vec<u32> {
        let bases = self.connection.exchange("take queues back", |frontend| {
            queues.iter().map(|queue| frontend.get_vring_base(queue.index.into())).collect()
        });
        bases.unwrap_or_else(|error| {
            log::debug!("{error}");
            Vec::new()
        })
    }

    /// Take the queues back, with where the daemon has come to. Where it is gone, what it had taken and not
    /// answered stays so.
    pub(super) fn take(&self, given: GivenRings) -> Vec<ActiveQueue> {
        let GivenRings { memory, mut queues, .. } = given;
        let bases = self.stop(&queues);
        let memory = memory.memory();
        for (position, ring) in queues.iter_mut().enumerate() {
            // The daemon keeps its used index in the ring only.
            let Ok(used) = ring.queue.used_idx(&*memory, Ordering::Acquire) else { continue };
            let base = bases.get(position).and_then(|base| u16::try_from(*base).ok());
            ring.queue.set_next_avail(base.unwrap_or(used.0));
            ring.queue.set_next_used(used.0);
        }
        queues
    }
}

/// Hand one ring over; the daemon begins to serve it with the last message.
fn give(
    frontend: &Frontend,
    ring: &ActiveQueue,
    config: &VringConfigData,
    call: &EventFd,
) -> vhost::Result<()> {
    let index = ring.index.into();
    frontend.set_vring_num(index, ring.queue.size())?;
    frontend.set_vring_base(index, ring.queue.next_avail())?;
    frontend.set_vring_addr(index, config)?;
    frontend.set_vring_call(index, call)?;
    frontend.set_vring_kick(index, &ring.kick)
}

/// A ring by its addresses in this process, which is how the daemon finds it in its own map. Each part has
/// to lie in one region: what follows it in the guest need not follow it there.
fn host_addresses(ring: &ActiveQueue, memory: &GuestMemory) -> Option<VringConfigData> {
    let queue = &ring.queue;
    let config = VringConfigData {
        queue_max_size: queue.max_size(),
        queue_size: queue.size(),
        flags: 0,
        desc_table_addr: queue.desc_table(),
        used_ring_addr: queue.used_ring(),
        avail_ring_addr: queue.avail_ring(),
        log_addr: None,
    };
    let mut hosts = [0; 3];
    for (host, (address, length)) in hosts.iter_mut().zip(ring_parts(&config)) {
        let part = memory.get_slice(GuestAddress(address), length).ok()?;
        *host = part.ptr_guard().as_ptr() as u64;
    }
    let [desc_table_addr, avail_ring_addr, used_ring_addr] = hosts;
    Some(VringConfigData { desc_table_addr, avail_ring_addr, used_ring_addr, ..config })
}
