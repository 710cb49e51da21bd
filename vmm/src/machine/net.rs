// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Network devices: from configuration to a device before a tap.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use ecr_devices::backend::tap::{NetBackend, Tap};
use ecr_devices::io_thread::IoThread;
use ecr_devices::virtio::VirtioDevice;
use ecr_devices::virtio::net::{Net, NetConfig as DeviceConfig};

use super::console::duplicate;
use super::{Machine, failed};
use crate::config::NetConfig;
use crate::vm::StartError;

impl Machine {
    /// The device that `config` describes. From then on `config` names the descriptors that are the machine's
    /// own; the caller may close its own ones and open others with the same numbers.
    pub(super) fn create_net(
        &self,
        config: &mut NetConfig,
    ) -> Result<Box<dyn VirtioDevice>, StartError> {
        let id = config.id.clone();
        let failed =
            |problem: &dyn std::fmt::Display| failed(format!("network device {id}: {problem}"));
        let taps = open_taps(config).map_err(|error| failed(&error))?;
        let device = DeviceConfig {
            mac: config.mac.0,
            mtu: config.mtu,
            queue_size: config.queue_size,
            backends: taps.into_iter().map(|tap| Arc::new(tap) as Arc<dyn NetBackend>).collect(),
        };
        let threads = self.io_threads.iter().map(IoThread::handle).collect();
        Ok(Box::new(Net::new(device, threads).map_err(|error| failed(&error))?))
    }
}

/// The queues of a tap, by name or by descriptors.
fn open_taps(config: &mut NetConfig) -> Result<Vec<Tap>, Box<dyn std::error::Error>> {
    if let Some(tap) = &config.tap {
        return Ok(Tap::open(&tap.name, tap.queues)?);
    }
    let own = take_over(&mut config.taps)?;
    let taps = own.into_iter().map(Tap::new).collect::<Result<Vec<_>, _>>()?;
    if let Some(other) = taps.iter().find(|tap| tap.name() != taps[0].name()) {
        let (first, other) = (taps[0].name(), other.name());
        return Err(format!(
            "its descriptors lead to {first} and to {other}: use those of one tap"
        )
        .into());
    }
    Ok(taps)
}

/// Make the descriptors `fds` the machine's own.
fn take_over(fds: &mut [RawFd]) -> Result<Vec<OwnedFd>, String> {
    fds.iter_mut()
        .map(|fd| {
            let own = duplicate(*fd).map_err(|error| format!("use descriptor {fd}: {error}"))?;
            *fd = own.as_raw_fd();
            Ok(own)
        })
        .collect()
}
