// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Network devices: from configuration to a device before a tap.

use std::error::Error;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use ecr_devices::backend::tap::{NetBackend, Tap};
use ecr_devices::io_thread::IoThread;
use ecr_devices::vhost::net::VhostNet;
use ecr_devices::virtio::VirtioDevice;
use ecr_devices::virtio::net::{Net, NetConfig as DeviceConfig};

use super::console::duplicate;
use super::{Machine, failed};
use crate::config::NetConfig;
use crate::vm::StartError;

const VHOST_NET: &str = "/dev/vhost-net";

impl Machine {
    /// The device that `config` describes. From then on `config` names the descriptors that are the machine's
    /// own; the caller may close its own ones and open others with the same numbers.
    pub(super) fn create_net(
        &mut self,
        config: &mut NetConfig,
    ) -> Result<Box<dyn VirtioDevice>, StartError> {
        self.open_net(config).map_err(|problem| {
            let id = &config.id;
            failed(format!("network device {id}: {problem}"))
        })
    }

    fn open_net(
        &mut self,
        config: &mut NetConfig,
    ) -> Result<Box<dyn VirtioDevice>, Box<dyn Error>> {
        let taps = open_taps(config)?;
        let kernels = open_kernels(config)?;
        let device = DeviceConfig {
            mac: config.mac.0,
            mtu: config.mtu,
            queue_size: config.queue_size,
            backends: taps.into_iter().map(|tap| Arc::new(tap) as Arc<dyn NetBackend>).collect(),
        };
        if kernels.is_empty() {
            let threads = self.io_threads.iter().map(IoThread::handle).collect();
            return Ok(Box::new(Net::new(device, threads)?));
        }
        let device = VhostNet::new(device, kernels, self.io_threads[0].handle())?;
        for listener in device.memory_listeners() {
            self.memory.subscribe(listener)?;
        }
        Ok(Box::new(device))
    }
}

/// One /dev/vhost-net for each pair of queues, or none.
fn open_kernels(config: &mut NetConfig) -> Result<Vec<OwnedFd>, Box<dyn Error>> {
    let Some(tap) = config.tap.as_ref().filter(|tap| tap.vhost) else {
        return Ok(take_over(&mut config.vhost)?);
    };
    let open = |_| OpenOptions::new().read(true).write(true).open(VHOST_NET).map(OwnedFd::from);
    let opened: io::Result<Vec<_>> = (0..tap.queues).map(open).collect();
    opened.map_err(|error| {
        format!("open {VHOST_NET}: {error}; load the module vhost_net, or leave vhost=on out")
            .into()
    })
}

/// The queues of a tap, by name or by descriptors.
fn open_taps(config: &mut NetConfig) -> Result<Vec<Tap>, Box<dyn Error>> {
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
