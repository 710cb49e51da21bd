// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Directories of the host: from configuration to a device whose daemon is connected.

use std::sync::Arc;

use ecr_devices::vhost::user::{FsConfig as DeviceConfig, VhostUserFs};
use ecr_devices::virtio::VirtioDevice;

use super::{Machine, failed};
use crate::config::FsConfig;
use crate::handle::Message;
use crate::vm::StartError;

impl Machine {
    /// The device that `config` describes. When its daemon goes, the control thread hears of it.
    pub(super) fn create_fs(
        &mut self,
        config: &FsConfig,
    ) -> Result<Box<dyn VirtioDevice>, StartError> {
        let device = DeviceConfig {
            socket: config.socket.clone(),
            tag: config.tag.clone(),
            queues: config.queues,
            queue_size: config.queue_size,
        };
        let (mailbox, id) = (Arc::clone(&self.mailbox), config.id.clone());
        let on_lost = Box::new(move || {
            mailbox.send(Message::BackendLost(id));
        });
        let light = self.io_threads[0].handle();
        let device = VhostUserFs::new(&device, &light, on_lost)
            .map_err(|error| failed(format!("file system device {}: {error}", config.id)))?;
        self.memory.subscribe(device.memory_listener()).map_err(failed)?;
        Ok(Box::new(device))
    }
}
