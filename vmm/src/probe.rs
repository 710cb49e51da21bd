// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Find out whether the host can run a guest at all.
//!
//! A `/dev/kvm` that opens proves little: some create VMs and then cannot emulate an instruction of a stock kernel. So
//! [`probe`] runs a guest of a few hundred bytes that does what such a kernel does while it boots, step by step, and says
//! after each that it has come so far. A step that fails is named, with the hypervisor's reason.

use std::fmt;
use std::sync::Arc;

use crate::hypervisor::{Hypervisor, HypervisorError};
use crate::memory::MemoryError;

/// Why the host cannot run a guest.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// The hypervisor refused to build the machine.
    #[error(transparent)]
    Hypervisor(#[from] HypervisorError),
    /// The machine got no memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The host refused a thread.
    #[error("start the thread of a vCPU: {0}")]
    Thread(std::io::Error),
    /// The guest came to grief.
    #[error("a guest that does what a kernel does at boot failed at {step}: {reason}")]
    Guest {
        /// What it attempted.
        step: &'static str,
        /// What became of it.
        reason: String,
    },
}

/// What a guest has shown that the host can do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proof {
    /// What the guest did, in its order. Empty where there is no payload for this architecture: a VM could be created.
    pub steps: Vec<&'static str>,
}

impl fmt::Display for Proof {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.steps.join(", "))
    }
}

/// Create a VM and let it do what a kernel does at boot.
///
/// # Errors
/// What the host cannot do.
pub fn probe(hypervisor: &Arc<dyn Hypervisor>) -> Result<Proof, ProbeError> {
    let vm = hypervisor.create_vm(hypervisor.capabilities().physical_address_bits)?;
    #[cfg(target_arch = "x86_64")]
    return x86_64::run(&**hypervisor, &vm);
    #[cfg(not(target_arch = "x86_64"))]
    {
        drop(vm);
        Ok(Proof { steps: Vec::new() })
    }
}

#[cfg(target_arch = "x86_64")]
mod x86_64 {
    use std::sync::Arc;
    use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
    use std::time::Duration;

    use ecr_arch::layout::Range;
    use ecr_arch::x86::cpuid::{self, Topology};
    use ecr_arch::x86::regs::{self, BootRegs};
    use vm_memory::{Bytes, GuestAddress};

    use super::{ProbeError, Proof};
    use crate::hypervisor::{Hypervisor, IoHandler, VcpuSetup, Vm, X86VcpuSetup};
    use crate::memory::{MemoryManager, RamBacking};
    use crate::vcpu::{VcpuEvent, VcpuThread};

    /// A guest that says nothing for so long is stuck.
    const PATIENCE: Duration = Duration::from_secs(10);
    const RAM: Range = Range { base: 0, size: 4 << 20 };
    const GDT: u64 = 0x4000;
    const ENTRY: u64 = 0x8000;
    const PAGE_TABLES: u64 = 0x1_0000;
    /// The guest writes the number of each step here when it has done it.
    const PORT: u16 = 0x80;

    /// What each number stands for, from 1 on.
    const STEPS: [&str; 7] = [
        "running in long mode",
        "CPUID and the time stamp counter",
        "model specific registers",
        "a new mapping in the page tables",
        "string instructions",
        "atomic instructions (cmpxchg16b, xadd)",
        "floating point and SSE",
    ];

    enum Seen {
        Step(u8),
        Event(VcpuEvent),
    }

    struct Port(Sender<Seen>);

    impl IoHandler for Port {
        fn mmio_read(&self, _: u64, data: &mut [u8]) {
            data.fill(0xFF);
        }
        fn mmio_write(&self, _: u64, _: &[u8]) {}
        fn pio_read(&self, _: u16, data: &mut [u8]) {
            data.fill(0xFF);
        }
        fn pio_write(&self, port: u16, data: &[u8]) {
            if let (PORT, [step]) = (port, data) {
                // Nobody may be waiting any more.
                let _ = self.0.send(Seen::Step(*step));
            }
        }
    }

    pub(super) fn run(hypervisor: &dyn Hypervisor, vm: &Arc<dyn Vm>) -> Result<Proof, ProbeError> {
        let ram = RamBacking { shared: false, hugepages: None, prealloc: false, path: None };
        // Dropped after the vCPU, which runs in it.
        let mut memory = MemoryManager::new(Arc::clone(vm));
        memory.add_ram(&[RAM], &ram)?;
        let view = memory.view();
        for (address, bytes) in [
            (ENTRY, payload()),
            (GDT, &regs::gdt_bytes(&regs::GDT_64)),
            (PAGE_TABLES, &regs::identity_page_tables(PAGE_TABLES)),
        ] {
            view.write_slice(bytes, GuestAddress(address)).map_err(|error| {
                let step = "being put into its memory";
                ProbeError::Guest { step, reason: error.to_string() }
            })?;
        }
        let vcpu = vm.create_vcpu(0)?;
        let topology = Topology { apic_id: 0, cores: 1 };
        let tsc_khz = vcpu.facts()?.tsc_khz;
        let setup = VcpuSetup::X86(X86VcpuSetup {
            cpuid: cpuid::for_vcpu(&hypervisor.capabilities().cpuid, topology, tsc_khz),
            regs: Some(BootRegs { rip: ENTRY, ..BootRegs::long_mode(GDT, PAGE_TABLES) }),
        });
        let (sender, seen) = mpsc::channel();
        let listener = {
            let sender = sender.clone();
            Arc::new(move |_, event| {
                // Nobody may be waiting any more.
                let _ = sender.send(Seen::Event(event));
            })
        };
        let thread = VcpuThread::spawn(0, vcpu, setup, Arc::new(Port(sender)), listener)
            .map_err(ProbeError::Thread)?;
        thread.wait_paused();
        thread.resume();
        let outcome = watch(&seen);
        drop(thread);
        outcome
    }

    /// Follow the guest's steps to the last.
    fn watch(seen: &Receiver<Seen>) -> Result<Proof, ProbeError> {
        for (number, step) in (1_u8..).zip(STEPS) {
            let reason = match seen.recv_timeout(PATIENCE) {
                Ok(Seen::Step(done)) if done == number => continue,
                Ok(Seen::Step(done)) => format!("its result is wrong (code {done:#x})"),
                Ok(Seen::Event(VcpuEvent::Failed(text))) => text,
                Ok(Seen::Event(VcpuEvent::Shutdown(kind))) => format!("it shut down: {kind:?}"),
                Err(RecvTimeoutError::Timeout) => format!("it does nothing for {PATIENCE:?}"),
                Err(RecvTimeoutError::Disconnected) => "its vCPU is gone".into(),
            };
            return Err(ProbeError::Guest { step, reason });
        }
        Ok(Proof { steps: STEPS.to_vec() })
    }

    /// The guest's code. It writes 0xEE where a result is wrong, and halts. Free memory begins at 0x20_0000; the page
    /// directory of the first gigabyte is at 0x1_2000, and what is mapped at 3 GiB has its directory at 0x1_5000.
    fn payload() -> &'static [u8] {
        let (start, end): (*const u8, *const u8);
        // SAFETY: two addresses are computed; the payload lies in read-only data and is not executed here.
        unsafe {
            std::arch::asm!(
                "lea {start}, [rip + 98f]",
                "lea {end}, [rip + 99f]",
                ".pushsection .rodata.ecr_probe, \"a\"",
                "98:",
                "mov rsp, 0x300000",
                // 1: long mode: a 64-bit value survives a call.
                "mov rax, 0x1122334455667788",
                "call 92f",
                "mov al, 1",
                "out 0x80, al",
                // 2: CPUID has leaf 1 and says long mode; the time stamp counter runs.
                "xor eax, eax",
                "cpuid",
                "test eax, eax",
                "jz 90f",
                "mov eax, 0x80000001",
                "cpuid",
                "bt edx, 29",
                "jnc 90f",
                "rdtsc",
                "mov esi, eax",
                "mov edi, edx",
                "lfence",
                "rdtsc",
                "sub eax, esi",
                "sbb edx, edi",
                "js 90f",
                "mov al, 2",
                "out 0x80, al",
                // 3: EFER is read and written, IA32_GS_BASE keeps what is put there, swapgs swaps.
                "mov ecx, 0xc0000080",
                "rdmsr",
                "or eax, 1",
                "wrmsr",
                "mov ecx, 0xc0000101",
                "mov eax, 0x12345678",
                "xor edx, edx",
                "wrmsr",
                "swapgs",
                "swapgs",
                "rdmsr",
                "cmp eax, 0x12345678",
                "jne 90f",
                "mov al, 3",
                "out 0x80, al",
                // 4: 3 GiB now leads to the second 2 MiB; entries have present, writable, large.
                "mov rdi, 0xc0000000",
                "mov qword ptr [0x201000], 10",
                "mov qword ptr [0x15000], 0x200083",
                "invlpg [rdi]",
                "mov rax, [rdi + 0x1000]",
                "cmp rax, 10",
                "jne 90f",
                "mov rax, cr3",
                "mov cr3, rax",
                "mov al, 4",
                "out 0x80, al",
                // 5: fill and copy a page.
                "cld",
                "mov rdi, 0x202000",
                "mov ecx, 512",
                "mov rax, 0x5a5a5a5a5a5a5a5a",
                "rep stosq",
                "mov rsi, 0x202000",
                "mov rdi, 0x203000",
                "mov ecx, 4096",
                "rep movsb",
                "cmp byte ptr [0x203fff], 0x5a",
                "jne 90f",
                "mov al, 5",
                "out 0x80, al",
                // 6: 16 bytes at once, and a counter.
                "mov rsi, 0x201000",
                "mov qword ptr [rsi], 5",
                "mov qword ptr [rsi + 8], 6",
                "mov eax, 5",
                "mov edx, 6",
                "mov ebx, 7",
                "mov ecx, 8",
                "lock cmpxchg16b [rsi]",
                "jne 90f",
                "cmp qword ptr [rsi + 8], 8",
                "jne 90f",
                "mov eax, 3",
                "lock xadd [rsi], rax",
                "cmp rax, 7",
                "jne 90f",
                "cmp qword ptr [rsi], 10",
                "jne 90f",
                "mov al, 6",
                "out 0x80, al",
                // 7: CR4.OSFXSR and OSXMMEXCPT, CR0.MP; state is saved and restored.
                "mov rax, cr4",
                "or eax, 0x600",
                "mov cr4, rax",
                "mov rax, cr0",
                "or eax, 2",
                "mov cr0, rax",
                "fninit",
                "mov rax, 0x0123456789abcdef",
                "movq xmm0, rax",
                "fxsave64 [0x200000]",
                "pxor xmm0, xmm0",
                "fxrstor64 [0x200000]",
                "movq rbx, xmm0",
                "cmp rax, rbx",
                "jne 90f",
                "mov al, 7",
                "out 0x80, al",
                "91: hlt",
                "jmp 91b",
                "90: mov al, 0xee",
                "out 0x80, al",
                "jmp 91b",
                "92: push rax",
                "pop rbx",
                "cmp rax, rbx",
                "jne 90b",
                "ret",
                "99:",
                ".popsection",
                start = out(reg) start,
                end = out(reg) end,
                options(nomem, nostack, preserves_flags),
            );
            // SAFETY: both labels lie in one section, in this order.
            std::slice::from_raw_parts(start, end.offset_from(start).unsigned_abs())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor;

    /// A limited KVM may fail; then it says at what, and quickly.
    #[test]
    fn the_host_is_told_apart() {
        let Ok(host) = hypervisor::host() else { return };
        match probe(&host) {
            Ok(proof) => assert_eq!(proof.to_string().is_empty(), proof.steps.is_empty()),
            Err(ProbeError::Guest { step, reason }) => {
                assert!(!step.is_empty() && !reason.is_empty());
            }
            Err(error) => panic!("{error}"),
        }
    }
}
