// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What the machine needs from a hypervisor. `kvm` is the real one, `fake` runs whole-machine tests.

pub mod fake;
pub mod kvm;

use std::fmt;
use std::io;
use std::sync::Arc;

use ecr_arch::x86::cpuid::CpuidEntry;
use ecr_arch::x86::regs::BootRegs;
use ecr_devices::irq::{DoorbellSink, IrqLine, MsiSink};

/// A failed request to the hypervisor.
#[derive(Debug, thiserror::Error)]
#[error("{attempted}: {source}")]
pub struct HypervisorError {
    /// What was attempted, with its value and, where there is something to do about it, what.
    pub attempted: String,
    /// Why it failed.
    pub source: io::Error,
}

/// Result of a request to the hypervisor.
pub type Result<T> = std::result::Result<T, HypervisorError>;

/// What a host can do.
#[derive(Debug, Clone)]
pub struct Capabilities {
    /// The host's processor runs the guest; not so with the fake of tests.
    pub accelerated: bool,
    /// Most vCPUs of one VM.
    pub max_vcpus: u32,
    /// Most memory slots of one VM.
    pub max_memory_slots: u32,
    /// Bits of a guest-physical address.
    pub physical_address_bits: u8,
    /// What the host can show a guest as CPUID; empty on other architectures.
    pub cpuid: Vec<CpuidEntry>,
}

/// A way to run virtual machines.
pub trait Hypervisor: Send + Sync + fmt::Debug {
    /// What the host can do.
    fn capabilities(&self) -> &Capabilities;

    /// Create an empty VM, with its interrupt controller.
    ///
    /// # Errors
    /// The host refused.
    fn create_vm(&self) -> Result<Arc<dyn Vm>>;
}

/// A memory slot: a range of guest-physical memory backed by this process's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemorySlot {
    /// Number of the slot.
    pub slot: u32,
    /// Guest-physical address.
    pub guest: u64,
    /// Size in bytes.
    pub size: u64,
    /// Address in this process.
    pub host: u64,
    /// Guest writes leave the guest as MMIO.
    pub read_only: bool,
}

/// One virtual machine.
pub trait Vm: Send + Sync + fmt::Debug {
    /// Back a range of guest-physical memory.
    ///
    /// # Safety
    /// `slot.host..slot.host + slot.size` stays mapped until the slot is removed or the VM is dropped, and
    /// nobody holds Rust references into it.
    ///
    /// # Errors
    /// The host refused.
    unsafe fn add_memory_slot(&self, slot: MemorySlot) -> Result<()>;

    /// Take a range away.
    ///
    /// # Errors
    /// The host refused.
    fn remove_memory_slot(&self, slot: u32) -> Result<()>;

    /// Create a vCPU. On x86 `id` is its APIC id.
    ///
    /// # Errors
    /// The host refused.
    fn create_vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>>;

    /// Put the interrupt controller, and timers that belong to it, back into their state at creation. All
    /// vCPUs must be paused; each of them is reset by [`Vcpu::setup_x86`].
    ///
    /// # Errors
    /// The host refused.
    fn reset(&self) -> Result<()>;

    /// The interrupt controller's input `gsi`.
    fn irq_line(&self, gsi: u32) -> IrqLine;

    /// Where message-signalled interrupts go.
    fn msi(&self) -> Arc<dyn MsiSink>;

    /// Guest writes that become eventfds.
    fn doorbells(&self) -> Arc<dyn DoorbellSink>;
}

/// State of an x86 vCPU before its first instruction. Firmware's part, such as cacheable memory, is
/// the same for all and comes by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct X86VcpuSetup {
    /// All CPUID leaves it shows.
    pub cpuid: Vec<CpuidEntry>,
    /// For the boot processor; others wait for INIT and SIPI.
    pub regs: Option<BootRegs>,
}

/// Why a vCPU came back. Accesses to devices do not: they are answered by the [`IoHandler`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exit {
    /// A kick, or a signal.
    Interrupted,
    /// The guest halted with no interrupt controller to wake it.
    Halted,
    /// The guest asked for a reset, or triple-faulted.
    Shutdown(ShutdownKind),
    /// The vCPU cannot go on; the text says why, for the person who reads it.
    Failed(String),
}

/// How a guest ended its run without a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShutdownKind {
    /// x86 triple fault.
    TripleFault,
    /// PSCI or system event: power off.
    PowerOff,
    /// PSCI or system event: reset.
    Reset,
}

/// Who answers a vCPU's accesses to devices.
pub trait IoHandler {
    /// Memory read that no memory slot answers.
    fn mmio_read(&self, address: u64, data: &mut [u8]);
    /// Memory write that no memory slot answers.
    fn mmio_write(&self, address: u64, data: &[u8]);
    /// Port read.
    fn pio_read(&self, port: u16, data: &mut [u8]);
    /// Port write.
    fn pio_write(&self, port: u16, data: &[u8]);
}

/// Makes a vCPU return from [`Vcpu::run`] with [`Exit::Interrupted`], from any thread, without sleeping
/// and without loss: a kick before `run` makes that `run` return at once.
pub trait VcpuKick: Send + Sync + fmt::Debug {
    /// Kick.
    fn kick(&self);
}

/// One virtual CPU. It moves to its thread and stays there.
pub trait Vcpu: Send + fmt::Debug {
    /// Frequency of its time stamp counter in kHz, where the host knows it.
    fn tsc_khz(&self) -> Option<u32>;

    /// Set the state before the first instruction. May be called again, to reset the vCPU.
    ///
    /// # Errors
    /// The host refused.
    fn setup_x86(&mut self, setup: &X86VcpuSetup) -> Result<()>;

    /// Called once, on the thread that will call [`Self::run`].
    ///
    /// # Errors
    /// The host refused.
    fn bind_to_thread(&mut self) -> Result<Arc<dyn VcpuKick>>;

    /// The guest is now kept from running, perhaps for long: let it know that time passes without it, or it
    /// takes the gap for a hang.
    fn note_pause(&mut self);

    /// Run until something happens that the caller must know of.
    fn run(&mut self, io: &dyn IoHandler) -> Exit;
}

/// The host's hypervisor.
///
/// # Errors
/// There is none, or it may not be used.
pub fn host() -> Result<Arc<dyn Hypervisor>> {
    Ok(Arc::new(kvm::Kvm::open()?))
}
