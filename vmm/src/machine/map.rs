// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Where everything of a machine will be, and then the board that goes with it.

use std::sync::Arc;

use ecr_arch::layout::Range;
use ecr_arch::layout::q35::{self, Q35Map};
use ecr_arch::layout::virt::{self, VirtMap};
use ecr_devices::backend::chardev::CharPort;
use ecr_devices::chipset::GuestRequestSink;
use ecr_devices::memory::GuestMemoryHandle;

use super::board::Board;
use super::failed;
use super::q35::Q35;
use super::virt::Virt;
use crate::config::{MachineType, VmConfig};
use crate::hypervisor::{Capabilities, Vm};
use crate::vm::StartError;

/// The map of a machine.
#[derive(Debug)]
pub(super) enum Map {
    Q35(Q35Map),
    Virt(VirtMap),
}

/// What a board is made from besides its map.
pub(super) struct Parts<'a> {
    pub(super) config: &'a VmConfig,
    pub(super) vm: &'a dyn Vm,
    pub(super) memory: GuestMemoryHandle,
    pub(super) requests: Arc<dyn GuestRequestSink>,
    /// What the serial port leads to, if there is one.
    pub(super) serial: Option<CharPort>,
}

impl Map {
    /// Lay out the machine that `config` describes, with persistent memory of these sizes in bytes, on `host`.
    pub(super) fn new(
        config: &VmConfig,
        nvdimms: Vec<u64>,
        host: &Capabilities,
    ) -> Result<Self, StartError> {
        let ram = config.memory.size;
        let max_ram = config.memory.max.unwrap_or(ram);
        let slots = config.memory.slots;
        let address_bits = host.physical_address_bits;
        match config.machine {
            MachineType::Q35 => {
                Q35Map::new(&q35::Request { ram, max_ram, slots, nvdimms, address_bits })
                    .map(Self::Q35)
            }
            MachineType::Virt => {
                let max_cpus = config.cpus.max;
                VirtMap::new(&virt::Request {
                    ram,
                    max_ram,
                    slots,
                    nvdimms,
                    max_cpus,
                    address_bits,
                })
                .map(Self::Virt)
            }
        }
        .map_err(failed)
    }

    /// Bits of an address that the machine needs; on x86 it is given what the processor has.
    pub(super) fn address_bits(&self, host: &Capabilities) -> u8 {
        match self {
            Self::Q35(_) => host.physical_address_bits,
            Self::Virt(map) => map.address_bits(),
        }
    }

    /// The pieces of RAM, in ascending order.
    pub(super) fn ram(&self) -> Vec<Range> {
        match self {
            Self::Q35(map) => map.ram().collect(),
            Self::Virt(map) => vec![map.ram],
        }
    }

    /// Where each persistent memory image will be.
    pub(super) fn nvdimms(&self) -> &[Range] {
        match self {
            Self::Q35(map) => &map.nvdimms,
            Self::Virt(map) => &map.nvdimms,
        }
    }

    /// The board, with nothing plugged in.
    pub(super) fn board(self, parts: Parts<'_>) -> Result<Box<dyn Board>, StartError> {
        Ok(match self {
            Self::Q35(map) => Box::new(Q35::new(map, parts)?),
            Self::Virt(map) => Box::new(Virt::new(map, parts)?),
        })
    }
}
