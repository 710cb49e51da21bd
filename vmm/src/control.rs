// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What can be asked of a running VM, and what it tells on its own. The QMP server and the embedding
//! process send the same [`Command`]s; replies and [`Event`]s come back typed.

use std::fmt;
use std::path::PathBuf;
use std::time::SystemTime;

use serde::Serialize;
use uuid::Uuid;

use crate::config::{DiskConfig, MachineType, NetConfig};

/// A request to the control thread, which owns the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Pause all vCPUs.
    Stop,
    /// Let them run.
    Cont,
    /// Reset the machine, as its reset button would.
    Reset,
    /// Press the power button.
    Powerdown,
    /// End the VM at once.
    Quit,
    /// Plug a disk into the first free slot behind a bridge.
    AddDisk(DiskConfig),
    /// Plug a network device into the first free slot behind a bridge. The descriptors that it names may be
    /// closed after the reply.
    AddNet(NetConfig),
    /// Plug a device into this slot behind this bridge.
    AddDevice {
        /// The device.
        device: DeviceConfig,
        /// Where.
        path: PciPath,
    },
    /// Ask the guest to give up a device that was plugged in. [`EventKind::DeviceDeleted`] follows when it
    /// has, which may be never.
    RemoveDevice {
        /// Its id.
        id: String,
    },
    /// State of the VM.
    QueryStatus,
    /// Name and identity.
    QueryIdentity,
    /// The kind of machine.
    QueryMachine,
    /// vCPUs.
    QueryCpus,
    /// Sizes of memory.
    QueryMemory,
    /// Consoles.
    QueryChardevs,
    /// Block devices.
    QueryBlock,
    /// PCI functions.
    QueryPci,
    /// Threads that serve device queues.
    QueryIoThreads,
    /// The last lines of the guest's consoles.
    QueryLastOutput,
}

/// A device that can be plugged in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceConfig {
    /// A disk.
    Disk(DiskConfig),
    /// A network device.
    Net(NetConfig),
}

impl DeviceConfig {
    /// Its id.
    pub fn id(&self) -> &str {
        match self {
            Self::Disk(disk) => &disk.id,
            Self::Net(net) => &net.id,
        }
    }
}

/// Where a PCI device sits: the slots on the way to it, in hexadecimal, as Kata's agent wants them (`02/01`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciPath {
    /// The slot of the bridge that it is behind, if any.
    pub bridge: Option<u8>,
    /// Its slot.
    pub slot: u8,
}

impl fmt::Display for PciPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(bridge) = self.bridge {
            write!(f, "{bridge:02x}/")?;
        }
        write!(f, "{:02x}", self.slot)
    }
}

/// The answer to a [`Command`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// Done.
    Done,
    /// To [`Command::AddDisk`] and [`Command::AddDevice`]: plugged in, and announced to the guest.
    Plugged {
        /// Where.
        path: PciPath,
    },
    /// To [`Command::QueryStatus`].
    Status(RunState),
    /// To [`Command::QueryIdentity`].
    Identity(Identity),
    /// To [`Command::QueryMachine`].
    Machine(MachineInfo),
    /// To [`Command::QueryCpus`].
    Cpus(Vec<CpuInfo>),
    /// To [`Command::QueryMemory`].
    Memory(MemoryInfo),
    /// To [`Command::QueryChardevs`].
    Chardevs(Vec<ChardevInfo>),
    /// To [`Command::QueryBlock`].
    Block(Vec<BlockInfo>),
    /// To [`Command::QueryPci`].
    Pci(Vec<PciInfo>),
    /// To [`Command::QueryIoThreads`].
    IoThreads(Vec<IoThreadInfo>),
    /// To [`Command::QueryLastOutput`].
    LastOutput(String),
}

/// A request that was refused. The machine is as it was.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CommandError {
    /// Not in this state.
    #[error("{0}")]
    WrongState(String),
    /// No device has this id.
    #[error("Device '{0}' not found")]
    DeviceNotFound(String),
    /// What was attempted and why it failed.
    #[error("{0}")]
    Failed(String),
    /// The VM has ended.
    #[error("the VM has ended")]
    Gone,
}

/// State of the VM, in QEMU's terms.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunState {
    /// Built, not yet started.
    Prelaunch,
    /// vCPUs run.
    Running,
    /// Stopped on request.
    Paused,
    /// The guest has panicked; vCPUs are stopped.
    GuestPanicked,
    /// The guest has powered off, or the VM was told to end.
    Shutdown,
    /// The VM failed.
    InternalError,
}

/// Name and identity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Name, if it has one.
    pub name: Option<String>,
    /// Identity.
    pub uuid: Uuid,
}

/// The kind of machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MachineInfo {
    /// Its type.
    pub kind: MachineType,
    /// Most vCPUs that one of its kind can have on this host.
    pub max_cpus: u32,
    /// Whether the host's processor runs the guest; not so with the fake hypervisor of tests.
    pub accelerated: bool,
}

/// A vCPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuInfo {
    /// Its number.
    pub index: u32,
    /// Its host thread.
    pub thread_id: i32,
    /// Place in the topology.
    pub socket: u32,
    /// Place in the topology.
    pub core: u32,
    /// Place in the topology.
    pub thread: u32,
}

/// Sizes of memory in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryInfo {
    /// Present at boot.
    pub base: u64,
    /// Added since.
    pub plugged: u64,
    /// Persistent memory: id, guest address, size, image.
    pub nvdimms: Vec<NvdimmInfo>,
}

/// An image shown as persistent memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NvdimmInfo {
    /// Its id.
    pub id: String,
    /// Guest-physical address.
    pub address: u64,
    /// Size in bytes.
    pub size: u64,
    /// The image.
    pub path: PathBuf,
}

/// A console.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChardevInfo {
    /// Its id.
    pub label: String,
    /// Where its characters go, in QEMU's notation: `null`, `unix:PATH,server=on`, `stdio`, `file`.
    pub filename: String,
    /// Whether somebody is connected, or nobody needs to be.
    pub open: bool,
}

/// A block device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockInfo {
    /// Its id.
    pub id: String,
    /// The file.
    pub path: PathBuf,
    /// Size in bytes.
    pub size: u64,
    /// Whether the guest can only read.
    pub readonly: bool,
    /// Whether the host's page cache is bypassed.
    pub direct: bool,
}

/// A PCI function.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PciInfo {
    /// Number of its bus, as the guest has numbered it; 0 is the root bus.
    pub bus: u8,
    /// Where it is, whatever the guest does.
    pub path: PciPath,
    /// Device number.
    pub slot: u8,
    /// Function number.
    pub function: u8,
    /// Id of the device it carries; empty for the chipset.
    pub id: String,
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device: u16,
    /// Subsystem.
    pub subsystem: u16,
    /// Subsystem vendor.
    pub subsystem_vendor: u16,
    /// Class and subclass.
    pub class: u16,
    /// Interrupt pin: 0 none, 1 INTA.
    pub irq_pin: u8,
    /// Interrupt line register.
    pub irq: u8,
    /// Base address registers that have been placed.
    pub bars: Vec<PciBarInfo>,
    /// What is behind it, if it is a bridge.
    pub bridge: Option<PciBridgeInfo>,
}

/// What a bridge forwards. Ranges are first and last address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PciBridgeInfo {
    /// Number of the bus behind it.
    pub secondary: u8,
    /// Highest number of a bus behind it.
    pub subordinate: u8,
    /// I/O ports.
    pub io: (u64, u64),
    /// Memory.
    pub memory: (u64, u64),
    /// Prefetchable memory.
    pub prefetchable: (u64, u64),
}

/// A base address register.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PciBarInfo {
    /// Its number.
    pub index: u8,
    /// Whether it decodes I/O ports.
    pub io: bool,
    /// Whether reads have no side effects.
    pub prefetch: bool,
    /// Whether it is 64 bits wide.
    pub wide: bool,
    /// Address.
    pub address: u64,
    /// Size in bytes.
    pub size: u64,
}

/// A thread that serves device queues.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IoThreadInfo {
    /// Its name.
    pub id: String,
    /// Its host thread.
    pub thread_id: i32,
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// When.
    pub time: SystemTime,
    /// What.
    pub kind: EventKind,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EventKind {
    /// vCPUs were stopped.
    Stop,
    /// vCPUs run again.
    Resume,
    /// The machine was reset.
    Reset {
        /// By the guest, not by a command.
        guest: bool,
    },
    /// The power button was pressed.
    Powerdown,
    /// A device is gone, after [`Command::RemoveDevice`] or because the guest gave it up by itself.
    DeviceDeleted {
        /// Its id.
        id: String,
    },
    /// The VM ends.
    Shutdown(ShutdownReason),
    /// The process that serves a device is gone: what the guest asks of the device is not answered any more.
    /// The VM goes on.
    BackendLost {
        /// The device.
        id: String,
    },
    /// The guest's kernel reported a panic; its vCPUs are stopped.
    GuestPanicked,
    /// The guest's kernel reported a panic and goes on to write a crash dump.
    GuestCrashLoaded,
}

/// Why a VM ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ShutdownReason {
    /// The guest powered off.
    GuestShutdown,
    /// The guest reset and the VM was told not to.
    GuestReset,
    /// The guest panicked and was not resumed.
    GuestPanic,
    /// The embedding process or QMP said [`Command::Quit`].
    HostQuit,
    /// The VM failed; the text says why, with the last console lines.
    Failed(String),
}
