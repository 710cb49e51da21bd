// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! vCPU threads: each owns its vCPU, runs it or waits, and does what it is told at once.
//!
//! The control thread writes what it wants of a vCPU under the thread's lock and kicks it out of the guest;
//! the thread answers by a change of its own state. Nobody sleeps or polls.

use std::any::Any;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use parking_lot::{Condvar, Mutex};

use crate::hypervisor::{
    Exit, HypervisorError, IoHandler, ShutdownKind, Vcpu, VcpuKick, X86VcpuSetup,
};

/// What a vCPU reports on its own. It has left the guest and waits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VcpuEvent {
    /// The guest ended its run.
    Shutdown(ShutdownKind),
    /// The vCPU cannot go on; the text says why.
    Failed(String),
}

/// Who is told.
pub type VcpuListener = Arc<dyn Fn(u32, VcpuEvent) + Send + Sync>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Run,
    Pause,
    Exit,
}

#[derive(Debug)]
struct State {
    wanted: Wanted,
    /// Whether the thread may be inside the guest.
    running: bool,
    /// The vCPU has reported an event and does not go on by itself.
    stuck: bool,
    /// Apply this before running on.
    setup: Option<X86VcpuSetup>,
    kick: Option<Arc<dyn VcpuKick>>,
    thread_id: i32,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// A vCPU and its thread.
#[derive(Debug)]
pub struct VcpuThread {
    index: u32,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl VcpuThread {
    /// Start the thread of `vcpu`, paused. Events go to `listener`.
    ///
    /// # Errors
    /// The host refused the thread.
    pub fn spawn(
        index: u32,
        vcpu: Box<dyn Vcpu>,
        setup: X86VcpuSetup,
        io: Arc<dyn IoHandler + Send + Sync>,
        listener: VcpuListener,
    ) -> io::Result<Self> {
        let state = State {
            wanted: Wanted::Pause,
            running: false,
            stuck: false,
            setup: Some(setup),
            kick: None,
            thread_id: 0,
        };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let thread = thread::Builder::new().name(format!("ecr-vcpu{index}")).spawn({
            let shared = Arc::clone(&shared);
            move || {
                let run = AssertUnwindSafe(|| shared.run(index, vcpu, &*io, &listener));
                let failure = match catch_unwind(run) {
                    Ok(Ok(())) => return,
                    Ok(Err(error)) => error.to_string(),
                    Err(panic) => {
                        format!("the thread of vCPU {index} panicked: {}", panic_text(&*panic))
                    }
                };
                shared.retire();
                listener(index, VcpuEvent::Failed(failure));
            }
        })?;
        Ok(Self { index, shared, thread: Some(thread) })
    }

    /// Its number.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Its host thread; waits until the thread has begun.
    pub fn thread_id(&self) -> i32 {
        let mut state = self.shared.state.lock();
        while state.thread_id == 0 {
            self.shared.changed.wait(&mut state);
        }
        state.thread_id
    }

    /// Let it run.
    pub fn resume(&self) {
        self.want(Wanted::Run);
    }

    /// Ask it to leave the guest; [`Self::wait_paused`] waits until it has.
    pub fn pause(&self) {
        self.want(Wanted::Pause);
    }

    /// Wait until it is out of the guest.
    pub fn wait_paused(&self) {
        let mut state = self.shared.state.lock();
        while state.running {
            self.shared.changed.wait(&mut state);
        }
    }

    /// Go on from `setup` at the next resume. The vCPU must be paused.
    pub fn reset(&self, setup: X86VcpuSetup) {
        let mut state = self.shared.state.lock();
        state.setup = Some(setup);
        state.stuck = false;
    }

    fn want(&self, wanted: Wanted) {
        let mut state = self.shared.state.lock();
        state.wanted = wanted;
        if let (true, Some(kick)) = (state.running, &state.kick) {
            kick.kick();
        }
        self.shared.changed.notify_all();
    }
}

impl Drop for VcpuThread {
    fn drop(&mut self) {
        self.want(Wanted::Exit);
        if let Some(thread) = self.thread.take() {
            // Panics were caught and reported.
            let _ = thread.join();
        }
    }
}

impl Shared {
    /// The thread's whole life.
    fn run(
        &self,
        index: u32,
        mut vcpu: Box<dyn Vcpu>,
        io: &dyn IoHandler,
        listener: &VcpuListener,
    ) -> Result<(), HypervisorError> {
        let kick = vcpu.bind_to_thread()?;
        {
            let mut state = self.state.lock();
            state.kick = Some(kick);
            // SAFETY: gettid only returns a number.
            state.thread_id = unsafe { libc::gettid() };
            self.changed.notify_all();
        }
        while self.wait_for_work(&mut *vcpu)? {
            let event = match vcpu.run(io) {
                Exit::Interrupted => continue,
                Exit::Halted => VcpuEvent::Failed(format!(
                    "vCPU {index} halted and no interrupt controller can wake it"
                )),
                Exit::Shutdown(kind) => VcpuEvent::Shutdown(kind),
                Exit::Failed(text) => VcpuEvent::Failed(text),
            };
            self.state.lock().stuck = true;
            listener(index, event);
        }
        Ok(())
    }

    /// Wait until the vCPU shall run; `false` means that the thread shall end.
    fn wait_for_work(&self, vcpu: &mut dyn Vcpu) -> Result<bool, HypervisorError> {
        let mut state = self.state.lock();
        loop {
            match state.wanted {
                Wanted::Exit => {
                    drop(state);
                    self.retire();
                    return Ok(false);
                }
                Wanted::Run if !state.stuck => {
                    if let Some(setup) = state.setup.take() {
                        vcpu.setup_x86(&setup)?;
                    }
                    state.running = true;
                    return Ok(true);
                }
                Wanted::Run | Wanted::Pause => {
                    if state.running {
                        state.running = false;
                        self.changed.notify_all();
                    }
                    self.changed.wait(&mut state);
                }
            }
        }
    }

    /// The thread ends: nobody may kick it any more.
    fn retire(&self) {
        let mut state = self.state.lock();
        state.kick = None;
        state.running = false;
        self.changed.notify_all();
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}
