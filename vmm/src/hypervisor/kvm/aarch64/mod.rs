// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What KVM has on aarch64 only: the size of addresses, features and registers of vCPUs, the GIC.

mod gic;
mod gic_reset;
mod v2m;

use std::io;
use std::mem::offset_of;

use ecr_arch::arm64::id::{AFFINITY_MASK, affinity};
use ecr_arch::arm64::regs::{BootRegs, PSTATE};
use ecr_arch::layout::virt::interrupt;
use kvm_bindings::{
    KVM_ARM_IRQ_TYPE_SHIFT, KVM_ARM_IRQ_TYPE_SPI, KVM_ARM_VCPU_POWER_OFF, KVM_ARM_VCPU_PSCI_0_2,
    KVM_ARM_VCPU_PTRAUTH_ADDRESS, KVM_ARM_VCPU_PTRAUTH_GENERIC, KVM_ARM_VCPU_SVE,
    KVM_MSI_VALID_DEVID, KVM_REG_ARM_CORE, KVM_REG_ARM64, KVM_REG_ARM64_SYSREG, KVM_REG_SIZE_U64,
    kvm_regs, kvm_vcpu_init, user_pt_regs,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

use super::super::{Architecture, Capabilities, Result, VcpuFacts, VcpuSetup};
use super::{error, refused};
pub(super) use gic::InterruptController;

/// Bits of an address where the host cannot be asked for others.
const DEFAULT_ADDRESS_BITS: u8 = 40;
/// What to do where `/dev/kvm` is not there.
pub(super) const NO_KVM: &str =
    "this machine has no KVM: it needs a kernel with CONFIG_KVM that firmware starts at EL2";
/// An ITS translates messages by who sends them.
pub(super) const MSI_FLAGS: u32 = KVM_MSI_VALID_DEVID;

/// Encodings `op0, op1, CRn, CRm, op2` of system registers.
const MPIDR_EL1: u64 = system_register(3, 0, 0, 0, 5);
const ID_AA64MMFR0_EL1: u64 = system_register(3, 0, 0, 7, 0);

const fn system_register(op0: u64, op1: u64, crn: u64, crm: u64, op2: u64) -> u64 {
    op0 << 14 | op1 << 11 | crn << 7 | crm << 3 | op2
}

/// KVM's number of the core register at `offset` in `struct kvm_regs`.
const fn core_register(offset: usize) -> u64 {
    KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM_CORE as u64 | (offset / 4) as u64
}

pub(super) fn capabilities(kvm: &Kvm) -> Result<Capabilities> {
    let bits = u8::try_from(kvm.get_host_ipa_limit()).ok().filter(|&bits| bits != 0);
    Ok(Capabilities {
        architectures: &[Architecture::Aarch64],
        accelerated: true,
        max_vcpus: 0,
        max_memory_slots: 0,
        physical_address_bits: bits.unwrap_or(DEFAULT_ADDRESS_BITS),
        cpuid: Vec::new(),
    })
}

pub(super) fn create_vm(
    kvm: &Kvm,
    address_bits: u8,
) -> std::result::Result<VmFd, kvm_ioctls::Error> {
    // Old hosts have the one size that needs no asking.
    if kvm.get_host_ipa_limit() == 0 || address_bits == DEFAULT_ADDRESS_BITS {
        return kvm.create_vm_with_type(0);
    }
    kvm.create_vm_with_ipa_size(address_bits.into())
}

/// The number of shared peripheral interrupt `spi` in KVM_IRQ_LINE.
pub(super) fn line(spi: u32) -> u32 {
    KVM_ARM_IRQ_TYPE_SPI << KVM_ARM_IRQ_TYPE_SHIFT | (interrupt::SHARED + spi)
}

/// What else to say of a failed KVM_RUN.
pub(super) fn run_error_hint(errno: i32) -> &'static str {
    match errno {
        libc::ENOSYS => {
            ": the guest reached for an address that is neither memory nor can be emulated, because the processor \
             does not describe the instruction (no valid syndrome)"
        }
        _ => "",
    }
}

/// There is no clock that could be told.
pub(super) fn note_pause(_vcpu: &VcpuFd) {}

/// Where a vCPU stands, for error messages.
pub(super) fn place(vcpu: &VcpuFd) -> String {
    match get(vcpu, PC) {
        Ok(pc) => format!("pc {pc:#x}"),
        Err(errno) => format!("an unknown place ({errno})"),
    }
}

pub(super) fn facts(id: u32, vcpu: &VcpuFd) -> Result<VcpuFacts> {
    let mmfr0 = get_system(vcpu, ID_AA64MMFR0_EL1)
        .map_err(refused(format!("read ID_AA64MMFR0_EL1 of vCPU {id}")))?;
    Ok(VcpuFacts { mmfr0, ..VcpuFacts::default() })
}

const REGISTERS: usize = offset_of!(kvm_regs, regs);
const X0: u64 = core_register(REGISTERS + offset_of!(user_pt_regs, regs));
const PC: u64 = core_register(REGISTERS + offset_of!(user_pt_regs, pc));
const PSTATE_REGISTER: u64 = core_register(REGISTERS + offset_of!(user_pt_regs, pstate));

type Ioctl<T> = std::result::Result<T, kvm_ioctls::Error>;

fn get(vcpu: &VcpuFd, register: u64) -> Ioctl<u64> {
    let mut bytes = [0; 8];
    vcpu.get_one_reg(register, &mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

fn get_system(vcpu: &VcpuFd, encoding: u64) -> Ioctl<u64> {
    get(vcpu, KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM64_SYSREG as u64 | encoding)
}

fn set(vcpu: &VcpuFd, register: u64, value: u64) -> Ioctl<()> {
    vcpu.set_one_reg(register, &value.to_le_bytes()).map(drop)
}

/// What it takes to set a vCPU to its start.
#[derive(Debug)]
pub(super) struct StartState {
    init: kvm_vcpu_init,
}

impl StartState {
    /// Give the vCPU what the host's processor has, but for performance counters.
    pub(super) fn new(id: u32, vcpu: &VcpuFd, vm: &VmFd) -> Result<Self> {
        let attempted = |what: &str| format!("{what} of vCPU {id}");
        let mut init = kvm_vcpu_init::default();
        vm.get_preferred_target(&mut init).map_err(refused("ask for the host's processor"))?;
        let mut features = 1 << KVM_ARM_VCPU_PSCI_0_2;
        // Only the first one runs from the start; KVM wants to be told the same each time.
        if id != 0 {
            features |= 1 << KVM_ARM_VCPU_POWER_OFF;
        }
        // KVM wants both or none.
        if [Cap::ArmPtrAuthAddress, Cap::ArmPtrAuthGeneric].map(|cap| vm.check_extension(cap))
            == [true; 2]
        {
            features |= 1 << KVM_ARM_VCPU_PTRAUTH_ADDRESS | 1 << KVM_ARM_VCPU_PTRAUTH_GENERIC;
        }
        let sve = vm.check_extension(Cap::ArmSve);
        if sve {
            features |= 1 << KVM_ARM_VCPU_SVE;
        }
        init.features[0] |= features;
        vcpu.vcpu_init(&init)
            .map_err(refused(attempted(&format!("set the features {features:#x}"))))?;
        if sve {
            vcpu.vcpu_finalize(&(KVM_ARM_VCPU_SVE as i32))
                .map_err(refused(attempted("finish the vector registers")))?;
        }
        let mpidr = get_system(vcpu, MPIDR_EL1).map_err(refused(attempted("read MPIDR_EL1")))?;
        if mpidr & AFFINITY_MASK != affinity(id) {
            let wanted = affinity(id);
            let attempted =
                format!("find vCPU {id} at affinity {wanted:#x}: its MPIDR_EL1 is {mpidr:#x}");
            return Err(error(attempted, io::ErrorKind::Unsupported));
        }
        Ok(Self { init })
    }

    pub(super) fn apply(&mut self, id: u32, vcpu: &VcpuFd, setup: &VcpuSetup) -> Result<()> {
        let VcpuSetup::Arm(regs) = setup else {
            let attempted = format!("start vCPU {id} as one of another architecture");
            return Err(error(attempted, io::ErrorKind::Unsupported));
        };
        vcpu.vcpu_init(&self.init).map_err(refused(format!("reset vCPU {id}")))?;
        match regs {
            Some(regs) => set_boot_regs(vcpu, regs)
                .map_err(refused(format!("set the registers of vCPU {id}"))),
            None => Ok(()),
        }
    }
}

fn set_boot_regs(vcpu: &VcpuFd, regs: &BootRegs) -> Ioctl<()> {
    set(vcpu, PSTATE_REGISTER, PSTATE)?;
    set(vcpu, PC, regs.pc)?;
    set(vcpu, X0, regs.x0)
}
