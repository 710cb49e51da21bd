// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The device as its driver configures it.

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;

use super::control::{self, Backends, ControlWorker};
use super::receive::Receiver;
use super::registers::{Registers, has};
use super::transmit::Transmitter;
use super::worker::PairWorker;
use crate::backend::tap::NetBackend;
use crate::io_thread::{IoHandle, WorkerSet};
use crate::virtio::queue::DeviceQueue;
use crate::virtio::{ActivateError, Activation, ActiveQueue, VirtioDevice};

/// What a network device is made of.
#[derive(Debug)]
pub struct NetConfig {
    /// The guest's address.
    pub mac: [u8; 6],
    /// Largest packet that the guest is told to send.
    pub mtu: Option<u16>,
    /// Entries of a queue: a power of two, 2 to 32768.
    pub queue_size: u16,
    /// The host's end of each pair of queues.
    pub backends: Vec<Arc<dyn NetBackend>>,
}

/// Why a network device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// Queues that there cannot be.
    #[error(
        "{pairs} pairs of queues of {size} entries: use 1 to 256 of them, and a power of two from 2 to 32768"
    )]
    Queues {
        /// Pairs asked for.
        pairs: usize,
        /// Entries asked for.
        size: u16,
    },
    /// Nobody to serve them.
    #[error("a network device needs an I/O thread")]
    NoThread,
}

/// A network device whose frames this process carries.
#[derive(Debug)]
pub struct Net {
    // configuration
    registers: Registers,
    // wiring
    backends: Backends,
    threads: Vec<IoHandle>,
    // state
    workers: WorkerSet,
}

impl Net {
    /// A device whose pairs of queues are spread over `threads`.
    ///
    /// # Errors
    /// Any [`NetError`].
    pub fn new(config: NetConfig, threads: Vec<IoHandle>) -> Result<Self, NetError> {
        let NetConfig { mac, mtu, queue_size, backends } = config;
        if threads.is_empty() {
            return Err(NetError::NoThread);
        }
        let offloads = backends.first().map_or(0, |backend| backend.offloads());
        let pairs = backends.len();
        let registers = Registers::new(mac, mtu, pairs, queue_size, offloads)
            .ok_or(NetError::Queues { pairs, size: queue_size })?;
        Ok(Self { registers, backends: backends.into(), threads, workers: WorkerSet::default() })
    }

    fn start(&mut self, context: Activation) -> io::Result<()> {
        let Activation { memory, features, queues, interrupt } = context;
        control::begin(&self.backends, features)?;
        let control = self.registers.control_queue(features);
        let mergeable = has(features, VIRTIO_NET_F_MRG_RXBUF);
        let serve = |queue| DeviceQueue::new(queue, features, Arc::clone(&interrupt));
        let mut queues = queues.into_iter().map(serve).peekable();
        let pairs = self.backends.iter().zip(self.threads.iter().cycle());
        for (index, (backend, thread)) in (0..).step_by(2).zip(pairs) {
            // Without several pairs, the control queue follows the first.
            let mut next = |number| queues.next_if(|q| q.index() == number && number < control);
            let rx = next(index).map(|queue| Receiver::new(queue, mergeable));
            let tx = next(index + 1).map(Transmitter::new);
            if rx.is_some() || tx.is_some() {
                let worker = PairWorker::new(memory.clone(), Arc::clone(backend), rx, tx);
                self.workers.add(thread, Box::new(worker)).map_err(io::Error::other)?;
            }
        }
        if let Some(queue) = queues.next_if(|queue| queue.index() == control) {
            let backends = Arc::clone(&self.backends);
            let worker = ControlWorker::new(memory, backends, features, queue);
            self.workers.add(&self.threads[0], Box::new(worker)).map_err(io::Error::other)?;
        }
        Ok(())
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn queue_max_sizes(&self) -> &[u16] {
        self.registers.queue_sizes()
    }

    fn features(&self) -> u64 {
        self.registers.features()
    }

    fn config_read(&self, offset: u64, data: &mut [u8]) {
        self.registers.read(offset, data);
    }

    fn activate(&mut self, context: Activation) -> Result<(), ActivateError> {
        self.start(context).map_err(|source| ActivateError {
            attempted: "serve the queues of a network device".into(),
            source,
        })
    }

    fn deactivate(&mut self) -> Vec<ActiveQueue> {
        self.workers.take_queues()
    }
}
