// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! A guest of a few hundred bytes on the real `/dev/kvm`: its payload is assembled into the test, and all it
//! does with ports and unbacked memory arrives as [`Seen`].

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::Duration;

use ecr_arch::layout::Range;
use ecr_arch::x86::cpuid::{self, Topology};
use ecr_arch::x86::regs::{self, BootRegs, Segment};
use ecr_vmm::hypervisor::{Hypervisor, IoHandler, VcpuSetup, Vm, X86VcpuSetup, kvm::Kvm};
use ecr_vmm::memory::{MemoryManager, RamBacking};
use ecr_vmm::vcpu::{VcpuEvent, VcpuThread};
use vm_memory::{Bytes, GuestAddress};

/// RAM from address 0 on.
const RAM_SIZE: u64 = 4 << 20;
/// Where payloads start.
pub const ENTRY: u64 = 0x8000;
const GDT: u64 = 0x4000;
const PAGE_TABLES: u64 = 0x10000;
/// Reads of this port yield what the test last [`Guest::tell`]s.
const CONTROL_PORT: u16 = 0x60;
/// What unbacked memory and other ports read as.
pub const NOBODY: u8 = 0xEE;
/// A guest that says nothing for so long is stuck.
const PATIENCE: Duration = Duration::from_secs(30);

/// Code for the guest, assembled with the test. Its local labels are numbers below 90.
#[macro_export]
macro_rules! payload {
    ($mode:literal, $($line:expr),+ $(,)?) => {{
        let (start, end): (*const u8, *const u8);
        // SAFETY: two addresses are computed; the payload lies in read-only data and is not executed here.
        unsafe {
            std::arch::asm!(
                "lea {start}, [rip + 98f]",
                "lea {end}, [rip + 99f]",
                ".pushsection .rodata.payload, \"a\"",
                $mode,
                "98:",
                $($line,)+
                "99:",
                ".code64",
                ".popsection",
                start = out(reg) start,
                end = out(reg) end,
                options(nomem, nostack, preserves_flags),
            );
            // SAFETY: both labels lie in one section, in this order.
            std::slice::from_raw_parts(start, end.offset_from(start) as usize)
        }
    }};
}

/// What the guest did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Seen {
    /// A write to a port.
    Port(u16, Vec<u8>),
    /// A write to unbacked memory.
    Memory(u64, Vec<u8>),
    /// A vCPU reported something.
    Event(u32, VcpuEvent),
}

struct Devices {
    seen: Sender<Seen>,
    control: AtomicU8,
}

impl IoHandler for Devices {
    fn mmio_read(&self, _address: u64, data: &mut [u8]) {
        data.fill(NOBODY);
    }
    fn mmio_write(&self, address: u64, data: &[u8]) {
        let _ = self.seen.send(Seen::Memory(address, data.to_vec()));
    }
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        data.fill(if port == CONTROL_PORT { self.control.load(Ordering::SeqCst) } else { NOBODY });
    }
    fn pio_write(&self, port: u16, data: &[u8]) {
        let _ = self.seen.send(Seen::Port(port, data.to_vec()));
    }
}

/// How a payload starts.
#[derive(Debug, Clone, Copy)]
pub enum Mode {
    /// 16 bits, segments at 0; data segments of 4 GiB, so that the APICs are in reach.
    Real,
    /// 64 bits, the first 4 GiB mapped to themselves.
    Long,
}

/// The guest. vCPUs are dropped before the memory that they run in.
pub struct Guest {
    pub vcpus: Vec<VcpuThread>,
    pub memory: MemoryManager,
    pub vm: Arc<dyn Vm>,
    setups: Vec<VcpuSetup>,
    devices: Arc<Devices>,
    seen: Receiver<Seen>,
}

/// The host's KVM, or a loud reason why the test is skipped.
pub fn kvm() -> Option<Kvm> {
    match Kvm::open() {
        Ok(kvm) => Some(kvm),
        Err(error) if std::path::Path::new("/dev/kvm").exists() => panic!("{error}"),
        Err(error) => {
            eprintln!("SKIPPED: {error}");
            None
        }
    }
}

impl Guest {
    /// One vCPU, paused at `payload`; `None` where there is no KVM.
    pub fn new(mode: Mode, payload: &[u8]) -> Option<Self> {
        Self::with_vcpus(1, mode, payload)
    }

    /// The same with `count` vCPUs, of which the first starts at `payload`.
    pub fn with_vcpus(count: u32, mode: Mode, payload: &[u8]) -> Option<Self> {
        let kvm = kvm()?;
        let vm = kvm.create_vm(kvm.capabilities().physical_address_bits).unwrap();
        let ram = RamBacking { shared: false, hugepages: None, prealloc: false, path: None };
        let mut memory = MemoryManager::new(Arc::clone(&vm));
        memory.add_ram(&[Range { base: 0, size: RAM_SIZE }], &ram).unwrap();
        let (sender, seen) = mpsc::channel();
        let devices = Arc::new(Devices { seen: sender.clone(), control: AtomicU8::new(0) });
        let mut guest = Self { vcpus: Vec::new(), memory, vm, setups: Vec::new(), devices, seen };
        guest.load(ENTRY, payload);
        guest.load(GDT, &regs::gdt_bytes(&regs::GDT_64));
        guest.load(PAGE_TABLES, &regs::identity_page_tables(PAGE_TABLES));
        for id in 0..count {
            let vcpu = guest.vm.create_vcpu(id).unwrap();
            let topology = Topology { apic_id: id, cores: count };
            let tsc_khz = vcpu.facts().unwrap().tsc_khz;
            let setup = VcpuSetup::X86(X86VcpuSetup {
                cpuid: cpuid::for_vcpu(&kvm.capabilities().cpuid, topology, tsc_khz),
                regs: (id == 0).then(|| boot_regs(mode)),
            });
            guest.setups.push(setup.clone());
            let sender = sender.clone();
            let listener = Arc::new(move |index, event| {
                let _ = sender.send(Seen::Event(index, event));
            });
            let io = Arc::clone(&guest.devices);
            guest.vcpus.push(VcpuThread::spawn(id, vcpu, setup, io, listener).unwrap());
        }
        guest.wait_paused();
        Some(guest)
    }

    /// Put `bytes` into RAM.
    pub fn load(&self, address: u64, bytes: &[u8]) {
        self.memory.view().write_slice(bytes, GuestAddress(address)).unwrap();
    }

    /// A byte of RAM.
    pub fn byte(&self, address: u64) -> u8 {
        self.memory.view().read_obj(GuestAddress(address)).unwrap()
    }

    /// Let `vector` be handled by the code at `handler`, in real mode.
    pub fn handle_interrupt(&self, vector: u16, handler: u64) {
        self.load(u64::from(vector) * 4, &(handler as u32).to_le_bytes());
    }

    /// What the guest reads from [`CONTROL_PORT`] from now on.
    pub fn tell(&self, value: u8) {
        self.devices.control.store(value, Ordering::SeqCst);
    }

    /// Let all vCPUs run.
    pub fn resume(&self) {
        self.vcpus.iter().for_each(VcpuThread::resume);
    }

    /// Stop all vCPUs.
    pub fn pause(&self) {
        self.vcpus.iter().for_each(VcpuThread::pause);
        self.wait_paused();
    }

    /// What a machine's reset does, except for the contents of RAM.
    pub fn reset(&self) {
        self.pause();
        self.vm.reset().unwrap();
        self.vcpus.iter().zip(&self.setups).for_each(|(vcpu, setup)| vcpu.reset(setup.clone()));
        self.wait_paused();
    }

    fn wait_paused(&self) {
        self.vcpus.iter().for_each(VcpuThread::wait_paused);
    }

    /// What the guest does next.
    #[track_caller]
    pub fn next(&self) -> Seen {
        match self.seen.recv_timeout(PATIENCE) {
            Ok(seen) => seen,
            Err(RecvTimeoutError::Timeout) => panic!("the guest says nothing"),
            Err(RecvTimeoutError::Disconnected) => unreachable!("the guest holds a sender"),
        }
    }

    /// The guest writes the byte `value` to `port` next.
    #[track_caller]
    pub fn expect_port(&self, port: u16, value: u8) {
        assert_eq!(self.next(), Seen::Port(port, vec![value]));
    }

    /// Skip what the guest does until it writes the byte `value` to `port`.
    #[track_caller]
    pub fn wait_for_port(&self, port: u16, value: u8) {
        loop {
            match self.next() {
                Seen::Event(index, event) => panic!("vCPU {index}: {event:?}"),
                seen if seen == Seen::Port(port, vec![value]) => return,
                _ => {}
            }
        }
    }

    /// What the guest has done that nobody has looked at.
    pub fn rest(&self) -> Vec<Seen> {
        self.seen.try_iter().collect()
    }
}

fn boot_regs(mode: Mode) -> BootRegs {
    const CODE_16: u16 = 0x009B;
    const DATA_16_PAGES: u16 = 0x8093;
    const TSS_BUSY: u16 = 0x008B;
    const CR0_ET: u64 = 1 << 4;
    let segment = |limit, attributes| Segment { limit, attributes, ..Segment::default() };
    match mode {
        Mode::Long => BootRegs { rip: ENTRY, ..BootRegs::long_mode(GDT, PAGE_TABLES) },
        Mode::Real => BootRegs {
            rip: ENTRY,
            rflags: 2,
            cs: segment(0xFFFF, CODE_16),
            data: segment(u32::MAX, DATA_16_PAGES),
            tr: segment(0xFFFF, TSS_BUSY),
            cr0: CR0_ET,
            ..BootRegs::default()
        },
    }
}
