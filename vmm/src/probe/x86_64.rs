// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The guest of an x86_64 host. It tells of its steps at port 0x80.

use ecr_arch::layout::Range;
use ecr_arch::x86::cpuid::{self, Topology};
use ecr_arch::x86::regs::{self, BootRegs};

use super::{ProbeError, Proof, follow, load, ram};
use crate::hypervisor::{Hypervisor, VcpuSetup, X86VcpuSetup};

const RAM: Range = Range { base: 0, size: 4 << 20 };
const GDT: u64 = 0x4000;
const ENTRY: u64 = 0x8000;
const PAGE_TABLES: u64 = 0x1_0000;

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

pub(super) fn run(hypervisor: &dyn Hypervisor) -> Result<Proof, ProbeError> {
    let vm = &hypervisor.create_vm(hypervisor.capabilities().physical_address_bits)?;
    // Dropped after the vCPU, which runs in it.
    let memory = ram(vm, RAM)?;
    load(&memory, ENTRY, payload())?;
    load(&memory, GDT, &regs::gdt_bytes(&regs::GDT_64))?;
    load(&memory, PAGE_TABLES, &regs::identity_page_tables(PAGE_TABLES))?;
    let vcpu = vm.create_vcpu(0)?;
    let topology = Topology { apic_id: 0, cores: 1 };
    let tsc_khz = vcpu.facts()?.tsc_khz;
    let setup = VcpuSetup::X86(X86VcpuSetup {
        cpuid: cpuid::for_vcpu(&hypervisor.capabilities().cpuid, topology, tsc_khz),
        regs: Some(BootRegs { rip: ENTRY, ..BootRegs::long_mode(GDT, PAGE_TABLES) }),
    });
    follow(vcpu, setup, &STEPS)
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
