// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! CPUID: from what the host can give to what the guest shall see.
//!
//! Intel SDM volume 2A, CPUID; AMD APM volume 3, appendix E; Linux `Documentation/virt/kvm/x86/cpuid.rst`.
//! Topology is one socket of single-threaded cores; the APIC id is the number of the core. Performance
//! counters are not shown.

/// One CPUID leaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CpuidEntry {
    /// EAX on entry.
    pub function: u32,
    /// ECX on entry, where the leaf has sub-leaves.
    pub index: u32,
    /// Whether `index` is significant.
    pub indexed: bool,
    /// EAX on return.
    pub eax: u32,
    /// EBX on return.
    pub ebx: u32,
    /// ECX on return.
    pub ecx: u32,
    /// EDX on return.
    pub edx: u32,
}

/// Where a vCPU stands among the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Topology {
    /// APIC id of this vCPU.
    pub apic_id: u32,
    /// vCPUs that there can ever be.
    pub cores: u32,
}

mod leaf {
    pub(super) const MAX_BASIC: u32 = 0;
    pub(super) const FEATURES: u32 = 1;
    pub(super) const CACHES: u32 = 4;
    pub(super) const PERFMON: u32 = 0xA;
    pub(super) const TOPOLOGY: u32 = 0xB;
    pub(super) const TOPOLOGY_V2: u32 = 0x1F;
    pub(super) const KVM: u32 = 0x4000_0000;
    pub(super) const FREQUENCIES: u32 = 0x4000_0010;
    pub(super) const AMD_FEATURES: u32 = 0x8000_0001;
    pub(super) const AMD_SIZES: u32 = 0x8000_0008;
    pub(super) const AMD_CACHES: u32 = 0x8000_001D;
    pub(super) const AMD_TOPOLOGY: u32 = 0x8000_001E;
    pub(super) const AMD_PERFMON: u32 = 0x8000_0022;
}

const ECX1_PDCM: u32 = 1 << 15;
const ECX1_TSC_DEADLINE: u32 = 1 << 24;
const ECX1_HYPERVISOR: u32 = 1 << 31;
const EDX1_HTT: u32 = 1 << 28;
/// Extended performance counters: of the core, the northbridge and the last-level cache.
const AMD_ECX_PERFCTR: u32 = 1 << 23 | 1 << 24 | 1 << 28;
/// Levels of leaf 0xB.
const LEVEL_SMT: u32 = 1;
const LEVEL_CORE: u32 = 2;
/// The in-kernel local APIC counts nanoseconds.
const APIC_BUS_KHZ: u32 = 1_000_000;

/// What the vCPU at `topology` shows, from what the `host` can show. `tsc_khz` saves the guest from
/// calibrating its clock.
pub fn for_vcpu(host: &[CpuidEntry], topology: Topology, tsc_khz: Option<u32>) -> Vec<CpuidEntry> {
    let mut entries: Vec<CpuidEntry> = host
        .iter()
        .filter(|entry| !matches!(entry.function, leaf::TOPOLOGY | leaf::TOPOLOGY_V2))
        .copied()
        .collect();
    let max_basic =
        host.iter().find(|entry| entry.function == leaf::MAX_BASIC).map_or(0, |e| e.eax);
    for entry in &mut entries {
        adapt(entry, topology, tsc_khz);
    }
    for function in [leaf::TOPOLOGY, leaf::TOPOLOGY_V2] {
        if function <= max_basic {
            entries.extend(levels(function, topology));
        }
    }
    if let Some(khz) = tsc_khz {
        entries.push(CpuidEntry {
            function: leaf::FREQUENCIES,
            eax: khz,
            ebx: APIC_BUS_KHZ,
            ..CpuidEntry::default()
        });
    }
    entries
}

fn adapt(entry: &mut CpuidEntry, topology: Topology, tsc_khz: Option<u32>) {
    let Topology { apic_id, cores } = topology;
    let others = cores.saturating_sub(1);
    match entry.function {
        leaf::FEATURES => {
            entry.ebx = (entry.ebx & 0xFFFF) | cores.min(255) << 16 | (apic_id & 0xFF) << 24;
            entry.ecx = (entry.ecx & !ECX1_PDCM) | ECX1_TSC_DEADLINE | ECX1_HYPERVISOR;
            entry.edx = if cores > 1 { entry.edx | EDX1_HTT } else { entry.edx & !EDX1_HTT };
        }
        // Bits 31:26 cores in the package, 25:14 threads that share the cache: only the last level is shared.
        leaf::CACHES if entry.eax & 0x1F != 0 => {
            let sharing = if (entry.eax >> 5) & 7 >= 3 { others.min(0xFFF) } else { 0 };
            entry.eax = (entry.eax & 0x3FFF) | sharing << 14 | others.min(0x3F) << 26;
        }
        leaf::AMD_FEATURES => entry.ecx &= !AMD_ECX_PERFCTR,
        leaf::PERFMON | leaf::AMD_PERFMON => {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
        leaf::KVM if tsc_khz.is_some() => entry.eax = entry.eax.max(leaf::FREQUENCIES),
        // Bits 7:0 cores, 15:12 width of the core's part of the APIC id.
        leaf::AMD_SIZES => {
            entry.ecx = (entry.ecx & !0xF0FF) | others.min(0xFF) | width(cores) << 12;
        }
        leaf::AMD_CACHES if entry.eax & 0x1F != 0 => {
            let sharing = if (entry.eax >> 5) & 7 >= 3 { others.min(0xFFF) } else { 0 };
            entry.eax = (entry.eax & !(0xFFF << 14)) | sharing << 14;
        }
        leaf::AMD_TOPOLOGY => (entry.eax, entry.ebx, entry.ecx) = (apic_id, apic_id & 0xFF, 0),
        _ => {}
    }
}

/// The sub-leaves of leaf 0xB or 0x1F: threads, cores, and an invalid level that ends the list.
fn levels(function: u32, topology: Topology) -> [CpuidEntry; 3] {
    let level = |index, kind: u32, shift, count| CpuidEntry {
        function,
        index,
        indexed: true,
        eax: shift,
        ebx: count,
        ecx: kind << 8 | index,
        edx: topology.apic_id,
    };
    [
        level(0, LEVEL_SMT, 0, 1),
        level(1, LEVEL_CORE, width(topology.cores), topology.cores),
        level(2, 0, 0, 0),
    ]
}

/// Bits that number `count` things.
fn width(count: u32) -> u32 {
    count.max(1).next_power_of_two().trailing_zeros()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> Vec<CpuidEntry> {
        let entry = |function, eax| CpuidEntry { function, eax, ..CpuidEntry::default() };
        vec![
            entry(0, 0x1F),
            CpuidEntry { ebx: 0x0304_0800, ecx: ECX1_PDCM | 1, edx: EDX1_HTT, ..entry(1, 0) },
            CpuidEntry { indexed: true, ..entry(4, 0x7C00_4121) },
            CpuidEntry { index: 3, indexed: true, ..entry(4, 0x7C07_C163) },
            entry(0xA, 0x0730_0404),
            CpuidEntry { indexed: true, edx: 77, ..entry(0xB, 1) },
            CpuidEntry { ebx: 0x4b4d_564b, ..entry(0x4000_0000, 0x4000_0001) },
            CpuidEntry { ecx: AMD_ECX_PERFCTR | 2, ..entry(0x8000_0001, 0) },
            CpuidEntry { ecx: 0x7007, ..entry(0x8000_0008, 0x3030) },
            entry(0x8000_001E, 9),
            CpuidEntry { ebx: 6, ..entry(0x8000_0022, 1) },
        ]
    }

    fn find(entries: &[CpuidEntry], function: u32, index: u32) -> CpuidEntry {
        let mut found = entries.iter().filter(|e| e.function == function && e.index == index);
        let entry = *found.next().unwrap();
        assert!(found.next().is_none(), "leaf {function:#x}.{index} stands twice");
        entry
    }

    #[test]
    fn topology_leaves_agree_on_apic_id_and_cores() {
        let entries = for_vcpu(&host(), Topology { apic_id: 2, cores: 5 }, None);
        let features = find(&entries, 1, 0);
        assert_eq!(features.ebx, 0x0205_0800);
        assert_eq!(features.edx & EDX1_HTT, EDX1_HTT);
        assert_eq!(find(&entries, 4, 0).eax, 4 << 26 | 0x121, "first-level caches are not shared");
        assert_eq!(find(&entries, 4, 3).eax, 4 << 26 | 4 << 14 | 0x163);
        for function in [0xB, 0x1F] {
            let core = find(&entries, function, 1);
            assert_eq!((core.eax, core.ebx, core.ecx, core.edx), (3, 5, 0x201, 2));
            assert_eq!(find(&entries, function, 0).ebx, 1);
            assert_eq!(find(&entries, function, 2).ebx, 0);
        }
        assert_eq!(find(&entries, 0x8000_0008, 0).ecx, 0x3004);
        assert_eq!(find(&entries, 0x8000_001E, 0).eax, 2);
    }

    #[test]
    fn one_core_is_not_multi_threaded() {
        let entries = for_vcpu(&host(), Topology { apic_id: 0, cores: 1 }, None);
        assert_eq!(find(&entries, 1, 0).edx & EDX1_HTT, 0);
        assert_eq!(find(&entries, 0xB, 1).eax, 0);
    }

    #[test]
    fn a_known_tsc_frequency_is_told() {
        let entries = for_vcpu(&host(), Topology { apic_id: 0, cores: 1 }, Some(2_000_000));
        assert_eq!(find(&entries, 0x4000_0000, 0).eax, 0x4000_0010);
        let frequencies = find(&entries, 0x4000_0010, 0);
        assert_eq!((frequencies.eax, frequencies.ebx), (2_000_000, 1_000_000));
    }

    #[test]
    fn performance_counters_are_hidden() {
        let entries = for_vcpu(&host(), Topology { apic_id: 0, cores: 1 }, None);
        assert_eq!(find(&entries, 0xA, 0).eax, 0);
        assert_eq!(find(&entries, 1, 0).ecx, ECX1_TSC_DEADLINE | ECX1_HYPERVISOR | 1);
        assert_eq!(find(&entries, 0x8000_0001, 0).ecx, 2);
        let amd = find(&entries, 0x8000_0022, 0);
        assert_eq!((amd.eax, amd.ebx), (0, 0));
    }
}
