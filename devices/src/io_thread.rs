// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Threads that serve queues: one epoll loop each, with [`Worker`]s that come and go.
//!
//! A device moves a worker to a thread when its driver is ready and takes it back when the device is
//! reset; in between the thread owns it, so the data path has no lock. A panic of a worker ends its
//! thread, not the process: whoever made the thread is told, and every later call on its handle fails.

use std::any::Any;
use std::fmt;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread::{self, JoinHandle, ThreadId};

use event_manager::{
    Error as EventError, EventManager, MutEventSubscriber, RemoteEndpoint, SubscriberId,
};

use crate::virtio::ActiveQueue;

/// Something that an [`IoThread`] serves. Its `init` runs on that thread, before its first event.
pub trait Worker: MutEventSubscriber + Send {
    /// Finish or cancel what is in flight. Called on the thread that served it, after its last event.
    fn quiesce(&mut self) {}

    /// Give back the queues it was made from.
    fn into_queues(self: Box<Self>) -> Vec<ActiveQueue> {
        Vec::new()
    }
}

impl fmt::Debug for dyn Worker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Worker")
    }
}

/// A worker on its thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WorkerId(SubscriberId);

/// Why a thread did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IoThreadError {
    /// The thread would wait for itself.
    #[error("io thread {0} cannot be asked to change its workers by one of them")]
    OwnThread(Arc<str>),
    /// The thread was stopped, or a worker panicked.
    #[error("io thread {0} has ended")]
    Ended(Arc<str>),
    /// It has no such worker.
    #[error("io thread {0} has no such worker: it was taken off before, or is on another thread")]
    UnknownWorker(Arc<str>),
}

type Manager = EventManager<Box<dyn Worker>>;

/// A thread that serves workers. Dropping it stops and joins the thread and drops its workers there.
pub struct IoThread {
    handle: IoHandle,
    tid: i32,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl fmt::Debug for IoThread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IoThread").field("name", &self.handle.name).field("tid", &self.tid).finish()
    }
}

impl IoThread {
    /// Start a thread called `name`. If it ends by anything but a drop, `on_failure` is called on it
    /// with the reason.
    ///
    /// # Errors
    /// No thread, or no descriptor for its event loop.
    pub fn spawn(name: &str, on_failure: Box<dyn FnOnce(String) + Send>) -> io::Result<Self> {
        let manager = Manager::new().map_err(io::Error::other)?;
        let endpoint = manager.remote_endpoint();
        let stop = Arc::new(AtomicBool::new(false));
        let (send_tid, tid) = mpsc::sync_channel(1);
        let thread = thread::Builder::new().name(name.to_owned()).spawn({
            let stop = Arc::clone(&stop);
            move || {
                // SAFETY: gettid takes no arguments, cannot fail and touches no memory.
                let _ = send_tid.send(unsafe { libc::gettid() });
                serve(manager, &stop, on_failure);
            }
        })?;
        let handle = IoHandle { name: Arc::from(name), thread: thread.thread().id(), endpoint };
        let tid = tid.recv().map_err(io::Error::other)?;
        Ok(Self { handle, tid, stop, thread: Some(thread) })
    }

    /// A handle through which workers are added and removed.
    pub fn handle(&self) -> IoHandle {
        self.handle.clone()
    }

    /// The kernel's id of the thread.
    pub fn tid(&self) -> i32 {
        self.tid
    }
}

impl Drop for IoThread {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        // The write fails only when the eventfd's counter is full, and then the thread wakes anyway.
        let _ = self.handle.endpoint.kick();
        if let Some(thread) = self.thread.take() {
            // A panic was already reported from the thread itself.
            let _ = thread.join();
        }
    }
}

/// The body of the thread.
fn serve(mut manager: Manager, stop: &AtomicBool, on_failure: Box<dyn FnOnce(String) + Send>) {
    while !stop.load(Ordering::Acquire) {
        match catch_unwind(AssertUnwindSafe(|| manager.run())) {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => return on_failure(format!("waiting for events: {error}")),
            // The manager may be torn, but from here on it is only dropped.
            Err(panic) => return on_failure(format!("panic: {}", panic_text(panic.as_ref()))),
        }
    }
}

/// What a panic said.
fn panic_text(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no text")
}

/// A way to change the workers of an [`IoThread`], from any other thread.
#[derive(Clone)]
pub struct IoHandle {
    name: Arc<str>,
    thread: ThreadId,
    endpoint: RemoteEndpoint<Box<dyn Worker>>,
}

impl fmt::Debug for IoHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("IoHandle").field(&self.name).finish()
    }
}

impl IoHandle {
    /// Let the thread serve `worker`. Its `init` has run when this returns.
    ///
    /// # Errors
    /// [`IoThreadError::OwnThread`] or [`IoThreadError::Ended`]; the worker is then dropped.
    pub fn add(&self, worker: Box<dyn Worker>) -> Result<WorkerId, IoThreadError> {
        self.refuse_own_thread()?;
        self.endpoint
            .call_blocking(move |workers| {
                Ok::<_, EventError>(WorkerId(workers.add_subscriber(worker)))
            })
            .map_err(|error| self.error(&error))
    }

    /// Take a worker off the thread, quiesced. No event reaches it any more.
    ///
    /// # Errors
    /// Any [`IoThreadError`].
    pub fn remove(&self, id: WorkerId) -> Result<Box<dyn Worker>, IoThreadError> {
        self.refuse_own_thread()?;
        self.endpoint
            .call_blocking(move |workers| {
                let mut worker = workers.remove_subscriber(id.0)?;
                worker.quiesce();
                Ok::<_, EventError>(worker)
            })
            .map_err(|error| self.error(&error))
    }

    fn refuse_own_thread(&self) -> Result<(), IoThreadError> {
        if thread::current().id() == self.thread {
            return Err(IoThreadError::OwnThread(Arc::clone(&self.name)));
        }
        Ok(())
    }

    fn error(&self, error: &EventError) -> IoThreadError {
        let name = Arc::clone(&self.name);
        match error {
            EventError::InvalidId => IoThreadError::UnknownWorker(name),
            _ => IoThreadError::Ended(name),
        }
    }
}

/// The workers of one device, on whatever threads. Dropping it takes them off.
#[derive(Debug, Default)]
pub struct WorkerSet(Vec<(IoHandle, WorkerId)>);

impl WorkerSet {
    /// Let the thread of `handle` serve `worker`.
    ///
    /// # Errors
    /// As [`IoHandle::add`].
    pub fn add(&mut self, handle: &IoHandle, worker: Box<dyn Worker>) -> Result<(), IoThreadError> {
        self.0.push((handle.clone(), handle.add(worker)?));
        Ok(())
    }

    /// Take all workers off their threads and give back their queues, in the order of [`Self::add`].
    /// Those of a thread that has ended are lost with it.
    pub fn take_queues(&mut self) -> Vec<ActiveQueue> {
        let workers = self.0.drain(..).filter_map(|(handle, id)| {
            handle.remove(id).inspect_err(|error| log::error!("taking back queues: {error}")).ok()
        });
        workers.flat_map(Worker::into_queues).collect()
    }
}

impl Drop for WorkerSet {
    fn drop(&mut self) {
        self.take_queues();
    }
}

#[cfg(test)]
mod tests;
