// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! A server in a thread of its own, with a machine behind it that runs, stops and ends as told.

use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::SystemTime;

use ecr_devices::backend::unix_socket::UnixSocket;
use ecr_vmm::config::MachineType;
use ecr_vmm::control::{
    BlockInfo, ChardevInfo, Command, CommandError, CpuInfo, Event, EventKind, Identity,
    IoThreadInfo, MachineInfo, MemoryInfo, NvdimmInfo, PciBarInfo, PciInfo, PciPath, Reply,
    RunState, ShutdownReason,
};
use ecr_vmm::qmp::{Controller, Server};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

/// What the machine does, besides answering.
struct Machine {
    state: RunState,
    events: Vec<Event>,
    ended: bool,
}

impl Machine {
    fn emit(&mut self, kind: EventKind) {
        self.events.push(Event { time: SystemTime::now(), kind });
    }
}

impl Controller for Machine {
    fn execute(&mut self, command: Command) -> Result<Reply, CommandError> {
        match command {
            Command::Stop => {
                if self.state == RunState::Running {
                    self.emit(EventKind::Stop);
                }
                self.state = RunState::Paused;
            }
            Command::Cont => {
                self.state = RunState::Running;
                self.emit(EventKind::Resume);
            }
            Command::Reset => self.emit(EventKind::Reset { guest: false }),
            Command::Powerdown => {
                if self.state != RunState::Running {
                    return Err(CommandError::WrongState("nobody hears the button".into()));
                }
                self.emit(EventKind::Powerdown);
            }
            Command::Quit => {
                self.emit(EventKind::Shutdown(ShutdownReason::HostQuit));
                self.ended = true;
            }
            query => return Ok(answer(&query, self.state)),
        }
        Ok(Reply::Done)
    }

    fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }
}

fn answer(query: &Command, state: RunState) -> Reply {
    match query {
        Command::QueryIdentity => {
            Reply::Identity(Identity { name: Some("scripted".into()), uuid: uuid::Uuid::nil() })
        }
        Command::QueryMachine => {
            Reply::Machine(MachineInfo { kind: MachineType::Q35, max_cpus: 4, accelerated: false })
        }
        Command::QueryCpus => {
            Reply::Cpus(vec![CpuInfo { index: 0, thread_id: 4711, socket: 0, core: 0, thread: 0 }])
        }
        Command::QueryMemory => Reply::Memory(MemoryInfo {
            base: 512 << 20,
            plugged: 0,
            nvdimms: vec![NvdimmInfo {
                id: "image".into(),
                address: 4 << 30,
                size: 128 << 20,
                path: PathBuf::from("rootfs.img"),
            }],
        }),
        Command::QueryChardevs => Reply::Chardevs(vec![ChardevInfo {
            label: "console0".into(),
            filename: "null".into(),
            open: true,
        }]),
        Command::QueryBlock => Reply::Block(vec![BlockInfo {
            id: "disk0".into(),
            path: PathBuf::from("disk.img"),
            size: 1 << 30,
            readonly: false,
            direct: false,
        }]),
        Command::QueryPci => Reply::Pci(vec![PciInfo {
            bus: 0,
            path: PciPath { bridge: None, slot: 3 },
            slot: 3,
            function: 0,
            id: "disk0".into(),
            vendor: 0x1AF4,
            device: 0x1042,
            subsystem: 0x1100,
            subsystem_vendor: 0x1AF4,
            class: 0x0180,
            irq_pin: 1,
            irq: 11,
            bars: vec![PciBarInfo {
                index: 0,
                io: false,
                prefetch: false,
                wide: true,
                address: 0xC000_0000,
                size: 0x4000,
            }],
            bridge: None,
        }]),
        Command::QueryIoThreads => {
            Reply::IoThreads(vec![IoThreadInfo { id: "io0".into(), thread_id: 4712 }])
        }
        _ => Reply::Status(state),
    }
}

/// A server and the thread that polls it. Dropping it ends both.
pub struct Running {
    _dir: tempfile::TempDir,
    socket: PathBuf,
    tell: mpsc::Sender<EventKind>,
    wake: EventFd,
    thread: Option<JoinHandle<()>>,
}

const SERVER: u64 = 0;
const WAKE: u64 = 1;

impl Running {
    /// A machine that has not been started yet.
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("qmp.sock");
        let server = Server::new(UnixSocket::bind(&socket).unwrap()).unwrap();
        let (tell, told) = mpsc::channel();
        let wake = EventFd::new(0).unwrap();
        let woken = wake.try_clone().unwrap();
        let thread = std::thread::spawn(move || poll(server, &told, &woken));
        Self { _dir: dir, socket, tell, wake, thread: Some(thread) }
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Let something happen.
    pub fn happen(&self, kind: EventKind) {
        self.tell.send(kind).unwrap();
        self.wake.write(1).unwrap();
    }

    /// Wait until the machine was told to quit.
    pub fn wait(mut self) {
        self.thread.take().unwrap().join().unwrap();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            (self.tell, _) = mpsc::channel();
            self.wake.write(1).unwrap();
            thread.join().unwrap();
        }
    }
}

/// What the control thread does.
fn poll(mut server: Server, told: &mpsc::Receiver<EventKind>, wake: &EventFd) {
    let mut machine = Machine { state: RunState::Prelaunch, events: Vec::new(), ended: false };
    let epoll = Epoll::new().unwrap();
    for (fd, token) in [(server.as_raw_fd(), SERVER), (wake.as_raw_fd(), WAKE)] {
        epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, token)).unwrap();
    }
    let mut ready = [EpollEvent::default(); 2];
    while !machine.ended {
        let count = epoll.wait(-1, &mut ready).unwrap();
        for event in &ready[..count] {
            if event.data() == SERVER {
                server.dispatch(&mut machine);
                continue;
            }
            wake.read().unwrap();
            loop {
                match told.try_recv() {
                    Ok(kind) => server.broadcast(&[Event { time: SystemTime::now(), kind }]),
                    Err(mpsc::TryRecvError::Empty) => break,
                    Err(mpsc::TryRecvError::Disconnected) => return,
                }
            }
        }
    }
}
