// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The one tree of configuration. The command line, the shim and QMP each produce it, or a piece of it.
//!
//! Sizes are in bytes. [`VmConfig::validate`] finds what is wrong before anything is created.

use std::os::fd::RawFd;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::hypervisor::Architecture;

mod fs;
mod net;
pub(crate) mod validate;

pub use fs::FsConfig;
pub use net::{MacAddr, MacAddrError, NetConfig, TapConfig};
pub use validate::ConfigError;

/// A virtual machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// Name shown to the operator; no meaning for the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Identity shown by `query-uuid`.
    #[serde(default)]
    pub uuid: Uuid,
    /// Machine type.
    pub machine: MachineType,
    /// Interrupt controller of the machine type `virt`.
    #[serde(default)]
    pub gic: GicVersion,
    /// Describe the machine type `virt` by ACPI tables to a kernel that can read them; a device tree is there for the
    /// others. Off: the device tree alone.
    #[serde(default = "yes")]
    pub acpi: bool,
    /// Processors.
    pub cpus: CpuConfig,
    /// Memory.
    pub memory: MemoryConfig,
    /// What to boot.
    pub boot: BootConfig,
    /// Image shown to the guest as persistent memory: `/dev/pmem0`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nvdimm: Option<NvdimmConfig>,
    /// Block devices.
    #[serde(default)]
    pub disks: Vec<DiskConfig>,
    /// Network devices.
    #[serde(default)]
    pub nets: Vec<NetConfig>,
    /// Directories of the host.
    #[serde(default)]
    pub fs: Vec<FsConfig>,
    /// Entropy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rng: Option<RngConfig>,
    /// Sockets between host and guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<VsockConfig>,
    /// virtio console `hvc0`.
    #[serde(default)]
    pub console: ChardevConfig,
    /// Serial port: a 16550 or a PL011.
    #[serde(default)]
    pub serial: ChardevConfig,
    /// Report guest panics.
    #[serde(default = "yes")]
    pub pvpanic: bool,
    /// What to do when the guest asks for a reset.
    #[serde(default)]
    pub on_reset: ResetAction,
    /// PCI bridges `pci-bridge-<i>`, in slots 2 and up of the root bus. Devices are added to a running
    /// machine behind them; each has room for 30.
    #[serde(default)]
    pub bridges: u8,
    /// Threads that serve device queues; 0 chooses.
    #[serde(default)]
    pub io_threads: u16,
}

fn yes() -> bool {
    true
}

/// What to do when the guest asks for a reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ResetAction {
    /// Start the machine again.
    #[default]
    Reboot,
    /// End the VM.
    Shutdown,
}

/// QEMU's machine types.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MachineType {
    /// x86_64: MCH host bridge and ICH9.
    Q35,
    /// aarch64: nothing but what virtual machines need.
    Virt,
}

impl MachineType {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Q35, Self::Virt];

    /// The one of this program's own architecture.
    pub const fn native() -> Self {
        if cfg!(target_arch = "aarch64") { Self::Virt } else { Self::Q35 }
    }

    /// Its name in configurations and to clients.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Q35 => "q35",
            Self::Virt => "virt",
        }
    }

    /// The architecture of its processors.
    pub const fn architecture(self) -> Architecture {
        match self {
            Self::Q35 => Architecture::X86_64,
            Self::Virt => Architecture::Aarch64,
        }
    }
}

/// Version of Arm's generic interrupt controller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum GicVersion {
    /// The newest that the host can give to a guest.
    #[default]
    #[serde(rename = "host")]
    Host,
    /// GICv2, with a GICv2m for messages; up to 8 vCPUs.
    #[serde(rename = "2")]
    V2,
    /// GICv3, with an interrupt translation service for messages.
    #[serde(rename = "3")]
    V3,
}

/// Processors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuConfig {
    /// Present at boot.
    pub boot: u32,
    /// Most there can ever be.
    pub max: u32,
}

/// Memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryConfig {
    /// Present at boot, in bytes.
    pub size: u64,
    /// Most there can ever be, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max: Option<u64>,
    /// Modules that can be added.
    #[serde(default)]
    pub slots: u32,
    /// Other processes can map it (vhost-user).
    #[serde(default)]
    pub shared: bool,
    /// Back it with huge pages of this size in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hugepages: Option<u64>,
    /// Touch all of it before the guest starts.
    #[serde(default)]
    pub prealloc: bool,
    /// Back it with an unlinked file in this directory, or with this file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
}

/// What to boot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootConfig {
    /// Kernel: for x86_64 a bzImage or an ELF file with a PVH note; for aarch64 an `Image`, which may be compressed.
    pub kernel: PathBuf,
    /// Initial RAM disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<PathBuf>,
    /// Kernel command line, complete.
    #[serde(default)]
    pub cmdline: String,
}

/// An image shown to the guest as persistent memory. The guest can read it only; the file is mapped
/// privately, so all VMs share one page cache.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NvdimmConfig {
    /// Unique among all devices.
    pub id: String,
    /// The image.
    pub path: PathBuf,
}

/// A virtio block device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// Unique among all devices.
    pub id: String,
    /// Raw file or block device.
    pub path: PathBuf,
    /// The guest can only read.
    #[serde(default)]
    pub readonly: bool,
    /// Bypass the host's page cache.
    #[serde(default)]
    pub direct: bool,
    /// Serial number, at most 20 bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// Request queues; 0 is one for each vCPU at boot.
    #[serde(default)]
    pub queues: u16,
    /// Entries of a queue, a power of two.
    #[serde(default = "DiskConfig::default_queue_size")]
    pub queue_size: u16,
    /// How requests reach the host.
    #[serde(default)]
    pub io: DiskIo,
}

impl DiskConfig {
    /// Entries of a queue where nothing else is asked for.
    pub const fn default_queue_size() -> u16 {
        256
    }

    /// Request queues in a machine that boots with `cpus` vCPUs.
    pub(crate) fn queues_for(&self, cpus: u32) -> u16 {
        match self.queues {
            0 => u16::try_from(cpus).unwrap_or(u16::MAX).min(validate::QUEUES_MAX),
            queues => queues,
        }
    }
}

/// How block requests reach the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskIo {
    /// io_uring where the host allows it, system calls otherwise.
    #[default]
    Auto,
    /// io_uring, or fail.
    Uring,
    /// `preadv` and friends on the I/O thread.
    Sync,
}

/// Entropy for the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RngConfig {
    /// Where it comes from.
    #[serde(default = "RngConfig::default_path")]
    pub path: PathBuf,
}

impl RngConfig {
    fn default_path() -> PathBuf {
        PathBuf::from("/dev/urandom")
    }
}

impl Default for RngConfig {
    fn default() -> Self {
        Self { path: Self::default_path() }
    }
}

/// Sockets between host and guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// The guest's context id, above 2.
    pub cid: u32,
    /// How the host's end appears.
    pub backend: VsockBackend,
}

/// The host's end of the guest's sockets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VsockBackend {
    /// The host kernel's `AF_VSOCK`, through `/dev/vhost-vsock`, or through this descriptor of it.
    Vhost {
        /// Already opened by the caller.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        fd: Option<RawFd>,
    },
    /// A unix socket on which a client writes `CONNECT <port>`; connections from the guest to host port
    /// P go to `<path>_P`.
    Unix {
        /// The listening socket.
        path: PathBuf,
    },
}

/// Where a console's characters go. Output that nobody takes is dropped; it never stops the guest.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ChardevConfig {
    /// The device is not there.
    #[default]
    Off,
    /// The device is there and its output is dropped.
    Null,
    /// Descriptors of the embedding process, such as its terminal.
    Fds {
        /// Characters for the guest.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        input: Option<RawFd>,
        /// Characters from the guest.
        output: RawFd,
    },
    /// Append to a file.
    File {
        /// The file.
        path: PathBuf,
    },
    /// Listen on a unix socket; one client at a time.
    Unix {
        /// The socket.
        path: PathBuf,
    },
}
