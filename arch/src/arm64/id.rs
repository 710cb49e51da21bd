// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Who a processor is, and what it can do, from its identification registers.

/// Affinity of processor `index`, as `MPIDR_EL1` shows it without its flags. KVM numbers processors so: 16 to a
/// cluster, because a GICv3 names at most 16 targets in one software interrupt.
pub const fn affinity(index: u32) -> u64 {
    let index = index as u64;
    (index & 0xF) | (index >> 4 & 0xFF) << 8 | (index >> 12 & 0xFF) << 16
}

/// The affinity fields of `MPIDR_EL1`: Aff3, and Aff2 to Aff0.
pub const AFFINITY_MASK: u64 = 0xFF_00FF_FFFF;

/// A size of translation granules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageSize {
    /// 4 KiB.
    Small,
    /// 16 KiB.
    Medium,
    /// 64 KiB.
    Large,
}

impl PageSize {
    /// In KiB.
    pub const fn kib(self) -> u32 {
        match self {
            Self::Small => 4,
            Self::Medium => 16,
            Self::Large => 64,
        }
    }

    /// Whether a processor with this `ID_AA64MMFR0_EL1` translates with it: fields TGran4, TGran16 and TGran64.
    pub const fn is_in(self, mmfr0: u64) -> bool {
        const NO_TGRAN4: u64 = 0xF;
        const NO_TGRAN64: u64 = 0xF;
        const NO_TGRAN16: u64 = 0;
        match self {
            Self::Small => mmfr0 >> 28 & 0xF != NO_TGRAN4,
            Self::Medium => mmfr0 >> 20 & 0xF != NO_TGRAN16,
            Self::Large => mmfr0 >> 24 & 0xF != NO_TGRAN64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors_are_numbered_by_sixteens() {
        assert_eq!([0, 15, 16, 511].map(affinity), [0, 15, 0x100, 0x1F0F]);
        assert_eq!(affinity(0x1000), 0x1_0000);
    }

    #[test]
    fn granules_are_told_by_their_fields() {
        // Neoverse N1, and Cortex-A53, which lacks 16 KiB.
        let (n1, a53) = (0x0010_1125_u64 | 1 << 20, 0x1122_u64);
        assert!(PageSize::Medium.is_in(n1) && !PageSize::Medium.is_in(a53));
        for size in [PageSize::Small, PageSize::Large] {
            assert!(size.is_in(n1) && size.is_in(a53) && !size.is_in(0xFF00_0000));
        }
    }
}
