// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The guest of an aarch64 host. It tells of its steps at address 0.

use ecr_arch::arm64::regs::BootRegs;
use ecr_arch::layout::Range;
use ecr_arch::layout::virt::{
    GIC_CPU_INTERFACE, GIC_DISTRIBUTOR, GIC_ITS, GIC_V2M, RAM as RAM_BASE, VirtMap, interrupt,
};

use super::{ProbeError, Proof, follow, load, ram};
use crate::hypervisor::{Gic, GicParts, GicSupport, Hypervisor, VcpuSetup};

const RAM: Range = Range { base: RAM_BASE, size: 4 << 20 };
const ENTRY: u64 = RAM.base + 0x8000;
const PAGE_TABLE: u64 = RAM.base + 0x1_0000;

/// What each number stands for, from 1 on.
const STEPS: [&str; 6] = [
    "running at EL1",
    "identification registers and the counter",
    "a call to PSCI",
    "address translation and caches",
    "exclusive accesses",
    "floating point and SIMD",
];

pub(super) fn run(hypervisor: &dyn Hypervisor) -> Result<Proof, ProbeError> {
    let request = ecr_arch::layout::virt::Request {
        ram: RAM.size,
        max_ram: RAM.size,
        max_cpus: 1,
        address_bits: hypervisor.capabilities().physical_address_bits,
        ..Default::default()
    };
    let map = VirtMap::new(&request)
        .map_err(|error| ProbeError::Guest { step: "being laid out", reason: error.to_string() })?;
    let vm = &hypervisor.create_vm(map.address_bits())?;
    vm.create_gic(&gic(map, vm.gic_support()))?;
    // Dropped after the vCPU, which runs in it.
    let memory = ram(vm, RAM)?;
    load(&memory, ENTRY, payload())?;
    load(&memory, PAGE_TABLE, &page_table())?;
    let vcpu = vm.create_vcpu(0)?;
    vm.complete_vcpus(1)?;
    follow(vcpu, VcpuSetup::Arm(Some(BootRegs { pc: ENTRY, x0: PAGE_TABLE })), &STEPS)
}

/// The newest that the host has.
fn gic(map: VirtMap, host: GicSupport) -> Gic {
    let parts = if host.v3 {
        let its = host.its.then_some(GIC_ITS);
        GicParts::V3 { redistributors: map.redistributors, its }
    } else {
        GicParts::V2 { cpu_interface: GIC_CPU_INTERFACE, frame: GIC_V2M }
    };
    Gic { distributor: GIC_DISTRIBUTOR, interrupts: interrupt::COUNT, parts }
}

/// Two blocks of 1 GiB, each mapped to itself: devices, which nobody may execute, and memory.
fn page_table() -> Vec<u8> {
    const BLOCK: u64 = 1;
    const ACCESSED: u64 = 1 << 10;
    const INNER_SHAREABLE: u64 = 3 << 8;
    const NEVER_EXECUTE: u64 = 1 << 53 | 1 << 54;
    const MEMORY: u64 = 1 << 2;
    let devices = BLOCK | ACCESSED | NEVER_EXECUTE;
    let memory = RAM_BASE | BLOCK | ACCESSED | INNER_SHAREABLE | MEMORY;
    [devices.to_le_bytes(), memory.to_le_bytes()].concat()
}

/// The guest's code. It writes 0xEE where a result is wrong, and waits. In x0 it finds its page table; free memory begins
/// at 0x4020_0000.
fn payload() -> &'static [u8] {
    let (start, end): (*const u8, *const u8);
    // SAFETY: two addresses are computed; the payload lies in read-only data and is not executed here.
    unsafe {
        std::arch::asm!(
            "adrp {start}, 98f",
            "add {start}, {start}, :lo12:98f",
            "adrp {end}, 99f",
            "add {end}, {end}, :lo12:99f",
            ".pushsection .rodata.ecr_probe, \"a\"",
            ".balign 4",
            "98:",
            "mov x20, x0",
            "mov x21, #0",
            "mov w22, #1",
            // 1: the exception level stands in bits 3 and 2.
            "mrs x1, CurrentEL",
            "cmp x1, #4",
            "b.ne 90f",
            "strb w22, [x21]",
            // 2: there is a processor, and its counter goes forward.
            "mrs x1, MIDR_EL1",
            "cbz x1, 90f",
            "isb",
            "mrs x1, CNTVCT_EL0",
            "isb",
            "mrs x2, CNTVCT_EL0",
            "cmp x2, x1",
            "b.lo 90f",
            "mov w22, #2",
            "strb w22, [x21]",
            // 3: PSCI_VERSION, at least 0.2.
            "mov w0, #0x84000000",
            "hvc #0",
            "cmp w0, #2",
            "b.lt 90f",
            "mov w22, #3",
            "strb w22, [x21]",
            // 4: attributes 0 for devices and 1 for memory; 39 bits, pages of 4 KiB; then M, C and I.
            "mov x1, #0xFF00",
            "msr MAIR_EL1, x1",
            "ldr x1, 97f",
            "msr TCR_EL1, x1",
            "msr TTBR0_EL1, x20",
            "dsb sy",
            "tlbi vmalle1",
            "dsb sy",
            "isb",
            "mrs x1, SCTLR_EL1",
            "mov x2, #0x1005",
            "orr x1, x1, x2",
            "msr SCTLR_EL1, x1",
            "isb",
            "mov x3, #0x40200000",
            "mov x4, #10",
            "str x4, [x3]",
            "ldr x5, [x3]",
            "cmp x5, #10",
            "b.ne 90f",
            "mov w22, #4",
            "strb w22, [x21]",
            // 5: a counter.
            "91: ldaxr x5, [x3]",
            "add x5, x5, #1",
            "stlxr w6, x5, [x3]",
            "cbnz w6, 91b",
            "ldr x5, [x3]",
            "cmp x5, #11",
            "b.ne 90f",
            "mov w22, #5",
            "strb w22, [x21]",
            // 6: CPACR_EL1.FPEN.
            "mov x1, #0x300000",
            "msr CPACR_EL1, x1",
            "isb",
            "fmov d0, #2.0",
            "fadd d0, d0, d0",
            "fcvtzs x5, d0",
            "cmp x5, #4",
            "b.ne 90f",
            "mov w22, #6",
            "strb w22, [x21]",
            "92: wfi",
            "b 92b",
            "90: mov w22, #0xEE",
            "strb w22, [x21]",
            "b 92b",
            ".balign 8",
            // TCR_EL1: T0SZ 25, IRGN0 and ORGN0 write-back, SH0 inner, EPD1, IPS 36 bits.
            "97: .quad 0x100803519",
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
