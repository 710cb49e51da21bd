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
    Exit, HypervisorError, IoHandler, ShutdownKind, Vcpu, VcpuKick, VcpuSetup,
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

/// Where the thread is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Out of the guest.
    Waiting,
    /// Perhaps inside the guest.
    Running,
    /// Nowhere: it does nothing any more.
    Ended,
}

#[derive(Debug)]
struct State {
    wanted: Wanted,
    phase: Phase,
    /// The vCPU has reported an event and does not go on by itself.
    stuck: bool,
    /// Apply this as soon as the vCPU is out of the guest.
    setup: Option<VcpuSetup>,
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
        setup: VcpuSetup,
        io: Arc<dyn IoHandler + Send + Sync>,
        listener: VcpuListener,
    ) -> io::Result<Self> {
        let state = State {
            wanted: Wanted::Pause,
            phase: Phase::Waiting,
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

    /// Wait until it is out of the guest, and ready to run. Resume vCPUs only when all of them are ready: one
    /// that runs may start those that wait for INIT and SIPI.
    pub fn wait_paused(&self) {
        let mut state = self.shared.state.lock();
        while state.phase == Phase::Running || state.setup.is_some() {
            self.shared.changed.wait(&mut state);
        }
    }

    /// Go on from `setup` at the next resume. The vCPU must be paused; [`Self::wait_paused`] waits until it
    /// has taken the new state.
    pub fn reset(&self, setup: VcpuSetup) {
        let mut state = self.shared.state.lock();
        if state.phase == Phase::Ended {
            return;
        }
        state.setup = Some(setup);
        state.stuck = false;
        self.shared.changed.notify_all();
    }

    fn want(&self, wanted: Wanted) {
        let mut state = self.shared.state.lock();
        state.wanted = wanted;
        if let (Phase::Running, Some(kick)) = (state.phase, &state.kick) {
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
        // SAFETY: gettid only returns a number.
        self.state.lock().thread_id = unsafe { libc::gettid() };
        self.changed.notify_all();
        self.state.lock().kick = Some(vcpu.bind_to_thread()?);
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
            if state.wanted == Wanted::Exit {
                drop(state);
                self.retire();
                return Ok(false);
            }
            if let Some(setup) = &state.setup {
                vcpu.setup(setup)?;
                state.setup = None;
                self.changed.notify_all();
            }
            if state.wanted == Wanted::Run && !state.stuck {
                state.phase = Phase::Running;
                return Ok(true);
            }
            if state.phase == Phase::Running {
                vcpu.note_pause();
                state.phase = Phase::Waiting;
                self.changed.notify_all();
            }
            self.changed.wait(&mut state);
        }
    }

    /// The thread ends: nobody may kick it any more, or wait for it.
    fn retire(&self) {
        let mut state = self.state.lock();
        state.kick = None;
        state.setup = None;
        state.phase = Phase::Ended;
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

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;
    use crate::hypervisor::Hypervisor;
    use crate::hypervisor::fake::{Fake, GuestCpu};

    /// Tells what is written; reads are zero.
    struct Writes(mpsc::Sender<u64>);

    impl IoHandler for Writes {
        fn mmio_read(&self, _address: u64, data: &mut [u8]) {
            data.fill(0);
        }
        fn mmio_write(&self, address: u64, _data: &[u8]) {
            assert_ne!(address, POISON, "a device's own mistake");
            self.0.send(address).unwrap();
        }
        fn pio_read(&self, _port: u16, _data: &mut [u8]) {}
        fn pio_write(&self, _port: u16, _data: &[u8]) {}
    }

    const POISON: u64 = 0xdead;

    fn setup() -> VcpuSetup {
        VcpuSetup::Arm(None)
    }

    type Events = mpsc::Receiver<(u32, VcpuEvent)>;

    fn spawn(
        program: impl Fn(&GuestCpu) -> Exit + Send + Sync + 'static,
    ) -> (VcpuThread, mpsc::Receiver<u64>, Events) {
        let fake = Fake::new().with_program(0, program);
        let vcpu = fake.create_vm(36).unwrap().create_vcpu(0).unwrap();
        let (writes, written) = mpsc::channel();
        let (events, told) = mpsc::channel();
        let listener = Arc::new(move |index, event| events.send((index, event)).unwrap());
        let io = Arc::new(Writes(writes));
        (VcpuThread::spawn(0, vcpu, setup(), io, listener).unwrap(), written, told)
    }

    fn count(cpu: &GuestCpu) -> Exit {
        let mut n = 0;
        loop {
            n += 1;
            cpu.write_u32(n, 0);
        }
    }

    #[test]
    fn it_starts_paused_and_a_paused_one_does_nothing() {
        let (vcpu, written, _events) = spawn(count);
        vcpu.wait_paused();
        assert!(written.try_recv().is_err());
        let mut next = 1;
        for _ in 0..200 {
            vcpu.resume();
            assert_eq!(written.recv().unwrap(), next);
            vcpu.pause();
            vcpu.wait_paused();
            next += 1 + written.try_iter().count() as u64;
        }
        assert!(written.try_recv().is_err());
    }

    #[test]
    fn it_knows_its_thread() {
        let (vcpu, ..) = spawn(|cpu| cpu.halt());
        let name = format!("/proc/self/task/{}/comm", vcpu.thread_id());
        assert_eq!(std::fs::read_to_string(name).unwrap(), "ecr-vcpu0\n");
    }

    #[test]
    fn it_ends_from_every_state() {
        drop(spawn(count));
        let (vcpu, written, _events) = spawn(count);
        vcpu.resume();
        written.recv().unwrap();
        drop(vcpu);
        // The thread is gone, and its end of the channel with it.
        while written.recv().is_ok() {}
        let (vcpu, _written, events) = spawn(|_| Exit::Shutdown(ShutdownKind::TripleFault));
        vcpu.resume();
        events.recv().unwrap();
        drop(vcpu);
    }

    #[test]
    fn an_event_is_told_once_and_a_reset_starts_again() {
        let (vcpu, written, events) = spawn(|cpu| {
            cpu.write_u32(1, 0);
            Exit::Shutdown(ShutdownKind::TripleFault)
        });
        for _ in 0..3 {
            vcpu.resume();
            let event = VcpuEvent::Shutdown(ShutdownKind::TripleFault);
            assert_eq!(events.recv().unwrap(), (0, event));
            vcpu.resume();
            vcpu.pause();
            vcpu.wait_paused();
            vcpu.reset(setup());
            vcpu.wait_paused();
            assert!(events.try_recv().is_err());
            assert_eq!(written.try_iter().count(), 1);
        }
    }

    #[test]
    fn a_panic_becomes_an_event() {
        let (vcpu, _written, events) = spawn(|cpu| {
            cpu.write_u32(POISON, 0);
            cpu.halt()
        });
        vcpu.resume();
        let (_, event) = events.recv().unwrap();
        let VcpuEvent::Failed(text) = event else { panic!("{event:?}") };
        assert!(text.contains("a device's own mistake"), "{text}");
        // Nobody waits for ever for a thread that has ended.
        vcpu.reset(setup());
        vcpu.pause();
        vcpu.wait_paused();
    }
}
