// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Carries packets between the queues and the muxer.
//!
//! What the guest sends may have to be answered. When the muxer has no place for an answer, no more is
//! taken from the guest until it has given buffers for those that wait (section 5.10.6.1).

use std::io;
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vm_memory::GuestAddressSpace;

use super::common::{EVENT, RX, TX, tell_transport_reset};
use super::connection::BUFFER;
use super::muxer::Muxer;
use super::packet::{HEADER_SIZE, Header, op};
use crate::io_thread::Worker;
use crate::memory::{GuestMemory, GuestMemoryHandle};
use crate::virtio::queue::{Buffers, Chain, DeviceQueue, RingError};
use crate::virtio::{ActivateError, Activation, ActiveQueue};

/// epoll's name for the muxer; the other names are queue numbers.
const MUXER: u32 = u32::MAX;

/// Most packets carried in one direction before others on the thread have their turn.
const BATCH: usize = 64;

pub(super) struct VsockWorker {
    memory: GuestMemoryHandle,
    rx: DeviceQueue,
    tx: DeviceQueue,
    events: DeviceQueue,
    muxer: Muxer,
    /// Packets of the guest wait until the muxer has a place for answers.
    tx_waits: bool,
    /// The driver believes in connections that are no more.
    connections_lost: bool,
    chain: Chain,
    payload: Vec<u8>,
}

impl VsockWorker {
    pub(super) fn new(
        context: Activation,
        muxer: Muxer,
        connections_lost: bool,
    ) -> Result<Self, ActivateError> {
        let Activation { memory, features, queues, interrupt } = context;
        let indices: Vec<u16> = queues.iter().map(|queue| queue.index).collect();
        let mut queues = queues
            .into_iter()
            .map(|queue| DeviceQueue::new(queue, features, Arc::clone(&interrupt)));
        let (Some(rx), Some(tx), Some(events)) = (queues.next(), queues.next(), queues.next())
        else {
            return Err(ActivateError {
                attempted: format!("serve a socket device with queues {indices:?} of 0 to 2"),
                source: io::ErrorKind::InvalidInput.into(),
            });
        };
        Ok(Self {
            memory,
            rx,
            tx,
            events,
            muxer,
            tx_waits: false,
            connections_lost,
            chain: Chain::default(),
            payload: vec![0; BUFFER as usize],
        })
    }

    /// Carry what there is to carry, both ways.
    fn turn(&mut self) {
        let memory = self.memory.memory();
        if !self.tx.has_failed()
            && let Err(error) = self.take_from_guest(&memory)
        {
            self.tx.fail(&error);
        }
        if !self.rx.has_failed()
            && let Err(error) = self.give_to_guest(&memory)
        {
            self.rx.fail(&error);
        }
        if self.tx_waits && self.muxer.can_receive() {
            self.tx.kick_again();
        }
    }

    fn take_from_guest(&mut self, memory: &GuestMemory) -> Result<(), RingError> {
        for _ in 0..BATCH {
            self.tx_waits = !self.muxer.can_receive();
            if self.tx_waits || !self.tx.pop_or_wait(memory, &mut self.chain)? {
                return self.tx.notify(memory);
            }
            if let Some((header, payload)) =
                read_packet(self.chain.readable(), memory, &mut self.payload)?
            {
                self.muxer.receive(&header, payload);
            }
            self.tx.add_used(memory, self.chain.head(), 0)?;
        }
        self.tx.kick_again();
        self.tx.notify(memory)
    }

    fn give_to_guest(&mut self, memory: &GuestMemory) -> Result<(), RingError> {
        for _ in 0..BATCH {
            if !self.muxer.has_next() || !self.rx.pop_or_wait(memory, &mut self.chain)? {
                return self.rx.notify(memory);
            }
            let buffers = self.chain.writable();
            let Some((head, body)) = buffers.split_at(HEADER_SIZE as u64) else {
                let (head, rule) = (self.chain.head(), "has no room for a packet's header");
                return Err(RingError::Request { head, rule });
            };
            let room = usize::try_from(body.len()).unwrap_or(usize::MAX).min(self.payload.len());
            let Some(header) = self.muxer.next(&mut self.payload[..room]) else {
                self.rx.put_back();
                return self.rx.notify(memory);
            };
            let written = head.write(memory, &header.to_bytes())?
                + body.write(memory, &self.payload[..header.len as usize])?;
            self.rx.add_used(memory, self.chain.head(), written)?;
        }
        self.rx.kick_again();
        self.rx.notify(memory)
    }
}

/// Read a packet of the guest, its payload into `space`. What is too short to be one is nothing; one
/// that claims more payload than it has, or than any credit allows, becomes an invalid operation, which
/// breaks its connection.
fn read_packet<'a>(
    buffers: Buffers<'_>,
    memory: &GuestMemory,
    space: &'a mut [u8],
) -> Result<Option<(Header, &'a [u8])>, RingError> {
    let Some((head, body)) = buffers.split_at(HEADER_SIZE as u64) else { return Ok(None) };
    let mut bytes = [0; HEADER_SIZE];
    head.read(memory, &mut bytes)?;
    let header = Header::from_bytes(&bytes);
    if header.op != op::RW {
        return Ok(Some((header, &[])));
    }
    let payload = body.split_at(u64::from(header.len)).map(|(payload, _)| payload);
    match (payload, space.get_mut(..header.len as usize)) {
        (Some(payload), Some(space)) => {
            payload.read(memory, space)?;
            Ok(Some((header, space)))
        }
        _ => Ok(Some((Header { op: op::INVALID, ..header }, &[]))),
    }
}

impl MutEventSubscriber for VsockWorker {
    fn init(&mut self, ops: &mut EventOps) {
        let kicks = [&self.rx, &self.tx, &self.events]
            .map(|queue| Events::with_data(queue.kick(), queue.index().into(), EventSet::IN));
        let muxer = Events::with_data(&self.muxer, MUXER, EventSet::IN);
        for events in kicks.into_iter().chain([muxer]) {
            if let Err(error) = ops.add(events) {
                log::error!("watch a socket device: {error}");
            }
        }
        if std::mem::take(&mut self.connections_lost)
            && let Err(error) = tell_transport_reset(&mut self.events, &self.memory.memory())
        {
            self.events.fail(&error);
        }
        self.turn();
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        let kicked = match u16::try_from(events.data()) {
            Ok(RX) => Some(&self.rx),
            Ok(TX) => Some(&self.tx),
            Ok(EVENT) => Some(&self.events),
            _ => None,
        };
        match kicked {
            Some(queue) => drop(queue.kick().read()),
            None => {
                if let Err(error) = self.muxer.poll() {
                    log::error!("wait for sockets: {error}");
                }
            }
        }
        self.turn();
    }
}

impl Worker for VsockWorker {
    fn into_queues(self: Box<Self>) -> Vec<ActiveQueue> {
        [self.rx, self.tx, self.events].map(DeviceQueue::into_active).into()
    }
}
