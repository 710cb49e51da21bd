// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What a machine tells about itself.

use ecr_devices::pci::BarSpace;
use ecr_devices::pci::bridge::{Extent, Forwarding};
use ecr_devices::pci::describe::{BarDescription, Description, describe};
use ecr_devices::pci::place::{DevFn, Place};

use super::Machine;
use crate::control::{
    BlockInfo, ChardevInfo, CpuInfo, Identity, IoThreadInfo, MachineInfo, MemoryInfo, NvdimmInfo,
    PciBarInfo, PciBridgeInfo, PciInfo, PciPath,
};

impl Machine {
    pub(crate) fn identity(&self) -> Identity {
        Identity { name: self.config.name.clone(), uuid: self.config.uuid }
    }

    pub(crate) fn kind(&self) -> MachineInfo {
        let capabilities = self.hypervisor.capabilities();
        MachineInfo {
            kind: self.config.machine,
            max_cpus: capabilities.max_vcpus,
            accelerated: capabilities.accelerated,
        }
    }

    pub(crate) fn cpus(&self) -> Vec<CpuInfo> {
        self.vcpus
            .iter()
            .map(|vcpu| CpuInfo {
                index: vcpu.index(),
                thread_id: vcpu.thread_id(),
                socket: 0,
                core: vcpu.index(),
                thread: 0,
            })
            .collect()
    }

    pub(crate) fn memory(&self) -> MemoryInfo {
        let nvdimms = self.config.nvdimm.iter().zip(self.board.nvdimms());
        MemoryInfo {
            base: self.config.memory.size,
            plugged: 0,
            nvdimms: nvdimms
                .map(|(nvdimm, range)| NvdimmInfo {
                    id: nvdimm.id.clone(),
                    address: range.base,
                    size: range.size,
                    path: nvdimm.path.clone(),
                })
                .collect(),
        }
    }

    pub(crate) fn chardevs(&self) -> Vec<ChardevInfo> {
        self.consoles.infos()
    }

    pub(crate) fn blocks(&self) -> Vec<BlockInfo> {
        self.blocks.clone()
    }

    pub(crate) fn io_threads(&self) -> Vec<IoThreadInfo> {
        (0..)
            .zip(&self.io_threads)
            .map(|(index, thread): (usize, _)| IoThreadInfo {
                id: format!("io{index}"),
                thread_id: thread.tid(),
            })
            .collect()
    }

    pub(crate) fn pci(&self) -> Vec<PciInfo> {
        let functions = describe(self.board.slots().pci()).into_iter();
        functions
            .map(|function| pci_info(self.board.slots().id_at(function.place), &function))
            .collect()
    }
}

fn pci_info(id: String, function: &Description) -> PciInfo {
    let bar_info = |it: &BarDescription| PciBarInfo {
        index: it.bar.index,
        io: it.bar.space == BarSpace::Io,
        prefetch: it.prefetchable,
        wide: it.wide,
        address: it.bar.address,
        size: it.bar.size,
    };
    let at = function.place.at;
    PciInfo {
        bus: function.bus,
        path: path_to(function.place),
        slot: at.device(),
        function: at.function(),
        id,
        vendor: function.vendor,
        device: function.device,
        subsystem: function.subsystem,
        subsystem_vendor: function.subsystem_vendor,
        class: function.class,
        irq_pin: function.interrupt_pin,
        irq: function.interrupt_line,
        bars: function.bars.iter().map(bar_info).collect(),
        bridge: function.bridge.as_ref().map(bridge_info),
    }
}

fn bridge_info(forwarding: &Forwarding) -> PciBridgeInfo {
    let range = |extent: Extent| (extent.base, extent.limit);
    PciBridgeInfo {
        secondary: forwarding.secondary,
        subordinate: forwarding.subordinate,
        io: range(forwarding.io),
        memory: range(forwarding.memory),
        prefetchable: range(forwarding.prefetchable),
    }
}

pub(super) fn path_to(place: Place) -> PciPath {
    PciPath { bridge: place.bridge.map(DevFn::device), slot: place.at.device() }
}
