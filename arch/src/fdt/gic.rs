// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Interrupt controllers: `interrupt-controller/arm,gic-v3.yaml` and `arm,gic.yaml`.

use vm_fdt::FdtWriter;

use super::{LEVEL_HIGH, Outcome, PRIVATE, phandle, reg};
use crate::layout::Range;

/// An interrupt controller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Gic {
    /// GICv2 with a GICv2m.
    V2 {
        /// The distributor.
        distributor: Range,
        /// The CPU interface.
        cpu_interface: Range,
        /// The frame to which messages are sent.
        frame: Range,
    },
    /// GICv3.
    V3 {
        /// The distributor.
        distributor: Range,
        /// Redistributors of the processors.
        redistributors: Vec<Range>,
        /// Interrupt translation service.
        its: Option<Range>,
        /// Private interrupt of the maintenance of virtualization.
        maintenance: u32,
    },
}

impl Gic {
    /// Flags of the private interrupts of `cpus` processors: a GICv2 says which of them have it.
    pub(super) fn private_flags(&self, cpus: u32) -> u32 {
        match self {
            Self::V2 { .. } => (1u32.checked_shl(cpus).unwrap_or(0).wrapping_sub(1) & 0xFF) << 8,
            Self::V3 { .. } => 0,
        }
    }

    /// Whether it takes messages.
    pub(super) fn takes_messages(&self) -> bool {
        !matches!(self, Self::V3 { its: None, .. })
    }
}

pub(super) fn node(fdt: &mut FdtWriter, gic: &Gic) -> Outcome {
    let (Gic::V2 { distributor, .. } | Gic::V3 { distributor, .. }) = gic;
    let node = fdt.begin_node(&format!("interrupt-controller@{:x}", distributor.base))?;
    fdt.property_null("interrupt-controller")?;
    fdt.property_u32("#interrupt-cells", 3)?;
    fdt.property_u32("#address-cells", 2)?;
    fdt.property_u32("#size-cells", 2)?;
    fdt.property_null("ranges")?;
    fdt.property_phandle(phandle::GIC)?;
    match gic {
        Gic::V2 { distributor, cpu_interface, frame } => {
            fdt.property_string("compatible", "arm,cortex-a15-gic")?;
            reg(fdt, &[*distributor, *cpu_interface])?;
            let v2m = fdt.begin_node(&format!("v2m@{:x}", frame.base))?;
            fdt.property_string("compatible", "arm,gic-v2m-frame")?;
            fdt.property_null("msi-controller")?;
            reg(fdt, &[*frame])?;
            fdt.property_phandle(phandle::MSI)?;
            fdt.end_node(v2m)?;
        }
        Gic::V3 { distributor, redistributors, its, maintenance } => {
            fdt.property_string("compatible", "arm,gic-v3")?;
            let regions = u32::try_from(redistributors.len()).unwrap_or(u32::MAX);
            fdt.property_u32("#redistributor-regions", regions)?;
            let ranges: Vec<Range> =
                [*distributor].into_iter().chain(redistributors.iter().copied()).collect();
            reg(fdt, &ranges)?;
            fdt.property_array_u32("interrupts", &[PRIVATE, *maintenance, LEVEL_HIGH])?;
            if let Some(its) = its {
                let service = fdt.begin_node(&format!("msi-controller@{:x}", its.base))?;
                fdt.property_string("compatible", "arm,gic-v3-its")?;
                fdt.property_null("msi-controller")?;
                fdt.property_u32("#msi-cells", 1)?;
                reg(fdt, &[*its])?;
                fdt.property_phandle(phandle::MSI)?;
                fdt.end_node(service)?;
            }
        }
    }
    fdt.end_node(node)
}
