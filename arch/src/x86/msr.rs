// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Model-specific registers at the first instruction of a guest (Intel SDM volume 4; PAT: volume 3A, section 12.12.4).

use super::regs::Msr;

const IA32_TSC: u32 = 0x10;
const IA32_SYSENTER_CS: u32 = 0x174;
const IA32_SYSENTER_ESP: u32 = 0x175;
const IA32_SYSENTER_EIP: u32 = 0x176;
const IA32_MISC_ENABLE: u32 = 0x1A0;
const MISC_ENABLE_FAST_STRINGS: u64 = 1;
const IA32_PAT: u32 = 0x277;
/// Twice: write-back, write-through, uncached unless the MTRRs say otherwise, uncached.
const PAT_AT_POWER_ON: u64 = 0x0007_0406_0007_0406;
const IA32_MTRR_DEF_TYPE: u32 = 0x2FF;
const MTRR_ENABLE: u64 = 1 << 11;
const MTRR_WRITE_BACK: u64 = 6;
const IA32_STAR: u32 = 0xC000_0081;
const IA32_LSTAR: u32 = 0xC000_0082;
const IA32_CSTAR: u32 = 0xC000_0083;
const IA32_FMASK: u32 = 0xC000_0084;
const IA32_KERNEL_GS_BASE: u32 = 0xC000_0102;

/// Values at boot. Without a write-back default, memory would be uncached. Those that are zero or as after
/// power-on are here for the sake of a reset: the guest before left its own in them.
pub const AT_BOOT: [Msr; 12] = [
    Msr { index: IA32_TSC, value: 0 },
    Msr { index: IA32_SYSENTER_CS, value: 0 },
    Msr { index: IA32_SYSENTER_ESP, value: 0 },
    Msr { index: IA32_SYSENTER_EIP, value: 0 },
    Msr { index: IA32_MISC_ENABLE, value: MISC_ENABLE_FAST_STRINGS },
    Msr { index: IA32_PAT, value: PAT_AT_POWER_ON },
    Msr { index: IA32_MTRR_DEF_TYPE, value: MTRR_ENABLE | MTRR_WRITE_BACK },
    Msr { index: IA32_STAR, value: 0 },
    Msr { index: IA32_LSTAR, value: 0 },
    Msr { index: IA32_CSTAR, value: 0 },
    Msr { index: IA32_FMASK, value: 0 },
    Msr { index: IA32_KERNEL_GS_BASE, value: 0 },
];
