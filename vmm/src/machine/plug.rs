// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! From a device's configuration to a device in a slot of the board: `reserve`, `create`, `attach`, and for a
//! guest that runs, `announce`. What fails leaves nothing behind.

use std::fs::File;

use ecr_devices::backend::block::{BlockFile, IoEngine};
use ecr_devices::io_thread::{IoHandle, IoThread};
use ecr_devices::vhost::vsock::VhostVsock;
use ecr_devices::virtio::VirtioDevice;
use ecr_devices::virtio::blk::{Blk, BlkConfig};
use ecr_devices::virtio::console::{Console, PortConfig};
use ecr_devices::virtio::rng::Rng;
use ecr_devices::virtio::vsock::Vsock;

use super::query::path_to;
use super::{Machine, failed};
use crate::config::{DiskConfig, DiskIo, RngConfig, VsockBackend, VsockConfig};
use crate::control::{BlockInfo, CommandError, DeviceConfig, PciPath};
use crate::vm::StartError;

impl Machine {
    /// Plug in all devices of the configuration, in an order that guests see as stable slot numbers.
    pub(super) fn plug_all(&mut self) -> Result<(), StartError> {
        let light = self.io_threads[0].handle();
        if let Some(port) = self.consoles.console() {
            let port = PortConfig { console: true, name: None, chardev: port };
            let console = Console::new(vec![port], light.clone()).map_err(failed)?;
            self.plug_cold("console0", Box::new(console))?;
        }
        if let Some(rng) = self.config.rng.clone() {
            self.plug_cold("rng0", open_rng(&rng, light.clone())?)?;
        }
        if let Some(vsock) = self.config.vsock.clone() {
            let device = self.open_vsock(&vsock, light)?;
            self.plug_cold("vsock0", device)?;
        }
        for index in 0..self.config.nets.len() {
            self.plug_net(index)?;
        }
        for fs in self.config.fs.clone() {
            let device = self.create_fs(&fs)?;
            self.plug_cold(&fs.id, device)?;
        }
        for disk in self.config.disks.clone() {
            self.plug_disk(disk)?;
        }
        self.board.assign_bars().map_err(failed)
    }

    /// Put a device into the next free slot of the root bus.
    fn plug_cold(&mut self, id: &str, device: Box<dyn VirtioDevice>) -> Result<(), StartError> {
        let place = self.board.slots().next(id)?;
        self.board.slots_mut().attach_virtio(id, place, device).map_err(failed)
    }

    fn plug_net(&mut self, index: usize) -> Result<(), StartError> {
        let mut net = self.config.nets[index].clone();
        let device = self.create_net(&mut net)?;
        self.plug_cold(&net.id, device)?;
        self.config.nets[index] = net;
        Ok(())
    }

    fn plug_disk(&mut self, disk: DiskConfig) -> Result<(), StartError> {
        let (device, info) = self.create_disk(disk)?;
        self.plug_cold(&info.id, device)?;
        self.blocks.push(info);
        Ok(())
    }

    /// Plug a device into a machine that runs: at `path`, or behind the first bridge that has a free slot.
    pub(crate) fn add_device(
        &mut self,
        device: DeviceConfig,
        path: Option<PciPath>,
    ) -> Result<PciPath, CommandError> {
        let id = device.id().to_owned();
        if self.board.slots().has_device(&id) {
            return Err(CommandError::Failed(format!("Duplicate device ID '{id}'")));
        }
        if let Some(remedy) = self.without_acpi {
            return Err(CommandError::Failed(format!(
                "this guest boots from a device tree alone, and would not learn of new devices: {remedy}"
            )));
        }
        let place = self.board.slots().reserve(path)?;
        let mut config = self.config.clone();
        match &device {
            DeviceConfig::Disk(disk) => config.disks.push(disk.clone()),
            DeviceConfig::Net(net) => config.nets.push(net.clone()),
        }
        config.validate().map_err(refused)?;
        match device {
            DeviceConfig::Disk(disk) => {
                let (device, info) = self.create_disk(disk).map_err(refused)?;
                self.board.slots_mut().attach_virtio(&id, place, device).map_err(refused)?;
                self.blocks.push(info);
            }
            DeviceConfig::Net(mut net) => {
                let device = self.create_net(&mut net).map_err(refused)?;
                self.board.slots_mut().attach_virtio(&id, place, device).map_err(refused)?;
                config.nets.pop();
                config.nets.push(net);
            }
        }
        self.config = config;
        self.board.slots().announce(place);
        Ok(path_to(place))
    }

    /// Ask the guest to give up a device.
    pub(crate) fn remove_device(&mut self, id: &str) -> Result<(), CommandError> {
        self.board.slots_mut().request_removal(id)
    }

    /// Take down the devices that the guest has ejected; returns their ids.
    pub(crate) fn take_ejected(&mut self) -> Vec<String> {
        let ids = self.board.slots_mut().take_ejected();
        self.forget(&ids);
        ids
    }

    /// Take down the devices that the guest was asked to give up; returns their ids.
    pub(super) fn complete_removals(&mut self) -> Vec<String> {
        let ids = self.board.slots_mut().complete_removals();
        self.forget(&ids);
        ids
    }

    fn forget(&mut self, ids: &[String]) {
        self.blocks.retain(|block| !ids.contains(&block.id));
        self.config.disks.retain(|disk| !ids.contains(&disk.id));
        self.config.nets.retain(|net| !ids.contains(&net.id));
    }

    /// The queues of a disk spread over all I/O threads.
    fn create_disk(
        &self,
        disk: DiskConfig,
    ) -> Result<(Box<dyn VirtioDevice>, BlockInfo), StartError> {
        let queues = disk.queues_for(self.config.cpus.boot);
        let DiskConfig { id, path, readonly, direct, serial, queue_size, io, .. } = disk;
        let file = BlockFile::open(&path, direct, readonly).map_err(failed)?;
        let size = file.size();
        let io = match io {
            DiskIo::Auto => IoEngine::Auto,
            DiskIo::Uring => IoEngine::Uring,
            DiskIo::Sync => IoEngine::Sync,
        };
        let config = BlkConfig { file, serial: serial.unwrap_or_default(), queues, queue_size, io };
        let threads = self.io_threads.iter().map(IoThread::handle).collect();
        let device = Box::new(Blk::new(config, threads).map_err(failed)?);
        Ok((device, BlockInfo { id, path, size, readonly, direct }))
    }

    fn open_vsock(
        &mut self,
        vsock: &VsockConfig,
        io: IoHandle,
    ) -> Result<Box<dyn VirtioDevice>, StartError> {
        Ok(match &vsock.backend {
            VsockBackend::Vhost { fd } => {
                let fd = fd.map(super::console::duplicate).transpose().map_err(failed)?;
                let device = VhostVsock::new(vsock.cid.into(), fd).map_err(failed)?;
                self.memory.subscribe(device.memory_listener()).map_err(failed)?;
                Box::new(device)
            }
            VsockBackend::Unix { path } => {
                Box::new(Vsock::new(vsock.cid.into(), path, io).map_err(failed)?)
            }
        })
    }
}

fn refused(error: impl std::fmt::Display) -> CommandError {
    CommandError::Failed(error.to_string())
}

fn open_rng(config: &RngConfig, io: IoHandle) -> Result<Box<dyn VirtioDevice>, StartError> {
    let source = File::open(&config.path)
        .map_err(|e| failed(format!("open {} for entropy: {e}", config.path.display())))?;
    Ok(Box::new(Rng::new(source, io)))
}
