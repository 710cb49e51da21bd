// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Serves one pair of queues on an I/O thread.
//!
//! The host's descriptor is watched for edges: what it has to say while there are no buffers wakes nobody,
//! and the driver's kick leads to it later.

use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vm_memory::GuestAddressSpace;

use super::receive::Receiver;
use super::transmit::Transmitter;
use crate::backend::tap::NetBackend;
use crate::io_thread::Worker;
use crate::memory::GuestMemoryHandle;
use crate::virtio::ActiveQueue;
use crate::virtio::queue::DeviceQueue;

/// epoll's names for what is waited for.
const RECEIVE: u32 = 0;
const TRANSMIT: u32 = 1;
const BACKEND: u32 = 2;

pub(super) struct PairWorker {
    // wiring
    memory: GuestMemoryHandle,
    backend: Arc<dyn NetBackend>,
    // state
    rx: Option<Receiver>,
    tx: Option<Transmitter>,
}

impl PairWorker {
    pub(super) fn new(
        memory: GuestMemoryHandle,
        backend: Arc<dyn NetBackend>,
        rx: Option<Receiver>,
        tx: Option<Transmitter>,
    ) -> Self {
        Self { memory, backend, rx, tx }
    }

    fn receive(&mut self) {
        let Some(rx) = self.rx.as_mut().filter(|rx| !rx.queue.has_failed()) else { return };
        let memory = self.memory.memory();
        if let Err(error) = rx.receive(&memory, self.backend.as_raw_fd()) {
            rx.queue.fail(&error);
        }
    }

    fn transmit(&mut self) {
        let Some(tx) = self.tx.as_mut().filter(|tx| !tx.queue.has_failed()) else { return };
        let memory = self.memory.memory();
        if let Err(error) = tx.transmit(&memory, self.backend.as_raw_fd()) {
            tx.queue.fail(&error);
        }
    }

    fn queues(&self) -> impl Iterator<Item = (u32, &DeviceQueue)> {
        let rx = self.rx.iter().map(|rx| (RECEIVE, &rx.queue));
        rx.chain(self.tx.iter().map(|tx| (TRANSMIT, &tx.queue)))
    }
}

impl MutEventSubscriber for PairWorker {
    fn init(&mut self, ops: &mut EventOps) {
        let edges = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
        let backend = Events::with_data_raw(self.backend.as_raw_fd(), BACKEND, edges);
        let kicks =
            self.queues().map(|(name, queue)| Events::with_data(queue.kick(), name, EventSet::IN));
        let added = kicks.chain([backend]).try_for_each(|events| ops.add(events));
        if let Err(error) = added {
            let rx = self.rx.iter_mut().map(|rx| &mut rx.queue);
            rx.chain(self.tx.iter_mut().map(|tx| &mut tx.queue)).for_each(|q| q.fail(&error));
        }
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        if let Some((_, queue)) = self.queues().find(|(name, _)| *name == events.data()) {
            // A second wake-up for a kick that was already read finds nothing to read.
            let _ = queue.kick().read();
        }
        match events.data() {
            RECEIVE => self.receive(),
            TRANSMIT => self.transmit(),
            _ => {
                let waits = self.tx.as_ref().is_some_and(Transmitter::is_blocked);
                if waits && events.event_set().contains(EventSet::OUT) {
                    self.transmit();
                }
                self.receive();
            }
        }
    }
}

impl Worker for PairWorker {
    fn into_queues(self: Box<Self>) -> Vec<ActiveQueue> {
        let rx = self.rx.map(|rx| rx.queue.into_active());
        rx.into_iter().chain(self.tx.map(|tx| tx.queue.into_active())).collect()
    }
}
