// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! KVM's interrupt controllers of Arm: `Documentation/virt/kvm/devices/arm-vgic.rst`, `arm-vgic-v3.rst` and
//! `arm-vgic-its.rst`.
//!
//! The GIC is created before the vCPUs, so that each finds its redistributor, and initialised when all of them are
//! there; the ITS follows.

use std::fmt;
use std::io;
use std::sync::{Arc, OnceLock};

use ecr_arch::layout::Range;
use ecr_arch::layout::virt::REDISTRIBUTOR_SIZE;
use ecr_devices::irq::MsiSink;
use kvm_bindings::{
    KVM_CREATE_DEVICE_TEST, KVM_DEV_ARM_ITS_CTRL_RESET, KVM_DEV_ARM_VGIC_CTRL_INIT,
    KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_GRP_NR_IRQS,
    KVM_VGIC_ITS_ADDR_TYPE, KVM_VGIC_V2_ADDR_TYPE_CPU, KVM_VGIC_V2_ADDR_TYPE_DIST,
    KVM_VGIC_V3_ADDR_TYPE_DIST, KVM_VGIC_V3_ADDR_TYPE_REDIST, KVM_VGIC_V3_ADDR_TYPE_REDIST_REGION,
    KVMIO, kvm_create_device, kvm_device_attr, kvm_device_type,
    kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_ITS, kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V2,
    kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3,
};
use kvm_ioctls::{DeviceFd, VmFd};
use vmm_sys_util::ioctl::ioctl_with_mut_ref;
use vmm_sys_util::ioctl_iowr_nr;

use super::gic_reset::Registers;
use super::v2m::Frame;
use crate::hypervisor::kvm::irq::MsiController;
use crate::hypervisor::kvm::{error, refused};
use crate::hypervisor::{Gic, GicParts, GicSupport, Result};

const V2: kvm_device_type = kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V2;
const V3: kvm_device_type = kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3;
const ITS: kvm_device_type = kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_ITS;

// kvm-ioctls would take the descriptor that a mere test does not yield.
ioctl_iowr_nr!(KVM_CREATE_DEVICE, KVMIO, 0xe0, kvm_create_device);

/// The GIC of a VM, once it is created.
#[derive(Debug)]
pub(in crate::hypervisor::kvm) struct InterruptController {
    vm: Arc<VmFd>,
    created: OnceLock<Created>,
}

struct Created {
    spec: Gic,
    gic: DeviceFd,
    msi: Arc<dyn MsiSink>,
    complete: OnceLock<Complete>,
}

impl fmt::Debug for Created {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Created").field("spec", &self.spec).finish_non_exhaustive()
    }
}

/// What there is when the vCPUs are.
#[derive(Debug)]
struct Complete {
    vcpus: u32,
    its: Option<DeviceFd>,
}

impl InterruptController {
    pub(in crate::hypervisor::kvm) fn new(vm: &Arc<VmFd>) -> Result<Self> {
        Ok(Self { vm: Arc::clone(vm), created: OnceLock::new() })
    }

    pub(in crate::hypervisor::kvm) fn gic_support(&self) -> GicSupport {
        let has = |type_| {
            let mut device = kvm_create_device { type_, fd: 0, flags: KVM_CREATE_DEVICE_TEST };
            // SAFETY: the structure is what the ioctl takes, and with this flag nothing is created.
            unsafe { ioctl_with_mut_ref(&*self.vm, KVM_CREATE_DEVICE(), &mut device) == 0 }
        };
        GicSupport { v2: has(V2), v3: has(V3), its: has(ITS) }
    }

    pub(in crate::hypervisor::kvm) fn create_gic(&self, spec: &Gic) -> Result<()> {
        let gic = match &spec.parts {
            GicParts::V2 { cpu_interface, .. } => {
                let gic = self.create(V2, "a GICv2")?;
                place(&gic, KVM_VGIC_V2_ADDR_TYPE_DIST, spec.distributor.base, "the distributor")?;
                place(&gic, KVM_VGIC_V2_ADDR_TYPE_CPU, cpu_interface.base, "the CPU interface")?;
                gic
            }
            GicParts::V3 { redistributors, .. } => {
                let gic = self.create(V3, "a GICv3")?;
                place(&gic, KVM_VGIC_V3_ADDR_TYPE_DIST, spec.distributor.base, "the distributor")?;
                place_redistributors(&gic, redistributors)?;
                gic
            }
        };
        let interrupts = spec.interrupts;
        set(&gic, KVM_DEV_ARM_VGIC_GRP_NR_IRQS, 0, &interrupts)
            .map_err(refused(format!("give the GIC {interrupts} interrupts")))?;
        let vm = Arc::clone(&self.vm);
        let msi: Arc<dyn MsiSink> = match spec.parts {
            GicParts::V2 { frame, .. } => Arc::new(Frame::new(vm, frame, interrupts)),
            GicParts::V3 { .. } => Arc::new(MsiController::new(vm, Vec::new())),
        };
        let created = Created { spec: spec.clone(), gic, msi, complete: OnceLock::new() };
        self.created
            .set(created)
            .map_err(|_| error("create the GIC a second time", io::ErrorKind::AlreadyExists))
    }

    pub(in crate::hypervisor::kvm) fn complete_vcpus(&self, vcpus: u32) -> Result<()> {
        let created = self.created()?;
        control(&created.gic, KVM_DEV_ARM_VGIC_CTRL_INIT)
            .map_err(refused(format!("initialise the GIC for {vcpus} vCPUs")))?;
        let its = match created.spec.parts {
            GicParts::V3 { its: Some(at), .. } => {
                let its = self.create(ITS, "an interrupt translation service")?;
                place(&its, KVM_VGIC_ITS_ADDR_TYPE, at.base, "the interrupt translation service")?;
                control(&its, KVM_DEV_ARM_VGIC_CTRL_INIT)
                    .map_err(refused("initialise the interrupt translation service"))?;
                Some(its)
            }
            _ => None,
        };
        created
            .complete
            .set(Complete { vcpus, its })
            .map_err(|_| error("initialise the GIC a second time", io::ErrorKind::AlreadyExists))
    }

    pub(in crate::hypervisor::kvm) fn reset(&self) -> Result<()> {
        let created = self.created()?;
        let Some(Complete { vcpus, its }) = created.complete.get() else { return Ok(()) };
        if let Some(its) = its {
            control(its, KVM_DEV_ARM_ITS_CTRL_RESET)
                .map_err(refused("reset the interrupt translation service"))?;
        }
        Registers { gic: &created.gic, spec: &created.spec, vcpus: *vcpus }
            .reset()
            .map_err(refused("reset the GIC"))
    }

    pub(in crate::hypervisor::kvm) fn msi(&self) -> Arc<dyn MsiSink> {
        match self.created.get() {
            Some(created) => Arc::clone(&created.msi),
            None => Arc::new(MsiController::new(Arc::clone(&self.vm), Vec::new())),
        }
    }

    fn created(&self) -> Result<&Created> {
        self.created.get().ok_or_else(|| error("find the VM's GIC", io::ErrorKind::NotFound))
    }

    fn create(&self, type_: kvm_device_type, what: &str) -> Result<DeviceFd> {
        let mut device = kvm_create_device { type_, fd: 0, flags: 0 };
        self.vm.create_device(&mut device).map_err(refused(format!("create {what}")))
    }
}

/// Set attribute `attr` of `group` to `value`.
pub(super) fn set<T>(
    device: &DeviceFd,
    group: u32,
    attr: u64,
    value: &T,
) -> std::result::Result<(), kvm_ioctls::Error> {
    let addr = std::ptr::from_ref(value) as u64;
    device.set_device_attr(&kvm_device_attr { flags: 0, group, attr, addr })
}

fn control(device: &DeviceFd, attr: u32) -> std::result::Result<(), kvm_ioctls::Error> {
    let group = KVM_DEV_ARM_VGIC_GRP_CTRL;
    device.set_device_attr(&kvm_device_attr { flags: 0, group, attr: attr.into(), addr: 0 })
}

fn place(device: &DeviceFd, kind: u32, base: u64, what: &str) -> Result<()> {
    set(device, KVM_DEV_ARM_VGIC_GRP_ADDR, kind.into(), &base)
        .map_err(refused(format!("place {what} at {base:#x}")))
}

/// One region in the way that all hosts understand, several in the newer one: KVM takes no mixture.
fn place_redistributors(gic: &DeviceFd, regions: &[Range]) -> Result<()> {
    if let [region] = regions {
        return place(gic, KVM_VGIC_V3_ADDR_TYPE_REDIST, region.base, "the redistributors");
    }
    for (index, region) in (0_u64..).zip(regions) {
        let count = region.size / REDISTRIBUTOR_SIZE;
        let value = count << 52 | region.base | index;
        place(gic, KVM_VGIC_V3_ADDR_TYPE_REDIST_REGION, value, "a region of redistributors")?;
    }
    Ok(())
}
