// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What a machine asks of its board.

use std::fmt::Debug;
use std::sync::Arc;

use ecr_arch::boot::{BootError, Load, ReadAt};
use ecr_arch::layout::Range;
use ecr_devices::pci::assign::NoRoom;

use super::slots::Slots;
use super::spaces::AddressSpaces;
use crate::config::VmConfig;
use crate::hypervisor::{Capabilities, VcpuFacts, VcpuSetup};

/// A machine type's chipset, with everything that is plugged into it.
pub(super) trait Board: Debug + Send {
    /// The PCI slots.
    fn slots(&self) -> &Slots;

    /// The same, to plug devices in and out.
    fn slots_mut(&mut self) -> &mut Slots;

    /// What vCPUs reach.
    fn spaces(&self) -> Arc<AddressSpaces>;

    /// Where each persistent memory image is.
    fn nvdimms(&self) -> &[Range];

    /// What must lie in memory, and how each vCPU starts.
    fn boot(&self, request: &BootRequest<'_>) -> Result<Boot, BootError>;

    /// Place all BARs, as firmware would.
    fn assign_bars(&self) -> Result<(), NoRoom>;

    /// Back to the state after power-on.
    fn reset(&self) -> Result<(), NoRoom>;

    /// Press the power button.
    fn press_power_button(&self);
}

/// What a board boots.
pub(super) struct BootRequest<'a> {
    pub(super) config: &'a VmConfig,
    pub(super) kernel: &'a dyn ReadAt,
    pub(super) initrd_size: Option<u64>,
    pub(super) host: &'a Capabilities,
    /// What the first vCPU says of itself.
    pub(super) facts: VcpuFacts,
}

/// How a guest boots.
#[derive(Debug)]
pub(super) struct Boot {
    pub(super) loads: Vec<Load>,
    /// One for each vCPU, in order.
    pub(super) setups: Vec<VcpuSetup>,
    /// Where the machine is not described by ACPI, through which alone a guest learns of devices that come and go: what
    /// to do to have it.
    pub(super) without_acpi: Option<&'static str>,
}
