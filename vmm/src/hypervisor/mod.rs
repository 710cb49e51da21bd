// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What the machine needs from a hypervisor. `kvm` is the real one, `fake` runs whole-machine tests.

pub mod fake;
pub mod kvm;

use std::fmt;
use std::io;
use std::sync::Arc;

use ecr_arch::layout::Range;
use ecr_arch::x86::cpuid::CpuidEntry;
use ecr_arch::{arm64, x86};
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

/// Architecture of a processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// 64-bit x86.
    X86_64,
    /// 64-bit Arm.
    Aarch64,
}

impl Architecture {
    /// As Linux calls it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64",
            Self::Aarch64 => "aarch64",
        }
    }
}

/// What a host can do.
#[derive(Debug, Clone)]
pub struct Capabilities {
    /// Processors that its guests can have.
    pub architectures: &'static [Architecture],
    /// The host's processor runs the guest; not so with the fake of tests.
    pub accelerated: bool,
    /// Most vCPUs of one VM.
    pub max_vcpus: u32,
    /// Most memory slots of one VM.
    pub max_memory_slots: u32,
    /// Most bits of a guest-physical address.
    pub physical_address_bits: u8,
    /// What the host can show a guest as CPUID; empty on other architectures.
    pub cpuid: Vec<CpuidEntry>,
}

/// A way to run virtual machines.
pub trait Hypervisor: Send + Sync + fmt::Debug {
    /// What the host can do.
    fn capabilities(&self) -> &Capabilities;

    /// Create an empty VM whose guest-physical addresses have `address_bits` bits: on x86, where the processor
    /// alone decides that, as many as the capabilities tell. On x86 its interrupt controllers are there from the
    /// start.
    ///
    /// # Errors
    /// The host refused.
    fn create_vm(&self, address_bits: u8) -> Result<Arc<dyn Vm>>;
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

    /// The interrupt controllers of Arm that this host can give to a guest; none on x86.
    fn gic_support(&self) -> GicSupport;

    /// On Arm, create the interrupt controller, before any vCPU.
    ///
    /// # Errors
    /// The host refused.
    fn create_gic(&self, gic: &Gic) -> Result<()>;

    /// Create a vCPU. On x86 `id` is its APIC id, on Arm its affinity is [`arm64::id::affinity`] of it.
    ///
    /// # Errors
    /// The host refused.
    fn create_vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>>;

    /// All `count` vCPUs are created: the interrupt controller can get to work. Once.
    ///
    /// # Errors
    /// The host refused.
    fn complete_vcpus(&self, count: u32) -> Result<()>;

    /// Put the interrupt controller, and timers that belong to it, back into their state at creation. All
    /// vCPUs must be paused; each of them is reset by [`Vcpu::setup`].
    ///
    /// # Errors
    /// The host refused.
    fn reset(&self) -> Result<()>;

    /// The interrupt controller's input `gsi`: of the I/O APIC, or the shared peripheral interrupt of that number,
    /// counted from 0.
    fn irq_line(&self, gsi: u32) -> IrqLine;

    /// Where message-signalled interrupts go.
    fn msi(&self) -> Arc<dyn MsiSink>;

    /// Guest writes that become eventfds.
    fn doorbells(&self) -> Arc<dyn DoorbellSink>;
}

/// Interrupt controllers of Arm that a host can give to a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct GicSupport {
    /// GICv2.
    pub v2: bool,
    /// GICv3.
    pub v3: bool,
    /// Interrupt translation service of a GICv3.
    pub its: bool,
}

/// An interrupt controller of Arm, and where it lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gic {
    /// The distributor.
    pub distributor: Range,
    /// Interrupts it has, software-generated and private ones counted.
    pub interrupts: u32,
    /// What else it is made of.
    pub parts: GicParts,
}

/// What distinguishes the versions of an interrupt controller of Arm.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GicParts {
    /// GICv2. A message is a write to the frame; its data is the interrupt that it raises.
    V2 {
        /// The CPU interface.
        cpu_interface: Range,
        /// The frame to which messages are sent, a GICv2m.
        frame: Range,
    },
    /// GICv3.
    V3 {
        /// Redistributors, one for each vCPU, in ascending order.
        redistributors: Vec<Range>,
        /// To which messages are sent.
        its: Option<Range>,
    },
}

/// State of a vCPU before its first instruction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VcpuSetup {
    /// Of x86.
    X86(X86VcpuSetup),
    /// Of Arm: for the boot processor; others wait until it turns them on.
    Arm(Option<arm64::regs::BootRegs>),
}

/// What a vCPU says of itself before it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VcpuFacts {
    /// Frequency of its time stamp counter in kHz, where an x86 host knows it.
    pub tsc_khz: Option<u32>,
    /// Arm's `ID_AA64MMFR0_EL1`.
    pub mmfr0: u64,
}

/// State of an x86 vCPU before its first instruction. Firmware's part, such as cacheable memory, is
/// the same for all and comes by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct X86VcpuSetup {
    /// All CPUID leaves it shows.
    pub cpuid: Vec<CpuidEntry>,
    /// For the boot processor; others wait for INIT and SIPI.
    pub regs: Option<x86::regs::BootRegs>,
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
    /// What it says of itself.
    ///
    /// # Errors
    /// The host refused.
    fn facts(&self) -> Result<VcpuFacts>;

    /// Set the state before the first instruction. May be called again, to reset the vCPU.
    ///
    /// # Errors
    /// The host refused, or the setup is another architecture's.
    fn setup(&mut self, setup: &VcpuSetup) -> Result<()>;

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
