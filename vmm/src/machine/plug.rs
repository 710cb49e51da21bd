// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! From a device's configuration to a device in a slot of the board.

use std::fs::File;

use ecr_devices::io_thread::IoHandle;
use ecr_devices::vhost::vsock::VhostVsock;
use ecr_devices::virtio::VirtioDevice;
use ecr_devices::virtio::console::{Console, PortConfig};
use ecr_devices::virtio::rng::Rng;
use ecr_devices::virtio::vsock::Vsock;

use super::{Machine, failed};
use crate::config::{RngConfig, VsockBackend, VsockConfig};
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
        self.board.assign_bars().map_err(failed)
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
