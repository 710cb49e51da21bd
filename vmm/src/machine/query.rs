// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What a machine tells about itself.

use ecr_devices::pci::BarSpace;
use ecr_devices::pci::config::{bar, offset};
use ecr_devices::pci::host::{DevFn, PciHost, SharedFunction};

use super::Machine;
use crate::control::{
    BlockInfo, ChardevInfo, CpuInfo, Identity, IoThreadInfo, MemoryInfo, NvdimmInfo, PciBarInfo,
    PciInfo,
};

impl Machine {
    pub(crate) fn identity(&self) -> Identity {
        Identity { name: self.config.name.clone(), uuid: self.config.uuid }
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
        let host = self.board.pci();
        let functions = host.functions();
        functions
            .iter()
            .map(|(at, function)| pci_info(host, *at, function, self.board.id_at(*at)))
            .collect()
    }
}

fn pci_info(host: &PciHost, at: DevFn, function: &SharedFunction, id: String) -> PciInfo {
    let registers = Registers { host, at };
    let bars = function.lock().bars();
    PciInfo {
        slot: at.device(),
        function: at.function(),
        id,
        vendor: registers.word(offset::VENDOR_ID),
        device: registers.word(offset::DEVICE_ID),
        subsystem: registers.word(offset::SUBSYSTEM_ID),
        subsystem_vendor: registers.word(offset::SUBSYSTEM_VENDOR_ID),
        class: registers.word(offset::CLASS_CODE + 1),
        irq_pin: registers.byte(offset::INTERRUPT_PIN),
        irq: registers.byte(offset::INTERRUPT_LINE),
        bars: bars
            .iter()
            .map(|decoded| {
                let flags = u32::from(registers.byte(offset::BAR0 + u16::from(decoded.index) * 4));
                let memory = decoded.space == BarSpace::Memory;
                PciBarInfo {
                    index: decoded.index,
                    io: !memory,
                    prefetch: memory && flags & bar::PREFETCHABLE != 0,
                    wide: memory && flags & bar::WIDE != 0,
                    address: decoded.address,
                    size: decoded.size,
                }
            })
            .collect(),
    }
}

/// Configuration space of one function.
struct Registers<'a> {
    host: &'a PciHost,
    at: DevFn,
}

impl Registers<'_> {
    fn byte(&self, offset: u16) -> u8 {
        let mut data = [0];
        let _ = self.host.config_read(self.at, offset, &mut data);
        data[0]
    }

    fn word(&self, offset: u16) -> u16 {
        u16::from(self.byte(offset)) | u16::from(self.byte(offset + 1)) << 8
    }
}
