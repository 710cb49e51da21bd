// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! CPUID: from what the host can give to what the guest shall see.
//!
//! Intel SDM volume 2A, CPUID; AMD APM volume 3, appendix E; Linux `Documentation/virt/kvm/x86/cpuid.rst`.

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
