// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Virtio socket device, section 5.10, served in this process: guests' ports are reached through unix
//! sockets of the host. See [`muxer`] for how, and `vhost::vsock` for the device that the host's kernel
//! serves.
//!
//! [`packet`] is the wire format; [`connection`] a stream as a state machine, without sockets; a link is a
//! connection with its socket; [`muxer`] has all links; the worker joins it with the queues.
//!
//! Left out: `VIRTIO_VSOCK_F_SEQPACKET`, datagrams. Connections end when the device is deactivated; a
//! driver that continues after that is told so.

use std::io;
use std::path::Path;
use std::sync::Arc;

use super::{ActivateError, Activation, ActiveQueue, VirtioDevice};
use crate::backend::unix_socket::{UnixSocket, UnixSocketError};
use crate::io_thread::{IoHandle, WorkerId};
use common::{DEVICE_TYPE, QUEUE_SIZES, VsockState, config_read, is_guest_cid};
use muxer::Muxer;
use worker::VsockWorker;

pub mod common;
pub mod connection;
mod handshake;
mod link;
pub mod muxer;
pub mod packet;
mod worker;

/// Why a socket device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// No guest can have this context id.
    #[error("{0} is not a context id for a guest: use 3 to 4294967294")]
    Cid(u64),
    /// The socket could not be made.
    #[error(transparent)]
    Socket(#[from] UnixSocketError),
}

/// A socket device whose host side is unix sockets.
#[derive(Debug)]
pub struct Vsock {
    // Configuration.
    cid: u64,
    // Wiring.
    listener: Arc<UnixSocket>,
    io: IoHandle,
    worker: Option<WorkerId>,
    // State.
    state: VsockState,
}

impl Vsock {
    /// A device for the guest with context id `cid`, which is reached through the unix socket `path`,
    /// and reaches port P of the host as `<path>_P`. Clients that come before the driver is ready wait.
    ///
    /// # Errors
    /// See [`VsockError`].
    pub fn new(cid: u64, path: &Path, io: IoHandle) -> Result<Self, VsockError> {
        if !is_guest_cid(cid) {
            return Err(VsockError::Cid(cid));
        }
        let listener = Arc::new(UnixSocket::bind(path)?);
        Ok(Self { cid, listener, io, worker: None, state: VsockState::default() })
    }

    /// The state, for a device that is not active.
    pub fn save(&self) -> VsockState {
        self.state
    }

    /// Continue from `state`, before the device is activated.
    pub fn restore(&mut self, state: &VsockState) {
        self.state = *state;
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        0
    }

    fn config_read(&self, offset: u64, data: &mut [u8]) {
        config_read(self.cid, offset, data);
    }

    fn activate(&mut self, context: Activation) -> Result<(), ActivateError> {
        let fail = |source| ActivateError {
            attempted: format!("serve the sockets of {:?}", self.listener.path()),
            source,
        };
        let muxer = Muxer::new(self.cid, Arc::clone(&self.listener)).map_err(fail)?;
        let worker = VsockWorker::new(context, muxer, self.state.was_active)?;
        let added = self.io.add(Box::new(worker));
        self.worker = Some(added.map_err(|error| fail(io::Error::other(error)))?);
        self.state.was_active = true;
        Ok(())
    }

    fn deactivate(&mut self) -> Vec<ActiveQueue> {
        let Some(id) = self.worker.take() else { return Vec::new() };
        match self.io.remove(id) {
            Ok(worker) => worker.into_queues(),
            Err(error) => {
                log::error!("stop the sockets of {:?}: {error}", self.listener.path());
                Vec::new()
            }
        }
    }
}

impl Drop for Vsock {
    fn drop(&mut self) {
        self.deactivate();
    }
}

#[cfg(test)]
mod tests;
