// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Which interrupt controller the guest gets.

use ecr_arch::acpi::virt as acpi;
use ecr_arch::fdt;
use ecr_arch::layout::virt::{self as map, VirtMap, interrupt};

use crate::config::validate::GIC_V2_CPUS;
use crate::config::{GicVersion, VmConfig};
use crate::hypervisor::{Gic, GicParts, GicSupport};
use crate::vm::StartError;

/// The one that `config` asks for, if the host has it.
pub(super) fn choose(
    config: &VmConfig,
    map: &VirtMap,
    host: GicSupport,
) -> Result<Gic, StartError> {
    let parts = match config.gic {
        GicVersion::V3 | GicVersion::Host if host.v3 => v3(map, host),
        GicVersion::V2 | GicVersion::Host if host.v2 => v2(config)?,
        GicVersion::V3 if host.v2 => {
            return refuse(
                "gic-version=3 was asked for, but this host's KVM has a GICv2 alone for guests: use gic-version=host or 2",
            );
        }
        GicVersion::V2 if host.v3 => {
            return refuse(
                "gic-version=2 was asked for, but this host's KVM has a GICv3 alone for guests: use gic-version=host or 3",
            );
        }
        _ => {
            return refuse(
                "this host's KVM has no interrupt controller for guests: use another host",
            );
        }
    };
    Ok(Gic { distributor: map::GIC_DISTRIBUTOR, interrupts: interrupt::COUNT, parts })
}

fn refuse(text: &str) -> Result<Gic, StartError> {
    Err(StartError::Machine(text.into()))
}

fn v3(map: &VirtMap, host: GicSupport) -> GicParts {
    if !host.its {
        log::warn!(
            "this host's KVM has no interrupt translation service: devices interrupt by their pins, which is slower"
        );
    }
    let its = host.its.then_some(map::GIC_ITS);
    GicParts::V3 { redistributors: map.redistributors.clone(), its }
}

fn v2(config: &VmConfig) -> Result<GicParts, StartError> {
    let cpus = config.cpus.max;
    if cpus > GIC_V2_CPUS {
        return Err(StartError::Machine(format!(
            "{cpus} CPUs were asked for, but this host's KVM has a GICv2 for guests, which interrupts at most \
             {GIC_V2_CPUS}"
        )));
    }
    Ok(GicParts::V2 { cpu_interface: map::GIC_CPU_INTERFACE, frame: map::GIC_V2M })
}

/// As ACPI shows it.
pub(super) fn for_acpi(gic: &Gic) -> acpi::Gic {
    let distributor = gic.distributor.base;
    match &gic.parts {
        GicParts::V2 { cpu_interface, frame } => {
            acpi::Gic::V2 { distributor, cpu_interface: cpu_interface.base, frame: frame.base }
        }
        GicParts::V3 { redistributors, its } => acpi::Gic::V3 {
            distributor,
            redistributors: redistributors.clone(),
            its: its.map(|its| its.base),
            maintenance: interrupt::PRIVATE + interrupt::GIC_MAINTENANCE,
        },
    }
}

/// As a device tree shows it.
pub(super) fn for_device_tree(gic: &Gic) -> fdt::Gic {
    let distributor = gic.distributor;
    match &gic.parts {
        GicParts::V2 { cpu_interface, frame } => {
            fdt::Gic::V2 { distributor, cpu_interface: *cpu_interface, frame: *frame }
        }
        GicParts::V3 { redistributors, its } => fdt::Gic::V3 {
            distributor,
            redistributors: redistributors.clone(),
            its: *its,
            maintenance: interrupt::GIC_MAINTENANCE,
        },
    }
}
