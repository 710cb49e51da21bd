// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Model-specific registers that firmware would have set (Intel SDM volume 4).

use super::regs::Msr;

const IA32_TSC: u32 = 0x10;
const IA32_MISC_ENABLE: u32 = 0x1A0;
const MISC_ENABLE_FAST_STRINGS: u64 = 1;
const IA32_MTRR_DEF_TYPE: u32 = 0x2FF;
const MTRR_ENABLE: u64 = 1 << 11;
const MTRR_WRITE_BACK: u64 = 6;

/// Values at boot. Without a write-back default, memory would be uncached.
pub const AT_BOOT: [Msr; 3] = [
    Msr { index: IA32_TSC, value: 0 },
    Msr { index: IA32_MISC_ENABLE, value: MISC_ENABLE_FAST_STRINGS },
    Msr { index: IA32_MTRR_DEF_TYPE, value: MTRR_ENABLE | MTRR_WRITE_BACK },
];
