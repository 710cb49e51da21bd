// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! State of a processor at its first instruction (Linux `Documentation/arch/arm64/booting.rst`).

/// `PSTATE`: EL1 with its own stack pointer; debug exceptions, SErrors, interrupts and fast interrupts masked.
pub const PSTATE: u64 = 0x3C5;

/// Registers of the boot processor; all others are zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BootRegs {
    /// First instruction.
    pub pc: u64,
    /// Where the device tree lies.
    pub x0: u64,
}
