// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Entropy device, VIRTIO 1.2 section 5.4: one queue of buffers to fill with random bytes.
//!
//! A request gets at most `MAX_BYTES`, whatever the size of its buffers, so that a guest cannot hold
//! the thread; the specification asks for one byte at least. Left out: entropy leak detection.

use std::fs::File;
use std::io;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use vm_memory::{Bytes, GuestAddressSpace};

use super::queue::{Chain, DeviceQueue, RingError};
use super::{ActivateError, Activation, ActiveQueue, VirtioDevice};
use crate::io_thread::{IoHandle, Worker, WorkerSet};
use crate::memory::{GuestMemory, GuestMemoryHandle};

/// Size of the request queue.
const QUEUE_SIZE: u16 = 64;

/// Most bytes that one request gets.
const MAX_BYTES: u64 = 4096;

/// An entropy device.
#[derive(Debug)]
pub struct Rng {
    // wiring
    source: File,
    io: IoHandle,
    // state
    workers: WorkerSet,
}

impl Rng {
    /// A device that reads from `source`, which must not block for long, on the thread of `io`.
    pub fn new(source: File, io: IoHandle) -> Self {
        Self { source, io, workers: WorkerSet::default() }
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        0
    }

    fn config_read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, context: Activation) -> Result<(), ActivateError> {
        for active in context.queues {
            let source = self.source.try_clone().map_err(|source| ActivateError {
                attempted: "sharing the entropy source with its io thread".into(),
                source,
            })?;
            let interrupt = context.interrupt.clone();
            let worker = RngWorker {
                memory: context.memory.clone(),
                source,
                queue: DeviceQueue::new(active, context.features, interrupt),
                chain: Chain::default(),
            };
            self.workers.add(&self.io, Box::new(worker)).map_err(|error| ActivateError {
                attempted: "starting the entropy queue".into(),
                source: io::Error::other(error),
            })?;
        }
        Ok(())
    }

    fn deactivate(&mut self) -> Vec<ActiveQueue> {
        self.workers.take_queues()
    }
}

struct RngWorker {
    // wiring
    memory: GuestMemoryHandle,
    source: File,
    // state
    queue: DeviceQueue,
    chain: Chain,
}

impl RngWorker {
    fn serve(&mut self) -> Result<(), RingError> {
        let memory = self.memory.memory();
        let source = &mut self.source;
        self.queue
            .serve(&memory, &mut self.chain, |chain| Ok(Some(fill(&memory, source, chain))))?;
        self.queue.notify(&memory)
    }
}

/// Fill the buffers of `chain` as far as it gets; says how many bytes were written.
fn fill(memory: &GuestMemory, source: &mut File, chain: &Chain) -> u32 {
    let mut written = 0;
    let writable = chain.writable();
    let Some((wanted, _)) = writable.split_at(writable.len().min(MAX_BYTES)) else { return 0 };
    for segment in wanted.segments() {
        match memory.read_volatile_from(segment.address, source, segment.len as usize) {
            // At most MAX_BYTES.
            Ok(count) => written += count as u32,
            Err(error) => {
                log::warn!("reading the entropy source: {error}");
                break;
            }
        }
    }
    written
}

impl MutEventSubscriber for RngWorker {
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

impl Worker for RngWorker {
    fn into_queues(self: Box<Self>) -> Vec<ActiveQueue> {
        vec![self.queue.into_active()]
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vm_memory::{GuestAddress, GuestMemoryMmap};
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    use super::*;
    use crate::io_thread::IoThread;
    use crate::virtio::test_driver::Driver;
    use crate::virtio::test_interrupt::RecordedInterrupt;

    const DATA: u64 = 0x2000;

    struct Setup {
        device: Rng,
        driver: Driver,
        interrupt: Arc<RecordedInterrupt>,
        kick: EventFd,
        _io: IoThread,
    }

    fn activate(source: &str) -> Setup {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        let driver = Driver::new(&memory, 0x1000, 8);
        let io = IoThread::spawn("ecr-test", Box::new(|why| panic!("{why}"))).unwrap();
        let mut device = Rng::new(File::open(source).unwrap(), io.handle());
        let interrupt = Arc::new(RecordedInterrupt::default());
        let kick = EventFd::new(EFD_NONBLOCK).unwrap();
        let queue =
            ActiveQueue { index: 0, queue: driver.queue(), kick: kick.try_clone().unwrap() };
        device
            .activate(Activation {
                memory: GuestMemoryHandle::new(memory),
                features: 0,
                queues: vec![queue],
                interrupt: Arc::clone(&interrupt) as _,
            })
            .unwrap();
        Setup { device, driver, interrupt, kick, _io: io }
    }

    fn wait_used(s: &mut Setup) -> (u32, u32) {
        let mut used = None;
        s.interrupt.wait_until(|| {
            used = used.or_else(|| s.driver.used());
            used.is_some()
        });
        used.unwrap()
    }

    #[test]
    fn buffers_are_filled() {
        let mut s = activate("/dev/urandom");
        s.driver.add(&[(DATA, 32, true), (DATA + 64, 32, true)]);
        s.kick.write(1).unwrap();
        assert_eq!(wait_used(&mut s), (0, 64));
        for at in [DATA, DATA + 64] {
            let bytes: [u8; 32] = s.driver.memory.read_obj(GuestAddress(at)).unwrap();
            assert_ne!(bytes, [0; 32]);
        }
        let between: [u8; 32] = s.driver.memory.read_obj(GuestAddress(DATA + 32)).unwrap();
        assert_eq!(between, [0; 32]);
    }

    #[test]
    fn a_request_is_bounded() {
        let mut s = activate("/dev/urandom");
        s.driver.add(&[(DATA, 0x8000, true)]);
        s.kick.write(1).unwrap();
        assert_eq!(wait_used(&mut s), (0, 4096));
    }

    #[test]
    fn a_dry_source_gives_nothing() {
        let mut s = activate("/dev/null");
        s.driver.add(&[(DATA, 8, true)]);
        s.kick.write(1).unwrap();
        assert_eq!(wait_used(&mut s), (0, 0));
    }

    #[test]
    fn a_broken_ring_asks_for_a_reset_and_the_queue_comes_back() {
        let mut s = activate("/dev/urandom");
        s.driver.set_available_index(100);
        s.kick.write(1).unwrap();
        s.interrupt.wait_for_reset();
        let queues = s.device.deactivate();
        assert_eq!(queues.len(), 1);
        assert_eq!(s.device.deactivate().len(), 0);
    }
}
