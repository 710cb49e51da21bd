// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! A machine: memory, vCPUs, I/O threads, and the board with its devices. The control thread owns it.
//!
//! Everything is built in one order and taken down in the reverse one. What differs between machine types
//! is the board's, in a module of its own.

mod board;
mod console;
mod fs;
mod hotplug;
mod map;
mod net;
mod plug;
mod q35;
mod query;
mod slots;
mod spaces;
mod virt;

use std::sync::Arc;

use ecr_arch::boot::ReadAt;
use ecr_devices::chipset::GuestRequestSink;
use ecr_devices::io_thread::IoThread;

use crate::boot::{BootImage, BootImages};
use crate::config::{MachineType, VmConfig};
use crate::control::BlockInfo;
use crate::handle::{Mailbox, Message};
use crate::hypervisor::{Hypervisor, Vcpu, VcpuFacts, VcpuSetup, Vm};
use crate::memory::{Backing, MemoryManager, RamBacking};
use crate::vcpu::VcpuThread;
use crate::vm::StartError;
use board::{Board, BootRequest};
use console::Consoles;
use map::{Map, Parts};

/// A machine. Fields are dropped in this order.
#[derive(Debug)]
pub(crate) struct Machine {
    vcpus: Vec<VcpuThread>,
    board: Box<dyn Board>,
    consoles: Consoles,
    io_threads: Vec<IoThread>,
    boot: BootImages,
    memory: MemoryManager,
    blocks: Vec<BlockInfo>,
    config: VmConfig,
    mailbox: Arc<Mailbox>,
    hypervisor: Arc<dyn Hypervisor>,
    /// What the first vCPU says of itself.
    facts: VcpuFacts,
    /// Where the guest has no ACPI: what to do for it to have it.
    without_acpi: Option<&'static str>,
    vm: Arc<dyn Vm>,
}

fn failed(error: impl std::fmt::Display) -> StartError {
    StartError::Machine(error.to_string())
}

impl Machine {
    /// Build what `config` describes. vCPUs are paused.
    pub(crate) fn build(
        config: VmConfig,
        hypervisor: Arc<dyn Hypervisor>,
        mailbox: &Arc<Mailbox>,
    ) -> Result<Self, StartError> {
        check_architecture(config.machine, &*hypervisor)?;
        let most = hypervisor.capabilities().max_vcpus;
        if config.cpus.max > most {
            return Err(StartError::Machine(format!(
                "{} CPUs were asked for, but this host's KVM allows at most {most} for one guest",
                config.cpus.max
            )));
        }
        let boot = open_boot_images(&config)?;
        let images = open_nvdimms(&config)?;
        let host = hypervisor.capabilities();
        let sizes = images.iter().map(|(_, size)| *size).collect();
        let map = Map::new(&config, sizes, host)?;
        let vm = hypervisor.create_vm(map.address_bits(host))?;
        let mut memory = MemoryManager::new(Arc::clone(&vm));
        memory.add_ram(&map.ram(), &RamBacking::from(&config.memory)).map_err(failed)?;
        for (range, (image, _)) in map.nvdimms().iter().zip(&images) {
            memory.add_image(*range, image).map_err(failed)?;
        }

        log::debug!("guest memory is mapped");
        let io_threads = spawn_io_threads(&config, mailbox)?;
        let consoles = Consoles::open(&config, &io_threads[0].handle())?;
        let board = map.board(Parts {
            config: &config,
            vm: &*vm,
            memory: memory.handle(),
            requests: Arc::clone(mailbox) as Arc<dyn GuestRequestSink>,
            serial: consoles.serial(),
        })?;
        let mut machine = Self {
            vcpus: Vec::new(),
            board,
            consoles,
            io_threads,
            boot,
            memory,
            blocks: Vec::new(),
            config,
            mailbox: Arc::clone(mailbox),
            hypervisor,
            facts: VcpuFacts::default(),
            without_acpi: None,
            vm: Arc::clone(&vm),
        };
        machine.plug_all()?;
        log::debug!("devices are plugged in");
        let vcpus = machine.create_vcpus(&*vm)?;
        let setups = machine.load()?;
        log::debug!("kernel, initrd and tables are in guest memory");
        machine.spawn_vcpus(vcpus, setups)?;
        Ok(machine)
    }

    fn create_vcpus(&mut self, vm: &dyn Vm) -> Result<Vec<Box<dyn Vcpu>>, StartError> {
        let count = self.config.cpus.boot;
        let vcpus: Vec<Box<dyn Vcpu>> =
            (0..count).map(|id| vm.create_vcpu(id)).collect::<Result<_, _>>()?;
        vm.complete_vcpus(count)?;
        if let Some(first) = vcpus.first() {
            self.facts = first.facts()?;
        }
        Ok(vcpus)
    }

    fn spawn_vcpus(
        &mut self,
        vcpus: Vec<Box<dyn Vcpu>>,
        setups: Vec<VcpuSetup>,
    ) -> Result<(), StartError> {
        for (index, (vcpu, setup)) in (0..).zip(vcpus.into_iter().zip(setups)) {
            let mailbox = Arc::clone(&self.mailbox);
            let listener = Arc::new(move |index, event| {
                mailbox.send(Message::Vcpu(index, event));
            });
            let thread = VcpuThread::spawn(index, vcpu, setup, self.board.spaces(), listener)
                .map_err(|source| StartError::Host { attempted: "spawn a vCPU thread", source })?;
            self.vcpus.push(thread);
        }
        self.wait_paused();
        Ok(())
    }

    /// Put kernel, initrd and tables into memory; returns how each vCPU starts.
    fn load(&mut self) -> Result<Vec<VcpuSetup>, StartError> {
        let initrd_size = match &self.boot.initrd {
            None => None,
            Some(initrd) => Some(
                initrd
                    .size()
                    .map_err(|source| StartError::Host { attempted: "size the initrd", source })?,
            ),
        };
        let kernel = &self.boot.kernel;
        let request = BootRequest {
            config: &self.config,
            kernel,
            initrd_size,
            host: self.hypervisor.capabilities(),
            facts: self.facts,
        };
        let boot = self
            .board
            .boot(&request)
            .map_err(|source| StartError::Kernel { path: kernel.path().to_owned(), source })?;
        self.boot.load(&boot.loads, &self.memory.view())?;
        self.without_acpi = boot.without_acpi;
        Ok(boot.setups)
    }

    /// Let all vCPUs run.
    pub(crate) fn resume(&self) {
        self.vcpus.iter().for_each(VcpuThread::resume);
    }

    /// Take all vCPUs out of the guest and wait until they are.
    pub(crate) fn pause(&self) {
        self.vcpus.iter().for_each(VcpuThread::pause);
        self.wait_paused();
    }

    fn wait_paused(&self) {
        self.vcpus.iter().for_each(VcpuThread::wait_paused);
    }

    /// Start again from the kernel's first instruction. vCPUs must be paused, and stay so. Returns the ids of
    /// devices that are gone: those that the guest was to give up.
    pub(crate) fn reset(&mut self) -> Result<Vec<String>, StartError> {
        let gone = self.complete_removals();
        self.vm.reset()?;
        self.board.reset().map_err(failed)?;
        self.memory.discard().map_err(failed)?;
        let setups = self.load()?;
        self.vcpus.iter().zip(setups).for_each(|(vcpu, setup)| vcpu.reset(setup));
        self.wait_paused();
        Ok(gone)
    }

    /// Press the power button.
    pub(crate) fn press_power_button(&self) {
        self.board.press_power_button();
    }

    /// The last lines of the guest's consoles, for a failure report.
    pub(crate) fn last_output(&self) -> String {
        self.consoles.last_output()
    }
}

impl Drop for Machine {
    /// vCPUs leave the guest and devices finish what they have begun before anything goes away.
    fn drop(&mut self) {
        self.vcpus.clear();
        self.board.slots().stop_devices();
    }
}

fn check_architecture(machine: MachineType, hypervisor: &dyn Hypervisor) -> Result<(), StartError> {
    let (wanted, there) = (machine.architecture(), hypervisor.capabilities().architectures);
    if there.contains(&wanted) {
        return Ok(());
    }
    let usable = MachineType::ALL.iter().filter(|kind| there.contains(&kind.architecture()));
    let usable: Vec<&str> = usable.map(|kind| kind.name()).collect();
    Err(StartError::Machine(format!(
        "the machine type {} needs an {} host: this host can run {}",
        machine.name(),
        wanted.name(),
        usable.join(" and ")
    )))
}

fn open_boot_images(config: &VmConfig) -> Result<BootImages, StartError> {
    let kernel = BootImage::open("the kernel", &config.boot.kernel)?;
    let initrd = config.boot.initrd.as_deref().map(|path| BootImage::open("the initrd", path));
    Ok(BootImages { kernel, initrd: initrd.transpose()? })
}

fn open_nvdimms(config: &VmConfig) -> Result<Vec<(Backing, u64)>, StartError> {
    config.nvdimm.iter().map(|nvdimm| Backing::image(&nvdimm.path).map_err(failed)).collect()
}

/// The first thread serves consoles and everything light; disks spread over all.
fn spawn_io_threads(
    config: &VmConfig,
    mailbox: &Arc<Mailbox>,
) -> Result<Vec<IoThread>, StartError> {
    (0..config.io_threads.max(1))
        .map(|index| {
            let mailbox = Arc::clone(mailbox);
            let on_failure = Box::new(move |text| {
                mailbox.send(Message::Failed(text));
            });
            IoThread::spawn(&format!("ecr-io{index}"), on_failure)
                .map_err(|source| StartError::Host { attempted: "spawn an I/O thread", source })
        })
        .collect()
}
