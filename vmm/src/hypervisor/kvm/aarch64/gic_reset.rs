// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The registers of a GIC as they are at power-on (Arm IHI 0048 for GICv2, IHI 0069 for GICv3). KVM has no call for
//! that. Enable, pending and active bits have a register that clears them; writing pending bits from outside of the
//! guest sets them to what is written with one version and clears them with the other, so both are done.

use kvm_bindings::{
    KVM_DEV_ARM_VGIC_GRP_CPU_REGS, KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS,
    KVM_DEV_ARM_VGIC_GRP_DIST_REGS, KVM_DEV_ARM_VGIC_GRP_REDIST_REGS, kvm_device_attr,
};
use kvm_ioctls::DeviceFd;

use super::gic::set;
use super::system_register;
use crate::hypervisor::{Gic, GicParts};
use ecr_arch::arm64::id::affinity;

type Outcome = std::result::Result<(), kvm_ioctls::Error>;

/// Banks with one bit for each interrupt, in the distributor and in the second frame of a redistributor, and what
/// they are set to.
const GROUP: u64 = 0x080;
const BITS: [(u64, u32); 4] = [(0x180, !0), (0x200, 0), (0x280, !0), (0x380, !0)];
const PRIORITY: u64 = 0x400;
const TARGETS: u64 = 0x800;
const CONFIGURATION: u64 = 0xC00;
const ROUTER: u64 = 0x6000;
/// The redistributor's own registers, and where its frame of private interrupts begins.
const REDISTRIBUTOR_CONTROL: u64 = 0;
const PROPERTY_BASE: u64 = 0x70;
const PENDING_BASE: u64 = 0x78;
const PRIVATE_FRAME: u64 = 0x1_0000;
/// CPU interface of a GICv2: control, priority mask, binary points, active priorities.
const CPU_INTERFACE: [u64; 5] = [0x00, 0x04, 0x08, 0x1C, 0xD0];
/// CPU interface of a GICv3: ICC_PMR, BPR0, AP0R0, AP1R0, BPR1, IGRPEN0, IGRPEN1, each _EL1.
const CPU_REGISTERS: [u64; 7] = [
    system_register(3, 0, 4, 6, 0),
    system_register(3, 0, 12, 8, 3),
    system_register(3, 0, 12, 8, 4),
    system_register(3, 0, 12, 9, 0),
    system_register(3, 0, 12, 12, 3),
    system_register(3, 0, 12, 12, 6),
    system_register(3, 0, 12, 12, 7),
];
/// ICC_CTLR_EL1, of which a guest can write CBPR and EOImode; the rest tells what the host has.
const CONTROL_REGISTER: u64 = system_register(3, 0, 12, 12, 4);
const CONTROL_WRITABLE: u64 = 0b11;

/// A GIC whose vCPUs are all out of the guest.
pub(super) struct Registers<'a> {
    pub(super) gic: &'a DeviceFd,
    pub(super) spec: &'a Gic,
    pub(super) vcpus: u32,
}

impl Registers<'_> {
    pub(super) fn reset(&self) -> Outcome {
        let v3 = matches!(self.spec.parts, GicParts::V3 { .. });
        self.distributor(0, 0)?;
        self.shared(v3)?;
        for vcpu in 0..self.vcpus {
            if v3 { self.redistributor(vcpu)? } else { self.banked(vcpu)? }
        }
        Ok(())
    }

    /// Interrupts that all processors share.
    fn shared(&self, v3: bool) -> Outcome {
        let interrupts = u64::from(self.spec.interrupts);
        for word in 1..interrupts / 32 {
            self.distributor(GROUP + word * 4, if v3 { !0 } else { 0 })?;
            for (bank, value) in BITS {
                self.distributor(bank + word * 4, value)?;
            }
        }
        for word in 8..interrupts / 4 {
            self.distributor(PRIORITY + word * 4, 0)?;
            if !v3 {
                self.distributor(TARGETS + word * 4, 0)?;
            }
        }
        for word in 2..interrupts / 16 {
            self.distributor(CONFIGURATION + word * 4, 0)?;
        }
        for interrupt in 32..interrupts {
            if v3 {
                self.distributor(ROUTER + interrupt * 8, 0)?;
                self.distributor(ROUTER + interrupt * 8 + 4, 0)?;
            }
        }
        Ok(())
    }

    /// What a GICv3 has for each processor.
    fn redistributor(&self, vcpu: u32) -> Outcome {
        let write = |offset: u64, value: u32| {
            let attr = affinity(vcpu) << 32 | offset;
            set(self.gic, KVM_DEV_ARM_VGIC_GRP_REDIST_REGS, attr, &value)
        };
        // Message-signalled interrupts are off before their tables go.
        for offset in [
            REDISTRIBUTOR_CONTROL,
            PROPERTY_BASE,
            PROPERTY_BASE + 4,
            PENDING_BASE,
            PENDING_BASE + 4,
        ] {
            write(offset, 0)?;
        }
        write(PRIVATE_FRAME + GROUP, !0)?;
        for (bank, value) in BITS {
            write(PRIVATE_FRAME + bank, value)?;
        }
        for word in 0..8 {
            write(PRIVATE_FRAME + PRIORITY + word * 4, 0)?;
        }
        write(PRIVATE_FRAME + CONFIGURATION + 4, 0)?;
        self.cpu_registers(vcpu)
    }

    fn cpu_registers(&self, vcpu: u32) -> Outcome {
        let group = KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS;
        let attr = |register| affinity(vcpu) << 32 | register;
        for register in CPU_REGISTERS {
            set(self.gic, group, attr(register), &0_u64)?;
        }
        let mut control = 0_u64;
        let addr = &raw mut control as u64;
        let attr = attr(CONTROL_REGISTER);
        // SAFETY: KVM writes the 64 bits of a system register to `control`, which lives through the call.
        unsafe {
            self.gic.get_device_attr(&mut kvm_device_attr { flags: 0, group, attr, addr })?;
        }
        set(self.gic, group, attr, &(control & !CONTROL_WRITABLE))
    }

    /// What a GICv2 has for each processor.
    fn banked(&self, vcpu: u32) -> Outcome {
        let cpu = u64::from(vcpu) << 32;
        self.distributor(cpu | GROUP, 0)?;
        for (bank, value) in BITS {
            self.distributor(cpu | bank, value)?;
        }
        for word in 0..8 {
            self.distributor(cpu | (PRIORITY + word * 4), 0)?;
        }
        for offset in CPU_INTERFACE {
            set(self.gic, KVM_DEV_ARM_VGIC_GRP_CPU_REGS, cpu | offset, &0_u32)?;
        }
        Ok(())
    }

    fn distributor(&self, attr: u64, value: u32) -> Outcome {
        set(self.gic, KVM_DEV_ARM_VGIC_GRP_DIST_REGS, attr, &value)
    }
}
