// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What KVM has on aarch64 only. There is no aarch64 machine yet: the crate compiles for it, and a VM is
//! refused with a clear error.

use std::io;

use ecr_arch::x86::cpuid::CpuidEntry;
use kvm_bindings::kvm_irq_routing_entry;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use super::super::{Capabilities, Result, X86VcpuSetup};
use super::error;

const NO_MACHINE: &str = "this version has no machine type for aarch64 hosts";

pub(super) fn capabilities(_kvm: &Kvm) -> Result<Capabilities> {
    Err(error(NO_MACHINE, io::ErrorKind::Unsupported))
}

pub(super) fn set_up_vm(_vm: &VmFd) -> Result<()> {
    Err(error(NO_MACHINE, io::ErrorKind::Unsupported))
}

#[derive(Debug)]
pub(super) struct PristineVm;

impl PristineVm {
    pub(super) fn of(_vm: &VmFd) -> Result<Self> {
        Ok(Self)
    }

    pub(super) fn restore(&self, _vm: &VmFd) -> Result<()> {
        Err(error(NO_MACHINE, io::ErrorKind::Unsupported))
    }
}

pub(super) fn default_routes() -> Vec<kvm_irq_routing_entry> {
    Vec::new()
}

pub(super) fn tsc_khz(_vcpu: &VcpuFd) -> Option<u32> {
    None
}

/// There is no clock that could be told.
pub(super) fn note_pause(_vcpu: &VcpuFd) {}

pub(super) fn place(_vcpu: &VcpuFd) -> String {
    "an unknown place".into()
}

#[derive(Debug)]
pub(super) struct Pristine;

impl Pristine {
    pub(super) fn of(_vcpu: &VcpuFd) -> Result<Self> {
        Ok(Self)
    }
}

pub(super) fn set_cpuid(_id: u32, _vcpu: &VcpuFd, _entries: &[CpuidEntry]) -> Result<()> {
    Err(error(NO_MACHINE, io::ErrorKind::Unsupported))
}

pub(super) fn set_up_vcpu(
    _id: u32,
    _vcpu: &VcpuFd,
    _pristine: &Pristine,
    _setup: &X86VcpuSetup,
) -> Result<()> {
    Err(error(NO_MACHINE, io::ErrorKind::Unsupported))
}
