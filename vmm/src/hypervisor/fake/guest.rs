// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The guest's side: programs, and the vCPUs that run them.
//!
//! A program has a thread of its own, which gets on only while its vCPU is inside [`Vcpu::run`]: every
//! method of [`GuestCpu`] waits for that first. So a paused vCPU does nothing, a kick ends `run` wherever the
//! program stands, and a program is written straight down.

use std::any::Any;
use std::fmt;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use ecr_devices::irq::MsiMessage;
use parking_lot::MutexGuard;

use super::super::{
    Exit, HypervisorError, IoHandler, Result, Vcpu, VcpuFacts, VcpuKick, VcpuSetup,
};
use super::{Shared, State};

/// Widest access to a device, in bytes.
const WIDEST: usize = 8;

type Code = dyn Fn(&GuestCpu) -> Exit + Send + Sync;

/// What a vCPU runs. It may block in the methods of [`GuestCpu`] only; when it returns, so does
/// [`Vcpu::run`]. A panic makes the vCPU fail with the panic's text.
#[derive(Clone)]
pub struct GuestProgram(Arc<Code>);

impl fmt::Debug for GuestProgram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("GuestProgram")
    }
}

impl GuestProgram {
    pub(super) fn new(code: impl Fn(&GuestCpu) -> Exit + Send + Sync + 'static) -> Self {
        Self(Arc::new(code))
    }
}

/// A vCPU as the shared state knows it.
#[derive(Default)]
pub(super) struct CpuState {
    /// Inside [`Vcpu::run`]: the program may get on.
    running: bool,
    kicked: bool,
    /// The program shall end.
    stopped: bool,
    access: Option<Access>,
    exit: Option<Exit>,
}

/// An access to a device, on its way to the vCPU's thread and back.
enum Access {
    Asked(Request),
    Answered([u8; WIDEST]),
}

/// What an access does.
#[derive(Clone, Copy)]
enum Operation {
    Read,
    Write,
    PortRead,
    PortWrite,
}

#[derive(Clone, Copy)]
struct Request {
    operation: Operation,
    address: u64,
    len: usize,
    data: [u8; WIDEST],
}

impl Request {
    /// Panics, and so fails the vCPU, where the program accesses more than a processor would.
    fn new(operation: Operation, address: u64, bytes: &[u8]) -> Self {
        let len = bytes.len();
        assert!((1..=WIDEST).contains(&len), "access of {len} bytes to a device at {address:#x}");
        let mut data = [0; WIDEST];
        data[..len].copy_from_slice(bytes);
        Self { operation, address, len, data }
    }

    /// Let `io` answer it.
    fn perform(mut self, io: &dyn IoHandler) -> [u8; WIDEST] {
        let data = &mut self.data[..self.len];
        match self.operation {
            Operation::Read => io.mmio_read(self.address, data),
            Operation::Write => io.mmio_write(self.address, data),
            Operation::PortRead => io.pio_read(self.address as u16, data),
            Operation::PortWrite => io.pio_write(self.address as u16, data),
        }
        self.data
    }
}

/// What unwinds a program whose vCPU was reset or dropped.
struct Stopped;

/// The processor as its program sees it.
pub struct GuestCpu {
    id: u32,
    shared: Arc<Shared>,
}

impl fmt::Debug for GuestCpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GuestCpu({})", self.id)
    }
}

impl GuestCpu {
    /// Its number.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Read memory at `address`, or up to 8 bytes from the device there.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        let state = self.step();
        if let Some((_, memory)) = state.memory(address, data.len()) {
            memory.copy_to(data);
        } else {
            self.ask(state, Operation::Read, address, data);
        }
    }

    /// Write memory at `address`, or up to 8 bytes to the doorbell or the device there.
    pub fn write(&self, address: u64, data: &[u8]) {
        let state = self.step();
        let memory = state.memory(address, data.len()).filter(|(slot, _)| !slot.read_only);
        if let Some((_, memory)) = memory {
            memory.copy_from(data);
        } else if let Some(doorbell) = state.doorbells.get(&address) {
            // Fails only where the counter is full, and then the reader is awake anyway.
            let _ = doorbell.write(1);
        } else {
            let mut data = data.to_vec();
            self.ask(state, Operation::Write, address, &mut data);
        }
    }

    /// Read 32 bits from memory, or from the device there.
    pub fn read_u32(&self, address: u64) -> u32 {
        let mut data = [0; 4];
        self.read(address, &mut data);
        u32::from_le_bytes(data)
    }

    /// Write 32 bits to memory, or to the device there.
    pub fn write_u32(&self, address: u64, value: u32) {
        self.write(address, &value.to_le_bytes());
    }

    /// Read `data.len()` bytes from an I/O port.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        self.ask(self.step(), Operation::PortRead, port.into(), data);
    }

    /// Write to an I/O port.
    pub fn port_write(&self, port: u16, data: &[u8]) {
        self.ask(self.step(), Operation::PortWrite, port.into(), &mut data.to_vec());
    }

    /// Wait until the interrupt controller's input `gsi` is high.
    pub fn wait_for_line(&self, gsi: u32) {
        drop(self.wait(|state| state.lines.get(&gsi)?.high.then_some(())));
    }

    /// Wait until input `gsi` goes, or has gone, from low to high, and take that edge.
    pub fn wait_for_edge(&self, gsi: u32) {
        drop(self.wait(|state| {
            let line = state.lines.get_mut(&gsi)?;
            line.pending = line.pending.checked_sub(1)?;
            Some(())
        }));
    }

    /// Wait for a message with `data`, and take it.
    pub fn wait_for_message(&self, data: u32) -> MsiMessage {
        let (_, message) = self.wait(|state| {
            let at = state.pending.iter().position(|message| message.data == data)?;
            Some(state.pending.remove(at))
        });
        message
    }

    /// Do nothing any more.
    pub fn halt(&self) -> ! {
        loop {
            drop(self.wait(|_| None::<()>));
        }
    }

    /// Wait until the program may get on.
    fn step(&self) -> MutexGuard<'_, State> {
        self.wait(|_| Some(())).0
    }

    /// Wait until the program may get on and `ready` yields something.
    fn wait<T>(&self, ready: impl Fn(&mut State) -> Option<T>) -> (MutexGuard<'_, State>, T) {
        let mut state = self.shared.state.lock();
        loop {
            let (running, stopped) = {
                let cpu = state.cpu(self.id);
                (cpu.running, cpu.stopped)
            };
            if stopped {
                drop(state);
                // The message of a panic would be noise.
                resume_unwind(Box::new(Stopped));
            }
            if running && let Some(found) = ready(&mut state) {
                return (state, found);
            }
            self.shared.changed.wait(&mut state);
        }
    }

    /// Have the vCPU's thread carry out an access; `data` is what is written, then what was read.
    fn ask(
        &self,
        mut state: MutexGuard<'_, State>,
        operation: Operation,
        address: u64,
        data: &mut [u8],
    ) {
        let request = Request::new(operation, address, data);
        state.cpu(self.id).access = Some(Access::Asked(request));
        self.shared.changed.notify_all();
        drop(state);
        let (_, answer) = self.wait(|state| match state.cpu(self.id).access {
            Some(Access::Answered(answer)) => Some(answer),
            _ => None,
        });
        data.copy_from_slice(&answer[..data.len()]);
    }
}

/// A vCPU.
#[derive(Debug)]
pub(super) struct FakeVcpu {
    id: u32,
    program: Option<GuestProgram>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl FakeVcpu {
    pub(super) fn new(id: u32, program: Option<GuestProgram>, shared: Arc<Shared>) -> Self {
        Self { id, program, shared, thread: None }
    }

    /// End the program, wherever it stands.
    fn stop(&mut self) {
        self.shared.state.lock().cpu(self.id).stopped = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // Its panics were caught.
            let _ = thread.join();
        }
    }

    fn start(&mut self) -> io::Result<()> {
        let Some(program) = self.program.clone() else { return Ok(()) };
        let cpu = GuestCpu { id: self.id, shared: Arc::clone(&self.shared) };
        let thread =
            thread::Builder::new().name(format!("guest-cpu{}", self.id)).spawn(move || {
                let exit = match catch_unwind(AssertUnwindSafe(|| (program.0)(&cpu))) {
                    Ok(exit) => exit,
                    Err(panic) if panic.is::<Stopped>() => return,
                    Err(panic) => {
                        Exit::Failed(format!("the guest program panicked: {}", text(&*panic)))
                    }
                };
                cpu.shared.state.lock().cpu(cpu.id).exit = Some(exit);
                cpu.shared.changed.notify_all();
            })?;
        self.thread = Some(thread);
        Ok(())
    }
}

fn text(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}

impl Drop for FakeVcpu {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Vcpu for FakeVcpu {
    fn facts(&self) -> Result<VcpuFacts> {
        // All page sizes.
        Ok(VcpuFacts { tsc_khz: None, mmfr0: 1 << 20 })
    }

    fn setup(&mut self, _setup: &VcpuSetup) -> Result<()> {
        self.stop();
        // A kick that is under way stays under way.
        let mut state = self.shared.state.lock();
        let kicked = state.cpu(self.id).kicked;
        *state.cpu(self.id) = CpuState { kicked, ..CpuState::default() };
        drop(state);
        self.start().map_err(|source| HypervisorError {
            attempted: format!("start the program of vCPU {}", self.id),
            source,
        })
    }

    fn bind_to_thread(&mut self) -> Result<Arc<dyn VcpuKick>> {
        Ok(Arc::new(Kick { id: self.id, shared: Arc::clone(&self.shared) }))
    }

    fn note_pause(&mut self) {}

    fn run(&mut self, io: &dyn IoHandler) -> Exit {
        let mut state = self.shared.state.lock();
        state.cpu(self.id).running = true;
        self.shared.changed.notify_all();
        let exit = loop {
            let cpu = state.cpu(self.id);
            if std::mem::take(&mut cpu.kicked) {
                break Exit::Interrupted;
            }
            if let Some(exit) = cpu.exit.take() {
                break exit;
            }
            if let Some(Access::Asked(request)) = cpu.access {
                let answer = MutexGuard::unlocked(&mut state, || request.perform(io));
                state.cpu(self.id).access = Some(Access::Answered(answer));
                self.shared.changed.notify_all();
            } else {
                self.shared.changed.wait(&mut state);
            }
        };
        state.cpu(self.id).running = false;
        exit
    }
}

#[derive(Debug)]
struct Kick {
    id: u32,
    shared: Arc<Shared>,
}

impl VcpuKick for Kick {
    fn kick(&self) {
        self.shared.state.lock().cpu(self.id).kicked = true;
        self.shared.changed.notify_all();
    }
}
