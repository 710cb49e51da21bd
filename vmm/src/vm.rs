// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Start a VM, and the control thread that owns it from then on.
//!
//! The thread `ecr-ctl` builds the machine, answers [`Command`]s, listens to what vCPUs and devices
//! report, and takes everything down again. Nobody else touches the machine.

use std::any::Any;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::SystemTime;

use ecr_arch::boot::BootError;
use ecr_devices::backend::unix_socket::UnixSocket;
use ecr_devices::chipset::GuestRequest;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::boot::BootImageError;
use crate::config::{ConfigError, ResetAction, VmConfig};
use crate::control::{
    Command, CommandError, DeviceConfig, Event, EventKind, PciPath, Reply, RunState, ShutdownReason,
};
use crate::handle::{Mailbox, Message, Outcome, VmHandle};
use crate::hypervisor::{Hypervisor, HypervisorError, ShutdownKind};
use crate::machine::Machine;
use crate::qmp;
use crate::vcpu::VcpuEvent;

/// What a VM is started with besides its configuration.
#[derive(Debug)]
pub struct VmOptions {
    /// What runs the guest.
    pub hypervisor: Arc<dyn Hypervisor>,
    /// Where to listen for QMP clients.
    pub qmp: Option<PathBuf>,
    /// Do not let the vCPUs run until [`Command::Cont`].
    pub paused: bool,
}

/// Why a VM could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The configuration cannot work; nothing was created.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The kernel or the initial RAM disk cannot be read.
    #[error(transparent)]
    Boot(#[from] BootImageError),
    /// The kernel is no kernel, or does not fit.
    #[error("boot {path}: {source}", path = path.display())]
    Kernel {
        /// The kernel.
        path: PathBuf,
        /// Why it cannot be booted.
        source: BootError,
    },
    /// The hypervisor refused.
    #[error(transparent)]
    Hypervisor(#[from] HypervisorError),
    /// A part of the machine cannot be built; the text says which, and why.
    #[error("{0}")]
    Machine(String),
    /// The host refused a resource.
    #[error("{attempted}: {source}")]
    Host {
        /// What was attempted.
        attempted: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

/// Build the machine that `config` describes and let it run.
///
/// # Errors
/// Nothing is left of the VM then.
pub fn start(config: VmConfig, options: VmOptions) -> Result<VmHandle, StartError> {
    config.validate()?;
    let host = |attempted| move |source| StartError::Host { attempted, source };
    let (mailbox, messages) = Mailbox::new().map_err(host("create the control mailbox"))?;
    let outcome = Arc::new(Outcome::new().map_err(host("create the exit event"))?);
    let (started, ready) = mpsc::channel();
    let thread = thread::Builder::new()
        .name("ecr-ctl".into())
        .spawn({
            let (mailbox, outcome) = (Arc::clone(&mailbox), Arc::clone(&outcome));
            move || {
                let control = || {
                    let shown = Arc::clone(&outcome);
                    match Control::build(config, options, mailbox, messages, shown) {
                        Ok(control) => {
                            // The caller waits for it.
                            let _ = started.send(Ok(()));
                            control.run()
                        }
                        Err(error) => {
                            let _ = started.send(Err(error));
                            ShutdownReason::HostQuit
                        }
                    }
                };
                let reason = catch_unwind(AssertUnwindSafe(control))
                    .unwrap_or_else(|panic| ShutdownReason::Failed(panic_text(&*panic)));
                outcome.set(reason);
            }
        })
        .map_err(host("spawn the control thread"))?;
    let handle = VmHandle::new(mailbox, outcome, thread);
    match ready.recv() {
        Ok(Ok(())) => Ok(handle),
        Ok(Err(error)) => Err(error),
        // The thread panicked before it could say anything: its outcome holds the text.
        Err(mpsc::RecvError) => Err(StartError::Machine(match handle.wait() {
            ShutdownReason::Failed(text) => text,
            other => format!("the control thread ended early: {other:?}"),
        })),
    }
}

/// What a panic said.
fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message");
    format!("the control thread panicked: {text}")
}

/// The control thread's state.
struct Control {
    machine: Machine,
    run_state: RunState,
    on_reset: ResetAction,
    ended: Option<ShutdownReason>,
    mailbox: Arc<Mailbox>,
    messages: mpsc::Receiver<Message>,
    subscribers: Vec<mpsc::Sender<Event>>,
    /// Events that QMP clients have not been told yet.
    unsent: Vec<Event>,
    qmp: Option<qmp::Server>,
    epoll: Epoll,
    outcome: Arc<Outcome>,
}

/// What the control thread waits for.
const MAILBOX: u64 = 0;
const QMP: u64 = 1;

impl Control {
    fn build(
        config: VmConfig,
        options: VmOptions,
        mailbox: Arc<Mailbox>,
        messages: mpsc::Receiver<Message>,
        outcome: Arc<Outcome>,
    ) -> Result<Self, StartError> {
        let host = |source| StartError::Host { attempted: "wait for events", source };
        let socket = options.qmp.as_deref().map(UnixSocket::bind).transpose();
        let socket =
            socket.map_err(|e| StartError::Machine(format!("listen for QMP clients: {e}")))?;
        let qmp = socket.map(qmp::Server::new).transpose().map_err(host)?;
        let epoll = Epoll::new().map_err(host)?;
        let watch = |fd: RawFd, token| {
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, token)).map_err(host)
        };
        watch(mailbox.as_raw_fd(), MAILBOX)?;
        if let Some(qmp) = &qmp {
            watch(qmp.as_raw_fd(), QMP)?;
        }
        let on_reset = config.on_reset;
        let machine = Machine::build(config, options.hypervisor, &mailbox)?;
        let mut control = Self {
            machine,
            run_state: RunState::Prelaunch,
            on_reset,
            ended: None,
            mailbox,
            messages,
            subscribers: Vec::new(),
            unsent: Vec::new(),
            qmp,
            epoll,
            outcome,
        };
        if !options.paused {
            control.run_state = RunState::Running;
            control.machine.resume();
            log::debug!("vCPUs run");
        }
        Ok(control)
    }

    /// Serve until the VM ends.
    fn run(mut self) -> ShutdownReason {
        let mut ready = [EpollEvent::default(); 4];
        loop {
            if let Some(reason) = self.ended.take() {
                return self.end(reason);
            }
            let count = match self.epoll.wait(-1, &mut ready) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    return self.end(ShutdownReason::Failed(format!("wait for events: {error}")));
                }
            };
            for event in &ready[..count] {
                match event.data() {
                    MAILBOX => self.read_mailbox(),
                    _ => self.with_qmp(qmp::Server::dispatch),
                }
            }
        }
    }

    /// Lend this thread to the QMP server.
    fn with_qmp(&mut self, call: impl FnOnce(&mut qmp::Server, &mut dyn qmp::Controller)) {
        if let Some(mut server) = self.qmp.take() {
            call(&mut server, self);
            self.qmp = Some(server);
        }
    }

    /// Tell QMP clients what has happened.
    fn tell_qmp(&mut self) {
        let events = std::mem::take(&mut self.unsent);
        if let Some(server) = &mut self.qmp {
            server.broadcast(&events);
        }
    }

    fn read_mailbox(&mut self) {
        self.mailbox.clear_wake();
        for request in self.mailbox.take_requests() {
            self.guest_asks(request);
        }
        while let Ok(message) = self.messages.try_recv() {
            match message {
                Message::Request(command, answer) => {
                    // Nobody may wait for it any more.
                    let _ = answer.send(self.execute(command));
                }
                Message::Subscribe(subscriber) => self.subscribers.push(subscriber),
                Message::Vcpu(index, event) => self.vcpu_stopped(index, event),
                Message::BackendLost(id) => self.emit(EventKind::BackendLost { id }),
                Message::Failed(text) => self.fail(text),
            }
        }
        self.tell_qmp();
    }

    fn guest_asks(&mut self, request: GuestRequest) {
        log::debug!("the guest asks: {request:?}");
        match request {
            GuestRequest::TakeEjected => {
                let gone = self.machine.take_ejected();
                self.devices_gone(gone);
            }
            GuestRequest::PowerOff => self.shut_down(ShutdownReason::GuestShutdown),
            GuestRequest::Reset if self.on_reset == ResetAction::Shutdown => {
                self.shut_down(ShutdownReason::GuestReset);
            }
            GuestRequest::Reset => self.reset(true),
            // The guest goes on to write its dump, and then resets.
            GuestRequest::CrashLoaded => self.emit(EventKind::GuestCrashLoaded),
            GuestRequest::Panicked => {
                self.machine.pause();
                self.run_state = RunState::GuestPanicked;
                self.emit(EventKind::GuestPanicked);
                self.shut_down(ShutdownReason::GuestPanic);
            }
        }
    }

    fn vcpu_stopped(&mut self, index: u32, event: VcpuEvent) {
        match event {
            VcpuEvent::Shutdown(ShutdownKind::PowerOff) => self.guest_asks(GuestRequest::PowerOff),
            VcpuEvent::Shutdown(ShutdownKind::Reset) => self.guest_asks(GuestRequest::Reset),
            VcpuEvent::Shutdown(ShutdownKind::TripleFault) => {
                self.fail(format!("the guest triple-faulted on vCPU {index}"));
            }
            VcpuEvent::Failed(text) => self.fail(text),
        }
    }

    /// The VM cannot go on. The reason is told with what the guest said last.
    fn fail(&mut self, text: String) {
        self.machine.pause();
        self.run_state = RunState::InternalError;
        let output = self.machine.last_output();
        let reason = if output.is_empty() {
            text
        } else {
            format!("{text}; the guest's last output was:\n{output}")
        };
        self.shut_down(ShutdownReason::Failed(reason));
    }

    /// Only the first reason counts.
    fn shut_down(&mut self, reason: ShutdownReason) {
        self.ended.get_or_insert(reason);
    }

    fn reset(&mut self, guest: bool) {
        self.machine.pause();
        // What the guest asked for before the reset is void.
        self.mailbox.take_requests().for_each(drop);
        match self.machine.reset() {
            Ok(gone) => {
                self.devices_gone(gone);
                self.emit(EventKind::Reset { guest });
                if self.run_state == RunState::Running {
                    self.machine.resume();
                }
            }
            Err(error) => self.fail(format!("reset the machine: {error}")),
        }
    }

    fn devices_gone(&mut self, ids: Vec<String>) {
        ids.into_iter().for_each(|id| self.emit(EventKind::DeviceDeleted { id }));
    }

    fn emit(&mut self, kind: EventKind) {
        let event = Event { time: SystemTime::now(), kind };
        self.subscribers.retain(|subscriber| subscriber.send(event.clone()).is_ok());
        // Not only where `qmp` is there: while the server carries out a command, it is lent.
        self.unsent.push(event);
    }

    /// Take everything down; only then tell those who wait.
    fn end(mut self, reason: ShutdownReason) -> ShutdownReason {
        self.machine.pause();
        if self.run_state != RunState::InternalError && self.run_state != RunState::GuestPanicked {
            self.run_state = RunState::Shutdown;
        }
        self.emit(EventKind::Shutdown(reason.clone()));
        self.tell_qmp();
        self.outcome.set_last_output(self.machine.last_output());
        reason
    }
}

impl qmp::Controller for Control {
    fn execute(&mut self, command: Command) -> Result<Reply, CommandError> {
        Self::execute(self, command)
    }

    fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.unsent)
    }
}

impl Control {
    fn execute(&mut self, command: Command) -> Result<Reply, CommandError> {
        match command {
            Command::Stop => self.stop(),
            Command::Cont => self.cont()?,
            Command::Reset => self.reset(false),
            Command::Powerdown => {
                self.machine.press_power_button();
                self.emit(EventKind::Powerdown);
            }
            Command::Quit => self.shut_down(ShutdownReason::HostQuit),
            Command::AddDisk(disk) => return self.add_device(DeviceConfig::Disk(disk), None),
            Command::AddNet(net) => return self.add_device(DeviceConfig::Net(net), None),
            Command::AddDevice { device, path } => return self.add_device(device, Some(path)),
            Command::RemoveDevice { id } => self.machine.remove_device(&id)?,
            Command::QueryStatus => return Ok(Reply::Status(self.run_state)),
            Command::QueryMachine => return Ok(Reply::Machine(self.machine.kind())),
            Command::QueryIdentity => return Ok(Reply::Identity(self.machine.identity())),
            Command::QueryCpus => return Ok(Reply::Cpus(self.machine.cpus())),
            Command::QueryMemory => return Ok(Reply::Memory(self.machine.memory())),
            Command::QueryChardevs => return Ok(Reply::Chardevs(self.machine.chardevs())),
            Command::QueryBlock => return Ok(Reply::Block(self.machine.blocks())),
            Command::QueryPci => return Ok(Reply::Pci(self.machine.pci())),
            Command::QueryIoThreads => return Ok(Reply::IoThreads(self.machine.io_threads())),
            Command::QueryLastOutput => return Ok(Reply::LastOutput(self.machine.last_output())),
        }
        Ok(Reply::Done)
    }

    fn add_device(
        &mut self,
        device: DeviceConfig,
        path: Option<PciPath>,
    ) -> Result<Reply, CommandError> {
        self.machine.add_device(device, path).map(|path| Reply::Plugged { path })
    }

    fn stop(&mut self) {
        if self.run_state == RunState::Running {
            self.machine.pause();
            self.run_state = RunState::Paused;
            self.emit(EventKind::Stop);
        }
    }

    fn cont(&mut self) -> Result<(), CommandError> {
        match self.run_state {
            RunState::Prelaunch | RunState::Paused => {
                self.run_state = RunState::Running;
                self.machine.resume();
                self.emit(EventKind::Resume);
                Ok(())
            }
            RunState::Running => Ok(()),
            RunState::GuestPanicked | RunState::Shutdown | RunState::InternalError => {
                Err(CommandError::WrongState("Resetting the Virtual Machine is required".into()))
            }
        }
    }
}
