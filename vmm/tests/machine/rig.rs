// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! A machine whose processor runs a function of the test, and what that function needs of a driver.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ecr_vmm::config::{
    BootConfig, ChardevConfig, CpuConfig, DiskConfig, DiskIo, GicVersion, MemoryConfig,
    ResetAction, VmConfig,
};
use ecr_vmm::hypervisor::fake::{Fake, GuestCpu};
use ecr_vmm::hypervisor::{Exit, Hypervisor};
use ecr_vmm::{VmHandle, VmOptions};
use tempfile::TempDir;
use uuid::Uuid;

use crate::board;

pub(crate) const MIB: u64 = 1 << 20;

/// Where a test's files are, and its configuration.
pub(crate) struct Rig {
    pub(crate) dir: TempDir,
    pub(crate) config: VmConfig,
}

impl Rig {
    /// One processor, 64 MiB, and nothing plugged in.
    pub(crate) fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let kernel = dir.path().join("kernel");
        fs::write(&kernel, board::kernel()).unwrap();
        let config = VmConfig {
            name: None,
            uuid: Uuid::nil(),
            machine: board::MACHINE,
            gic: GicVersion::Host,
            acpi: true,
            cpus: CpuConfig { boot: 1, max: 1 },
            memory: MemoryConfig {
                size: 64 * MIB,
                max: None,
                slots: 0,
                shared: false,
                hugepages: None,
                prealloc: false,
                path: None,
            },
            boot: BootConfig { kernel, initrd: None, cmdline: String::new() },
            nvdimm: None,
            disks: Vec::new(),
            nets: Vec::new(),
            fs: Vec::new(),
            rng: None,
            vsock: None,
            console: ChardevConfig::Off,
            serial: ChardevConfig::Off,
            pvpanic: true,
            on_reset: ResetAction::Reboot,
            bridges: 0,
            io_threads: 0,
        };
        Self { dir, config }
    }

    /// A disk image of 16 sectors, each of which is full of its number.
    pub(crate) fn image(&self, name: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::write(&path, (0..16u8).flat_map(|n| [n; 512]).collect::<Vec<u8>>()).unwrap();
        path
    }

    /// As [`Self::start`], with QMP clients on `socket`.
    pub(crate) fn start_with_qmp<P>(&self, socket: &Path, program: P) -> VmHandle
    where
        P: Fn(&GuestCpu) -> Exit + Send + Sync + 'static,
    {
        let hypervisor = Arc::new(Fake::new().with_program(0, program));
        let options = VmOptions { hypervisor, paused: true, qmp: Some(socket.to_owned()) };
        ecr_vmm::start(self.config.clone(), options).unwrap()
    }

    /// Start a machine whose processor runs `program`. A failed assertion in it fails the VM, with its text.
    pub(crate) fn start<P>(&self, program: P) -> (VmHandle, Arc<Fake>)
    where
        P: Fn(&GuestCpu) -> Exit + Send + Sync + 'static,
    {
        let fake = Arc::new(Fake::new().with_program(0, program));
        let hypervisor = Arc::clone(&fake) as Arc<dyn Hypervisor>;
        let options = VmOptions { hypervisor, paused: true, qmp: None };
        (ecr_vmm::start(self.config.clone(), options).unwrap(), fake)
    }
}

/// A small disk.
pub(crate) fn disk(id: &str, path: PathBuf) -> DiskConfig {
    DiskConfig {
        id: id.into(),
        path,
        readonly: false,
        direct: false,
        serial: None,
        queues: 2,
        queue_size: 8,
        io: DiskIo::Auto,
    }
}

pub(crate) fn read<const N: usize>(cpu: &GuestCpu, address: u64) -> [u8; N] {
    let mut data = [0; N];
    cpu.read(address, &mut data);
    data
}

pub(crate) fn read_u16(cpu: &GuestCpu, address: u64) -> u16 {
    u16::from_le_bytes(read(cpu, address))
}

pub(crate) fn read_u64(cpu: &GuestCpu, address: u64) -> u64 {
    u64::from_le_bytes(read(cpu, address))
}

/// The configuration space of device `slot`, function 0, in ECAM.
pub(crate) fn function(slot: u64) -> u64 {
    board::ECAM + (slot << 15)
}

/// Capability `id` of the function at `config`, from the list's entries that `is_it` accepts.
pub(crate) fn capability(
    cpu: &GuestCpu,
    config: u64,
    id: u8,
    is_it: impl Fn(u64) -> bool,
) -> Option<u64> {
    let mut at = config + u64::from(read::<1>(cpu, config + 0x34)[0]);
    while at != config {
        let [this, next] = read(cpu, at);
        if this == id && is_it(at) {
            return Some(at);
        }
        at = config + u64::from(next);
    }
    None
}

/// Where the BAR `index` of the function at `config` was placed.
pub(crate) fn bar(cpu: &GuestCpu, config: u64, index: u64) -> u64 {
    let at = config + 0x10 + index * 4;
    let low = cpu.read_u32(at);
    let high = if low & 0b110 == 0b100 { u64::from(cpu.read_u32(at + 4)) << 32 } else { 0 };
    high | u64::from(low & !0xf)
}
