// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! From a device's configuration to a device in a slot of the board.

use std::fs::File;

use ecr_devices::backend::block::{BlockFile, IoEngine};
use ecr_devices::io_thread::{IoHandle, IoThread};
use ecr_devices::vhost::vsock::VhostVsock;
use ecr_devices::virtio::VirtioDevice;
use ecr_devices::virtio::blk::{Blk, BlkConfig};
use ecr_devices::virtio::console::{Console, PortConfig};
use ecr_devices::virtio::rng::Rng;
use ecr_devices::virtio::vsock::Vsock;

use super::{Machine, failed};
use crate::config::{DiskConfig, DiskIo, RngConfig, VsockBackend, VsockConfig};
use crate::control::BlockInfo;
use crate::vm::StartError;

impl Machine {
    /// Plug in all devices of the configuration, in an order that guests see as stable slot numbers.
    pub(super) fn plug_all(&mut self) -> Result<(), StartError> {
        let light = self.io_threads[0].handle();
        if let Some(port) = self.consoles.console() {
            let port = PortConfig { console: true, name: None, chardev: port };
            let console = Console::new(vec![port], light.clone()).map_err(failed)?;
            self.board.plug_virtio("console0", Box::new(console))?;
        }
        if let Some(rng) = self.config.rng.clone() {
            self.board.plug_virtio("rng0", open_rng(&rng, light.clone())?)?;
        }
        if let Some(vsock) = self.config.vsock.clone() {
            let device = self.open_vsock(&vsock, light)?;
            self.board.plug_virtio("vsock0", device)?;
        }
        for disk in self.config.disks.clone() {
            self.plug_disk(disk)?;
        }
        self.board.assign_bars().map_err(failed)
    }

    /// The queues of a disk spread over all I/O threads.
    fn plug_disk(&mut self, disk: DiskConfig) -> Result<(), StartError> {
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
        self.board.plug_virtio(&id, Box::new(Blk::new(config, threads).map_err(failed)?))?;
        self.blocks.push(BlockInfo { id, path, size, readonly, direct });
        Ok(())
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

fn open_rng(config: &RngConfig, io: IoHandle) -> Result<Box<dyn VirtioDevice>, StartError> {
    let source = File::open(&config.path)
        .map_err(|e| failed(format!("open {} for entropy: {e}", config.path.display())))?;
    Ok(Box::new(Rng::new(source, io)))
}
