// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Serves one queue: starts what the driver asks for, and answers as the backend gets done.

use std::fmt;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vm_memory::GuestAddressSpace;

use super::device::Disk;
use super::request::{self, Action, Reply, Status};
use crate::backend::block::BlockBackend;
use crate::io_thread::Worker;
use crate::memory::{GuestMemory, GuestMemoryHandle};
use crate::virtio::ActiveQueue;
use crate::virtio::queue::{Chain, DeviceQueue, RingError};

pub(super) struct QueueWorker {
    // wiring
    disk: Arc<Disk>,
    memory: GuestMemoryHandle,
    backend: Box<dyn BlockBackend>,
    // state
    queue: DeviceQueue,
    chain: Chain,
    /// Requests that the backend works on, by the head of their chain.
    pending: Box<[Option<Reply>]>,
    pending_count: usize,
    /// Requests that the host failed.
    host_errors: u64,
}

/// Why a queue can be served no more.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Ring(#[from] RingError),
    #[error("the host's I/O: {0}")]
    Backend(io::Error),
}

impl fmt::Debug for QueueWorker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QueueWorker")
            .field("queue", &self.queue)
            .field("backend", &self.backend)
            .field("pending", &self.pending_count)
            .finish_non_exhaustive()
    }
}

impl QueueWorker {
    /// `backend` has to be as deep as the queue is at most.
    pub(super) fn new(
        disk: Arc<Disk>,
        memory: GuestMemoryHandle,
        queue: DeviceQueue,
        backend: Box<dyn BlockBackend>,
    ) -> Self {
        let pending = (0..queue.size()).map(|_| None).collect();
        Self {
            disk,
            memory,
            backend,
            queue,
            chain: Chain::default(),
            pending,
            pending_count: 0,
            host_errors: 0,
        }
    }

    /// Start what is available, then answer what is done.
    fn serve(&mut self) -> Result<(), Failure> {
        let memory = self.memory.memory().into_inner();
        self.start(&memory)?;
        self.answer(&memory)?;
        self.queue.notify(&memory)?;
        Ok(())
    }

    fn start(&mut self, memory: &Arc<GuestMemory>) -> Result<(), RingError> {
        let Self { disk, backend, queue, chain, pending, pending_count, .. } = self;
        queue.serve(memory, chain, |chain| {
            let (reply, action) = request::parse(disk, memory, chain)?;
            let operation = match action {
                Action::Done(status) => return Ok(Some(reply.send(memory, status)?)),
                Action::Start(operation) => operation,
            };
            match pending.get_mut(usize::from(chain.head())) {
                Some(slot @ None) => *slot = Some(reply),
                _ => {
                    const RULE: &str = "was made available again before it was used";
                    return Err(RingError::Request { head: chain.head(), rule: RULE });
                }
            }
            *pending_count += 1;
            backend.queue(chain.head(), operation);
            Ok(None)
        })
    }

    /// Answer what the backend is done with; after a failure, only take note of it.
    fn answer(&mut self, memory: &GuestMemory) -> Result<(), Failure> {
        loop {
            let (head, result) = match self.backend.complete() {
                Ok(Some(done)) => done,
                Ok(None) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.queue.kick_again();
                    return Ok(());
                }
                Err(error) => return Err(Failure::Backend(error)),
            };
            let Some(reply) = self.pending.get_mut(usize::from(head)).and_then(Option::take) else {
                continue;
            };
            self.pending_count -= 1;
            let status = self.status(result);
            if !self.queue.has_failed() {
                let written = reply.send(memory, status)?;
                self.queue.add_used(memory, head, written)?;
            }
        }
    }

    fn status(&mut self, result: io::Result<()>) -> Status {
        let Err(error) = result else { return Status::Ok };
        self.host_errors += 1;
        // A broken disk must not flood the log.
        if self.host_errors.is_power_of_two() {
            let (path, count) = (self.disk.file.path().display(), self.host_errors);
            log::warn!("disk {path}: {error} (error {count} of this queue)");
        }
        Status::IoError
    }

    /// Answer what is in flight as it gets done, until nothing is.
    fn drain(&mut self) -> Result<(), Failure> {
        let memory = self.memory.memory();
        while self.pending_count > 0 {
            match self.backend.wait() {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::thread::yield_now(),
                result => result.map_err(Failure::Backend)?,
            }
            self.answer(&memory)?;
        }
        if !self.queue.has_failed() {
            self.queue.notify(&memory)?;
        }
        Ok(())
    }

    fn fail(&mut self, failure: &Failure) {
        if let Failure::Backend(error) = failure {
            log::error!("disk {}: {error}", self.disk.file.path().display());
        }
        self.queue.fail(failure);
    }

    fn begin(&mut self, ops: &mut EventOps<'_>) -> Result<(), Failure> {
        self.backend.start().map_err(Failure::Backend)?;
        for event in [Some(self.queue.kick()), self.backend.completion()].into_iter().flatten() {
            ops.add(Events::new(event, EventSet::IN))
                .map_err(|error| Failure::Backend(io::Error::other(error)))?;
        }
        Ok(())
    }
}

impl MutEventSubscriber for QueueWorker {
    fn init(&mut self, ops: &mut EventOps) {
        if let Err(failure) = self.begin(ops) {
            self.fail(&failure);
        }
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        let sources = [Some(self.queue.kick()), self.backend.completion()];
        for source in sources.into_iter().flatten().filter(|fd| fd.as_raw_fd() == events.fd()) {
            // It can fail only where nothing is to be read any more.
            let _ = source.read();
        }
        let served =
            if self.queue.has_failed() { self.answer(&self.memory.memory()) } else { self.serve() };
        if let Err(failure) = served {
            self.fail(&failure);
        }
    }
}

impl Worker for QueueWorker {
    fn quiesce(&mut self) {
        // A ring that is found broken now fails the queue, and the rest drains without it. A backend that
        // fails keeps the memory of what is in flight to itself.
        for _ in 0..2 {
            match self.drain() {
                Ok(()) => return,
                Err(failure) => self.fail(&failure),
            }
        }
    }

    fn into_queues(self: Box<Self>) -> Vec<ActiveQueue> {
        vec![self.queue.into_active()]
    }
}
