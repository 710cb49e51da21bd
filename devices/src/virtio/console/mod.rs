// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Virtio console, section 5.3: several ports (`VIRTIO_CONSOLE_F_MULTIPORT`), each a console (`hvcN`) or
//! a plain stream with a name.
//!
//! Nothing here waits for the host. Output that nobody takes is dropped and its buffers are completed;
//! input waits on the host until the driver gives buffers and somebody in the guest has the port open.
//!
//! Left out: the console's size, which a character backend does not know; emergency writes; ports that
//! come and go while the driver runs.

use std::io;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{ActivateError, Activation, ActiveQueue, VirtioDevice};
use crate::io_thread::{IoHandle, WorkerId};
use port::Port;
use worker::ConsoleWorker;

mod control;
mod port;
mod worker;

pub use port::{PortConfig, PortState};

/// Device type, section 5.3.1.
const DEVICE_TYPE: u32 = 3;

/// Several ports, and queues to speak of them.
const F_MULTIPORT: u64 = 1 << 1;

/// Most ports of a device, as in QEMU.
pub const MAX_PORTS: usize = 31;

const DATA_QUEUE_SIZE: u16 = 128;
const CONTROL_QUEUE_SIZE: u16 = 32;

/// Why a console could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// No ports, or too many.
    #[error("a virtio console with {0} ports: it has 1 to {MAX_PORTS}")]
    Ports(usize),
    /// The system refused.
    #[error("make an eventfd for a virtio console: {0}")]
    EventFd(io::Error),
}

/// State that outlives the driver's queues: one entry for each port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleState {
    ports: Vec<PortState>,
}

/// A virtio console.
#[derive(Debug)]
pub struct Console {
    // Configuration.
    queue_sizes: Vec<u16>,
    // Wiring.
    io: IoHandle,
    wake: Arc<EventFd>,
    worker: Option<WorkerId>,
    // State.
    ports: Vec<Arc<Port>>,
}

impl Console {
    /// A console with `ports`, whose queues are served on the thread of `io`.
    ///
    /// # Errors
    /// See [`ConsoleError`].
    pub fn new(ports: Vec<PortConfig>, io: IoHandle) -> Result<Self, ConsoleError> {
        let count = ports.len();
        if !(1..=MAX_PORTS).contains(&count) {
            return Err(ConsoleError::Ports(count));
        }
        let mut queue_sizes = vec![DATA_QUEUE_SIZE; 2 * count + 2];
        queue_sizes[usize::from(worker::CONTROL_RX)] = CONTROL_QUEUE_SIZE;
        queue_sizes[usize::from(worker::CONTROL_TX)] = CONTROL_QUEUE_SIZE;
        let wake =
            Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(ConsoleError::EventFd)?);
        let ports = (0..).zip(ports).map(|(id, port)| Port::new(id, port, Arc::clone(&wake)));
        Ok(Self { queue_sizes, io, ports: ports.collect(), wake, worker: None })
    }

    /// The state, for a device that is not active.
    pub fn save(&self) -> ConsoleState {
        ConsoleState { ports: self.ports.iter().map(|port| port.save()).collect() }
    }

    /// Continue from `state`, before the device is activated. Ports beyond those saved begin anew.
    pub fn restore(&mut self, state: &ConsoleState) {
        for (port, state) in self.ports.iter().zip(&state.ports) {
            port.restore(state);
        }
    }

    /// `struct virtio_console_config`, section 5.3.4.
    fn config(&self) -> [u8; 12] {
        let mut config = [0; 12];
        // Columns and rows come first; they are not valid without VIRTIO_CONSOLE_F_SIZE.
        let max_ports = u32::try_from(self.ports.len()).unwrap_or_default();
        config[4..8].copy_from_slice(&max_ports.to_le_bytes());
        config
    }
}

impl VirtioDevice for Console {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        F_MULTIPORT
    }

    fn config_read(&self, offset: u64, data: &mut [u8]) {
        let config = self.config();
        let rest = usize::try_from(offset).ok().and_then(|offset| config.get(offset..));
        data.fill(0);
        for (to, from) in data.iter_mut().zip(rest.unwrap_or_default()) {
            *to = *from;
        }
    }

    fn activate(&mut self, context: Activation) -> Result<(), ActivateError> {
        let worker = ConsoleWorker::new(context, self.ports.clone(), Arc::clone(&self.wake));
        let id = self.io.add(Box::new(worker)).map_err(|error| ActivateError {
            attempted: "serve the queues of a virtio console".into(),
            source: io::Error::other(error),
        })?;
        self.worker = Some(id);
        Ok(())
    }

    fn deactivate(&mut self) -> Vec<ActiveQueue> {
        let Some(id) = self.worker.take() else { return Vec::new() };
        match self.io.remove(id) {
            Ok(worker) => worker.into_queues(),
            Err(error) => {
                log::error!("stop a virtio console: {error}");
                Vec::new()
            }
        }
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        self.deactivate();
        for port in &self.ports {
            port.close();
        }
    }
}

#[cfg(test)]
mod tests;
