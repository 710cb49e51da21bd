// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Serves the queues of a console, section 5.3.2: of port 0, of control messages, of the other ports;
//! first the device's sending queue, then its receiving one.

use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::EventFd;

use super::control::{CONTROL_SIZE, Control, DEVICE_READY};
use super::port::{INPUT_CAPACITY, Port};
use super::{Activation, F_MULTIPORT};
use crate::backend::chardev::PENDING;
use crate::io_thread::Worker;
use crate::memory::{GuestMemory, GuestMemoryHandle};
use crate::virtio::ActiveQueue;
use crate::virtio::queue::{Chain, DeviceQueue, RingError};

/// Control messages for the driver.
pub(super) const CONTROL_RX: u16 = 2;
/// Control messages from the driver.
pub(super) const CONTROL_TX: u16 = 3;

/// epoll's name for [`ConsoleWorker::wake`]; the other names are queue numbers.
const WAKE: u32 = u32::MAX;

/// Output is copied in pieces of this size.
const CHUNK: usize = 4 << 10;

/// Most buffers filled with input in one turn.
const BATCH: usize = 64;

pub(super) struct ConsoleWorker {
    memory: GuestMemoryHandle,
    /// Without it there is only port 0, which is always open.
    multiport: bool,
    ports: Vec<Arc<Port>>,
    /// A port has input or something to tell.
    wake: Arc<EventFd>,
    queues: Vec<DeviceQueue>,
}

/// What a queue is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    ControlRx,
    ControlTx,
    Rx(usize),
    Tx(usize),
}

impl Role {
    fn of(queue: u16) -> Self {
        let port = match queue {
            CONTROL_RX => return Self::ControlRx,
            CONTROL_TX => return Self::ControlTx,
            0 | 1 => 0,
            queue => usize::from(queue) / 2 - 1,
        };
        if queue.is_multiple_of(2) { Self::Rx(port) } else { Self::Tx(port) }
    }
}

impl ConsoleWorker {
    pub(super) fn new(context: Activation, ports: Vec<Arc<Port>>, wake: Arc<EventFd>) -> Self {
        let Activation { memory, features, queues, interrupt } = context;
        let serve = |queue| DeviceQueue::new(queue, features, Arc::clone(&interrupt));
        Self {
            memory,
            multiport: features & F_MULTIPORT != 0,
            ports,
            wake,
            queues: queues.into_iter().map(serve).collect(),
        }
    }

    /// Serve the queues whose role `chosen` picks, in their order.
    fn serve(&mut self, chosen: impl Fn(Role) -> bool) {
        let memory = self.memory.memory();
        for queue in &mut self.queues {
            let role = Role::of(queue.index());
            if queue.has_failed() || !chosen(role) {
                continue;
            }
            let served = match role {
                Role::ControlTx => hear(queue, &memory, &self.ports),
                Role::ControlRx => tell(queue, &memory, &self.ports),
                Role::Tx(port) => match self.ports.get(port) {
                    Some(port) => put_out(queue, &memory, port),
                    None => Ok(()),
                },
                Role::Rx(port) => match self.ports.get(port) {
                    Some(port) if !self.multiport || port.is_open_in_guest() => {
                        deliver(queue, &memory, port, &self.wake)
                    }
                    _ => Ok(()),
                },
            };
            if let Err(error) = served.and_then(|()| queue.notify(&memory)) {
                queue.fail(&error);
            }
        }
    }
}

/// Hear what the driver has to say about ports. What makes no sense is ignored.
fn hear(
    queue: &mut DeviceQueue,
    memory: &GuestMemory,
    ports: &[Arc<Port>],
) -> Result<(), RingError> {
    queue.serve(memory, &mut Chain::default(), |chain| {
        let buffers = chain.readable();
        if buffers.len() < CONTROL_SIZE as u64 {
            return Ok(Some(0));
        }
        let mut bytes = [0; CONTROL_SIZE];
        buffers.read(memory, &mut bytes)?;
        let message = Control::from_bytes(bytes);
        let id = usize::try_from(message.id).unwrap_or(usize::MAX);
        match message.event {
            // This one is about the device, whatever its port number.
            DEVICE_READY => ports.iter().for_each(|port| port.told(message)),
            _ => ports.get(id).into_iter().for_each(|port| port.told(message)),
        }
        Ok(Some(0))
    })
}

/// Tell the driver what it has to know about ports, as far as it gives buffers.
fn tell(
    queue: &mut DeviceQueue,
    memory: &GuestMemory,
    ports: &[Arc<Port>],
) -> Result<(), RingError> {
    let mut chain = Chain::default();
    for port in ports {
        while port.has_to_tell() && queue.pop_or_wait(memory, &mut chain)? {
            let mut bytes = Vec::new();
            if let Some((message, text)) = port.to_tell() {
                bytes.extend(message.to_bytes());
                bytes.extend(text);
            }
            let written = chain.writable().write(memory, &bytes)?;
            queue.add_used(memory, chain.head(), written)?;
        }
    }
    Ok(())
}

/// Put out what the driver sends. Of one chain no more than the backend would keep anyway: a chain can
/// name the same memory many times.
fn put_out(queue: &mut DeviceQueue, memory: &GuestMemory, port: &Port) -> Result<(), RingError> {
    let mut chunk = [0; CHUNK];
    queue.serve(memory, &mut Chain::default(), |chain| {
        let mut rest = chain.readable();
        for _ in 0..PENDING / CHUNK {
            let count = rest.len().min(CHUNK as u64);
            let Some((now, later)) = rest.split_at(count).filter(|_| count > 0) else { break };
            // At most CHUNK.
            let data = &mut chunk[..count as usize];
            now.read(memory, data)?;
            port.output(data);
            rest = later;
        }
        Ok(Some(0))
    })
}

/// Give the driver the port's input, as far as it gives buffers.
fn deliver(
    queue: &mut DeviceQueue,
    memory: &GuestMemory,
    port: &Port,
    wake: &EventFd,
) -> Result<(), RingError> {
    let mut chain = Chain::default();
    let mut data = [0; INPUT_CAPACITY];
    for _ in 0..BATCH {
        if !port.has_input() || !queue.pop_or_wait(memory, &mut chain)? {
            return Ok(());
        }
        let room = usize::try_from(chain.writable().len()).unwrap_or(usize::MAX);
        let count = port.take_input(&mut data[..room.min(INPUT_CAPACITY)]);
        let written = chain.writable().write(memory, &data[..count])?;
        queue.add_used(memory, chain.head(), written)?;
    }
    // The other queues of the thread first.
    let _ = wake.write(1);
    Ok(())
}

impl MutEventSubscriber for ConsoleWorker {
    fn init(&mut self, ops: &mut EventOps) {
        let wake = Events::with_data(&*self.wake, WAKE, EventSet::IN);
        let kicks = self
            .queues
            .iter()
            .map(|queue| Events::with_data(queue.kick(), u32::from(queue.index()), EventSet::IN));
        for events in kicks.chain([wake]) {
            if let Err(error) = ops.add(events) {
                log::error!("watch a queue of a virtio console: {error}");
            }
        }
        self.serve(|_| true);
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        let index = u16::try_from(events.data()).ok();
        let kick = self.queues.iter().find(|queue| Some(queue.index()) == index);
        let _ = kick.map_or(&*self.wake, DeviceQueue::kick).read();
        match index.map(Role::of) {
            Some(role @ (Role::Rx(_) | Role::Tx(_) | Role::ControlRx)) => {
                self.serve(|other| other == role);
            }
            // What the driver says may be answered, and may open a port.
            Some(Role::ControlTx) => {
                self.serve(|role| role == Role::ControlTx);
                self.serve(|role| matches!(role, Role::ControlRx | Role::Rx(_)));
            }
            None => self.serve(|role| matches!(role, Role::ControlRx | Role::Rx(_))),
        }
    }
}

impl Worker for ConsoleWorker {
    fn into_queues(self: Box<Self>) -> Vec<ActiveQueue> {
        self.queues.into_iter().map(DeviceQueue::into_active).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queues_stand_in_the_order_of_the_specification() {
        let roles: Vec<_> = (0..8).map(Role::of).collect();
        let control = [Role::ControlRx, Role::ControlTx];
        assert_eq!(roles[..2], [Role::Rx(0), Role::Tx(0)]);
        assert_eq!(roles[2..4], control);
        assert_eq!(roles[4..], [Role::Rx(1), Role::Tx(1), Role::Rx(2), Role::Tx(2)]);
    }
}
