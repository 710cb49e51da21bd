// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Linux KVM: `Documentation/virt/kvm/api.rst`.

#[cfg_attr(target_arch = "x86_64", path = "x86_64.rs")]
#[cfg_attr(target_arch = "aarch64", path = "aarch64/mod.rs")]
mod arch;
mod irq;
mod vcpu;

use std::io;
use std::sync::Arc;

use ecr_devices::irq::{DoorbellSink, IrqLine, MsiSink};
use kvm_bindings::{KVM_API_VERSION, KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, VmFd};

use super::{
    Capabilities, Gic, GicSupport, Hypervisor, HypervisorError, MemorySlot, Result, Vcpu, Vm,
};
use arch::InterruptController;
use irq::{Doorbells, Line};

const DEVICE: &str = "/dev/kvm";
/// Without these a guest cannot run.
const REQUIRED: [(Cap, &str); 6] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::ReadonlyMem, "KVM_CAP_READONLY_MEM"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
];

fn error(attempted: impl Into<String>, source: impl Into<io::Error>) -> HypervisorError {
    HypervisorError { attempted: attempted.into(), source: source.into() }
}

/// The same for a failed ioctl.
fn refused(attempted: impl Into<String>) -> impl FnOnce(kvm_ioctls::Error) -> HypervisorError {
    move |errno| error(attempted, io::Error::from_raw_os_error(errno.errno()))
}

/// The host's KVM.
#[derive(Debug)]
pub struct Kvm {
    kvm: kvm_ioctls::Kvm,
    capabilities: Capabilities,
}

impl Kvm {
    /// Open `/dev/kvm` and see what it can do.
    ///
    /// # Errors
    /// It is not there, may not be opened, or lacks something; the text says what to do.
    pub fn open() -> Result<Self> {
        let kvm = kvm_ioctls::Kvm::new().map_err(|errno| {
            let advice = match errno.errno() {
                libc::ENOENT => arch::NO_KVM,
                libc::EACCES | libc::EPERM => "this user may not use KVM: join the group 'kvm'",
                _ => "KVM cannot be used",
            };
            error(format!("open {DEVICE} ({advice})"), io::Error::from_raw_os_error(errno.errno()))
        })?;
        let version = kvm.get_api_version();
        if u32::try_from(version) != Ok(KVM_API_VERSION) {
            let attempted =
                format!("use {DEVICE} of API version {version}, {KVM_API_VERSION} is needed");
            return Err(error(attempted, io::ErrorKind::Unsupported));
        }
        if let Some((_, name)) = REQUIRED.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
            return Err(error(format!("find {name} in {DEVICE}"), io::ErrorKind::Unsupported));
        }
        let capabilities = Capabilities {
            accelerated: true,
            max_vcpus: u32::try_from(kvm.get_max_vcpus()).unwrap_or(u32::MAX),
            max_memory_slots: u32::try_from(kvm.get_nr_memslots()).unwrap_or(u32::MAX),
            ..arch::capabilities(&kvm)?
        };
        Ok(Self { kvm, capabilities })
    }
}

impl Hypervisor for Kvm {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn create_vm(&self, address_bits: u8) -> Result<Arc<dyn Vm>> {
        let fd = loop {
            match arch::create_vm(&self.kvm, address_bits) {
                // A pending signal interrupts it half-way.
                Err(errno) if errno.errno() == libc::EINTR => {}
                other => {
                    let attempted = format!("create a VM with {address_bits}-bit addresses");
                    break other.map_err(refused(attempted))?;
                }
            }
        };
        let fd = Arc::new(fd);
        Ok(Arc::new(KvmVm {
            controller: InterruptController::new(&fd)?,
            doorbells: Arc::new(Doorbells::new(Arc::clone(&fd))),
            fd,
        }))
    }
}

#[derive(Debug)]
struct KvmVm {
    fd: Arc<VmFd>,
    controller: InterruptController,
    doorbells: Arc<Doorbells>,
}

impl Vm for KvmVm {
    unsafe fn add_memory_slot(&self, slot: MemorySlot) -> Result<()> {
        let region = kvm_userspace_memory_region {
            slot: slot.slot,
            flags: if slot.read_only { KVM_MEM_READONLY } else { 0 },
            guest_phys_addr: slot.guest,
            memory_size: slot.size,
            userspace_addr: slot.host,
        };
        // SAFETY: the caller promises that the range stays mapped as long as the slot is there.
        unsafe { self.fd.set_user_memory_region(region) }.map_err(refused(format!(
            "give the guest {:#x} bytes of memory at {:#x}",
            slot.size, slot.guest
        )))
    }

    fn remove_memory_slot(&self, slot: u32) -> Result<()> {
        let region = kvm_userspace_memory_region { slot, ..Default::default() };
        // SAFETY: a slot of size zero refers to no memory.
        unsafe { self.fd.set_user_memory_region(region) }
            .map_err(refused(format!("take memory slot {slot} from the guest")))
    }

    fn gic_support(&self) -> GicSupport {
        self.controller.gic_support()
    }

    fn create_gic(&self, gic: &Gic) -> Result<()> {
        self.controller.create_gic(gic)
    }

    fn create_vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>> {
        let fd = self.fd.create_vcpu(id.into()).map_err(refused(format!("create vCPU {id}")))?;
        Ok(Box::new(vcpu::KvmVcpu::new(id, fd, &self.fd)?))
    }

    fn complete_vcpus(&self, count: u32) -> Result<()> {
        self.controller.complete_vcpus(count)
    }

    fn reset(&self) -> Result<()> {
        self.controller.reset()
    }

    fn irq_line(&self, gsi: u32) -> IrqLine {
        IrqLine::new(Arc::new(Line::new(Arc::clone(&self.fd), arch::line(gsi))))
    }

    fn msi(&self) -> Arc<dyn MsiSink> {
        self.controller.msi()
    }

    fn doorbells(&self) -> Arc<dyn DoorbellSink> {
        Arc::clone(&self.doorbells) as _
    }
}
