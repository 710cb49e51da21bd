// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What KVM has on x86 only: the in-kernel interrupt controllers, CPUID, MSRs, register state.

use std::fmt;
use std::io;
use std::sync::Arc;

use ecr_arch::x86::cpuid::CpuidEntry;
use ecr_arch::x86::regs::{BootRegs, DescriptorTable, Segment};
use ecr_arch::x86::{lapic, msr};
use ecr_devices::irq::MsiSink;
use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQCHIP_IOAPIC,
    KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY,
    Msrs, kvm_cpuid_entry2, kvm_debugregs, kvm_dtable, kvm_fpu, kvm_irq_routing_entry,
    kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_irqchip, kvm_irqchip, kvm_lapic_state,
    kvm_mp_state, kvm_msr_entry, kvm_pit_config, kvm_pit_state2, kvm_regs, kvm_segment, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

use super::super::{
    Architecture, Capabilities, Gic, GicSupport, Result, VcpuFacts, VcpuSetup, X86VcpuSetup,
};
use super::irq::MsiController;
use super::{error, refused};

/// One page for the identity map and three for the TSS that Intel processors need in real mode; where
/// QEMU puts them, below the local APICs' last page and out of every device's way.
const IDENTITY_MAP: u64 = 0xFEFF_C000;
const TSS: usize = 0xFEFF_D000;
/// Pins of the I/O APIC, and of the two 8259s together.
const IO_APIC_PINS: u32 = 24;
const PIC_PINS: u32 = 16;
/// What to do where `/dev/kvm` is not there.
pub(super) const NO_KVM: &str = "this machine has no KVM: load the module kvm_intel or kvm_amd, and enable virtualization in its firmware";
/// The interrupt controllers do not look at who sends a message.
pub(super) const MSI_FLAGS: u32 = 0;
const LEAF_ADDRESS_SIZES: u32 = 0x8000_0008;
/// Width that every 64-bit processor has, for hosts that do not say.
const DEFAULT_ADDRESS_BITS: u8 = 36;

pub(super) fn capabilities(kvm: &Kvm) -> Result<Capabilities> {
    let cpuid = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(refused("ask which CPUID leaves this host can show"))?;
    let cpuid: Vec<CpuidEntry> = cpuid.as_slice().iter().map(from_kvm).collect();
    let physical_address_bits = cpuid
        .iter()
        .find(|entry| entry.function == LEAF_ADDRESS_SIZES)
        .and_then(|entry| u8::try_from(entry.eax & 0xFF).ok())
        .filter(|&bits| bits != 0)
        .unwrap_or(DEFAULT_ADDRESS_BITS);
    Ok(Capabilities {
        architectures: &[Architecture::X86_64],
        accelerated: true,
        max_vcpus: 0,
        max_memory_slots: 0,
        physical_address_bits,
        cpuid,
    })
}

pub(super) fn create_vm(
    kvm: &Kvm,
    _address_bits: u8,
) -> std::result::Result<VmFd, kvm_ioctls::Error> {
    kvm.create_vm()
}

/// The number of input `gsi` in KVM_IRQ_LINE.
pub(super) fn line(gsi: u32) -> u32 {
    gsi
}

/// What else to say of a failed KVM_RUN.
pub(super) fn run_error_hint(_errno: i32) -> &'static str {
    ""
}

/// The two 8259s, the I/O APIC, and the timer.
#[derive(Debug)]
pub(super) struct InterruptController {
    vm: Arc<VmFd>,
    msi: Arc<MsiController>,
    pristine: PristineVm,
}

impl InterruptController {
    pub(super) fn new(vm: &Arc<VmFd>) -> Result<Self> {
        set_up_vm(vm)?;
        Ok(Self {
            vm: Arc::clone(vm),
            msi: Arc::new(MsiController::new(Arc::clone(vm), default_routes())),
            pristine: PristineVm::of(vm)?,
        })
    }

    pub(super) fn gic_support(&self) -> GicSupport {
        GicSupport::default()
    }

    pub(super) fn create_gic(&self, _gic: &Gic) -> Result<()> {
        Err(error("create a GIC on x86", io::ErrorKind::Unsupported))
    }

    pub(super) fn complete_vcpus(&self, _count: u32) -> Result<()> {
        Ok(())
    }

    pub(super) fn reset(&self) -> Result<()> {
        self.pristine.restore(&self.vm)
    }

    pub(super) fn msi(&self) -> Arc<dyn MsiSink> {
        Arc::clone(&self.msi) as _
    }
}

fn set_up_vm(vm: &VmFd) -> Result<()> {
    if vm.check_extension(Cap::SetIdentityMapAddr) {
        vm.set_identity_map_address(IDENTITY_MAP).map_err(refused("place the identity map"))?;
    }
    vm.set_tss_address(TSS).map_err(refused("place the TSS"))?;
    vm.create_irq_chip().map_err(refused("create the interrupt controllers"))?;
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(pit).map_err(refused("create the timer"))
}

/// The interrupt controllers and the timer as KVM created them: what a reset goes back to.
struct PristineVm {
    controllers: [kvm_irqchip; 3],
    timer: kvm_pit_state2,
}

impl fmt::Debug for PristineVm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PristineVm")
    }
}

impl PristineVm {
    fn of(vm: &VmFd) -> Result<Self> {
        let read = || -> std::result::Result<Self, kvm_ioctls::Error> {
            let mut controllers =
                [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC]
                    .map(|chip_id| kvm_irqchip { chip_id, ..Default::default() });
            controllers.iter_mut().try_for_each(|controller| vm.get_irqchip(controller))?;
            Ok(Self { controllers, timer: vm.get_pit2()? })
        };
        read().map_err(refused("read the state of new interrupt controllers"))
    }

    fn restore(&self, vm: &VmFd) -> Result<()> {
        self.controllers
            .iter()
            .try_for_each(|controller| vm.set_irqchip(controller))
            .and_then(|()| vm.set_pit2(&self.timer))
            .map_err(refused("reset the interrupt controllers"))
    }
}

/// How KVM routes pins before it is told otherwise; a table of ours must keep it.
fn default_routes() -> Vec<kvm_irq_routing_entry> {
    let route = |gsi, irqchip, pin| kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            irqchip: kvm_irq_routing_irqchip { irqchip, pin },
        },
        ..Default::default()
    };
    let pic = (0..PIC_PINS).map(|gsi| match gsi {
        0..8 => route(gsi, KVM_IRQCHIP_PIC_MASTER, gsi),
        _ => route(gsi, KVM_IRQCHIP_PIC_SLAVE, gsi - 8),
    });
    pic.chain((0..IO_APIC_PINS).map(|gsi| route(gsi, KVM_IRQCHIP_IOAPIC, gsi))).collect()
}

pub(super) fn facts(_id: u32, vcpu: &VcpuFd) -> Result<VcpuFacts> {
    let tsc_khz = vcpu.get_tsc_khz().ok().filter(|&khz| khz != 0);
    Ok(VcpuFacts { tsc_khz, ..VcpuFacts::default() })
}

/// Set `PVCLOCK_GUEST_STOPPED`, upon which Linux calms its watchdogs.
pub(super) fn note_pause(vcpu: &VcpuFd) {
    // Refused where the guest does not use the clock: then there is nobody to tell.
    let _ = vcpu.kvmclock_ctrl();
}

/// Where a vCPU stands, for error messages.
pub(super) fn place(vcpu: &VcpuFd) -> String {
    match vcpu.get_regs() {
        Ok(regs) => format!("rip {:#x}", regs.rip),
        Err(errno) => format!("an unknown place ({errno})"),
    }
}

/// What it takes to set a vCPU to its start.
#[derive(Debug)]
pub(super) struct StartState {
    pristine: Pristine,
    /// What it shows already: once the vCPU has run, some kernels refuse even the same CPUID again.
    cpuid: Vec<CpuidEntry>,
}

impl StartState {
    pub(super) fn new(_id: u32, vcpu: &VcpuFd, _vm: &VmFd) -> Result<Self> {
        Ok(Self { pristine: Pristine::of(vcpu)?, cpuid: Vec::new() })
    }

    pub(super) fn apply(&mut self, id: u32, vcpu: &VcpuFd, setup: &VcpuSetup) -> Result<()> {
        let VcpuSetup::X86(setup) = setup else {
            let attempted = format!("start vCPU {id} as one of another architecture");
            return Err(error(attempted, io::ErrorKind::Unsupported));
        };
        if self.cpuid != setup.cpuid {
            set_cpuid(id, vcpu, &setup.cpuid)?;
            self.cpuid.clone_from(&setup.cpuid);
        }
        set_up_vcpu(id, vcpu, &self.pristine, setup)
    }
}

/// State of a vCPU as KVM created it: what a reset goes back to.
#[derive(Debug)]
struct Pristine {
    regs: kvm_regs,
    sregs: kvm_sregs,
    fpu: kvm_fpu,
    lapic: kvm_lapic_state,
    events: kvm_vcpu_events,
    debug: kvm_debugregs,
    xcrs: Option<kvm_xcrs>,
    mp_state: kvm_mp_state,
}

impl Pristine {
    fn of(vcpu: &VcpuFd) -> Result<Self> {
        let read = || -> std::result::Result<Self, kvm_ioctls::Error> {
            Ok(Self {
                regs: vcpu.get_regs()?,
                sregs: vcpu.get_sregs()?,
                fpu: vcpu.get_fpu()?,
                lapic: vcpu.get_lapic()?,
                events: vcpu.get_vcpu_events()?,
                debug: vcpu.get_debug_regs()?,
                // Hosts without XSAVE have none.
                xcrs: vcpu.get_xcrs().ok(),
                mp_state: vcpu.get_mp_state()?,
            })
        };
        read().map_err(refused("read the state of a new vCPU"))
    }

    fn restore(&self, vcpu: &VcpuFd) -> std::result::Result<(), kvm_ioctls::Error> {
        vcpu.set_sregs(&self.sregs)?;
        vcpu.set_regs(&self.regs)?;
        vcpu.set_fpu(&self.fpu)?;
        vcpu.set_vcpu_events(&self.events)?;
        vcpu.set_debug_regs(&self.debug)?;
        if let Some(xcrs) = &self.xcrs {
            vcpu.set_xcrs(xcrs)?;
        }
        vcpu.set_mp_state(self.mp_state)
    }
}

/// MSRs through which a guest lends memory to KVM: they must be off before that memory changes its use.
/// `Documentation/virt/kvm/x86/msr.rst`: wall clock, system time, async page faults, steal time, EOI.
const LENT_MEMORY: [u32; 7] =
    [0x11, 0x12, 0x4b56_4d00, 0x4b56_4d01, 0x4b56_4d02, 0x4b56_4d03, 0x4b56_4d04];

fn set_cpuid(id: u32, vcpu: &VcpuFd, entries: &[CpuidEntry]) -> Result<()> {
    let attempted = format!("set CPUID of vCPU {id}");
    let entries: Vec<_> = entries.iter().map(to_kvm).collect();
    match CpuId::from_entries(&entries) {
        Ok(cpuid) => vcpu.set_cpuid2(&cpuid).map_err(refused(attempted)),
        Err(_) => Err(error(attempted, io::Error::other("too many leaves"))),
    }
}

fn set_up_vcpu(id: u32, vcpu: &VcpuFd, pristine: &Pristine, setup: &X86VcpuSetup) -> Result<()> {
    let attempt = |what: &str| format!("set {what} of vCPU {id}");
    pristine.restore(vcpu).map_err(refused(attempt("the initial state")))?;
    set_lapic(vcpu, pristine).map_err(refused(attempt("the local APIC")))?;
    for index in LENT_MEMORY {
        // KVM refuses those whose feature the guest was not shown: they are off then.
        let _ = set_msrs(vcpu, &[kvm_msr_entry { index, ..Default::default() }]);
    }
    let msrs: Vec<_> = msr::AT_BOOT
        .iter()
        .map(|msr| kvm_msr_entry { index: msr.index, data: msr.value, ..Default::default() })
        .collect();
    match set_msrs(vcpu, &msrs).map_err(refused(attempt("the MSRs")))? {
        set if set == msrs.len() => {}
        set => {
            let attempted = format!("set MSR {:#x} of vCPU {id}", msrs[set].index);
            return Err(error(attempted, io::ErrorKind::InvalidInput));
        }
    }
    if let Some(regs) = &setup.regs {
        set_boot_regs(vcpu, pristine, regs).map_err(refused(attempt("the registers")))?;
    }
    Ok(())
}

fn set_msrs(
    vcpu: &VcpuFd,
    entries: &[kvm_msr_entry],
) -> std::result::Result<usize, kvm_ioctls::Error> {
    let msrs = Msrs::from_entries(entries).map_err(|_| kvm_ioctls::Error::new(libc::E2BIG))?;
    vcpu.set_msrs(&msrs)
}

fn set_lapic(vcpu: &VcpuFd, pristine: &Pristine) -> std::result::Result<(), kvm_ioctls::Error> {
    let mut state = pristine.lapic;
    for register in lapic::AT_BOOT {
        let at = usize::from(register.offset);
        for (byte, value) in state.regs[at..at + 4].iter_mut().zip(register.value.to_le_bytes()) {
            *byte = value as std::ffi::c_char;
        }
    }
    vcpu.set_lapic(&state)
}

fn set_boot_regs(
    vcpu: &VcpuFd,
    pristine: &Pristine,
    boot: &BootRegs,
) -> std::result::Result<(), kvm_ioctls::Error> {
    let data = segment(&boot.data);
    let sregs = kvm_sregs {
        cs: segment(&boot.cs),
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        tr: segment(&boot.tr),
        gdt: descriptor_table(&boot.gdt),
        cr0: boot.cr0,
        cr3: boot.cr3,
        cr4: boot.cr4,
        efer: boot.efer,
        ..pristine.sregs
    };
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&kvm_regs {
        rip: boot.rip,
        rsi: boot.rsi,
        rbx: boot.rbx,
        rflags: boot.rflags,
        ..Default::default()
    })
}

fn segment(segment: &Segment) -> kvm_segment {
    let bits = |shift: u32, mask: u16| ((segment.attributes >> shift) & mask) as u8;
    kvm_segment {
        base: segment.base,
        limit: segment.limit,
        selector: segment.selector,
        type_: bits(0, 0xF),
        s: bits(4, 1),
        dpl: bits(5, 3),
        present: bits(7, 1),
        avl: bits(12, 1),
        l: bits(13, 1),
        db: bits(14, 1),
        g: bits(15, 1),
        ..Default::default()
    }
}

fn descriptor_table(table: &DescriptorTable) -> kvm_dtable {
    kvm_dtable { base: table.base, limit: table.limit, ..Default::default() }
}

fn from_kvm(entry: &kvm_cpuid_entry2) -> CpuidEntry {
    CpuidEntry {
        function: entry.function,
        index: entry.index,
        indexed: entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0,
        eax: entry.eax,
        ebx: entry.ebx,
        ecx: entry.ecx,
        edx: entry.edx,
    }
}

fn to_kvm(entry: &CpuidEntry) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 {
        function: entry.function,
        index: entry.index,
        flags: if entry.indexed { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 },
        eax: entry.eax,
        ebx: entry.ebx,
        ecx: entry.ecx,
        edx: entry.edx,
        ..Default::default()
    }
}
