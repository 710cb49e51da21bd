// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Virtio socket device, section 5.10, served by the host's kernel (Linux, drivers/vhost/vsock.c).
//!
//! The kernel has the queues of packets. The queue of events stays here: it is needed only to say that
//! connections were lost, when a driver continues after the device was stopped.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use vhost::VhostBackend;
use vhost::vhost_kern::vhost_binding::{VHOST_VSOCK_SET_GUEST_CID, VHOST_VSOCK_SET_RUNNING};
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::ioctl_with_ref;

use super::kernel::{Kernel, VhostError, failed};
use super::memory::VhostMemory;
use crate::memory::MemoryListener;
use crate::virtio::queue::DeviceQueue;
use crate::virtio::vsock::common::{
    DEVICE_TYPE, EVENT, QUEUE_SIZES, VsockState, config_read, is_guest_cid, tell_transport_reset,
};
use crate::virtio::{ActivateError, Activation, ActiveQueue, VirtioDevice, VirtioInterrupt};

const PATH: &str = "/dev/vhost-vsock";

/// Features of rings and transport, section 6; what of them is offered is the transport's business.
const RING_FEATURES: u64 = ((1 << 41) - 1) & !((1 << 24) - 1);
/// In the kernel's own numbering of features: log writes for a migration (linux/vhost.h).
const VHOST_F_LOG_ALL: u64 = 1 << 26;

/// Why the kernel's socket device could not be used.
#[derive(Debug, thiserror::Error)]
pub enum VhostVsockError {
    /// The host has no such device.
    #[error(
        "this host has no {PATH}: load the module vhost_vsock, or use sockets that are served in \
         this process, at a unix socket path"
    )]
    Missing,
    /// It is there but could not be opened.
    #[error("open {PATH}: {0}")]
    Open(io::Error),
    /// No guest can have this context id.
    #[error("{0} is not a context id for a guest: use 3 to 4294967294")]
    Cid(u64),
    /// Another guest has this context id.
    #[error("context id {0} is in use on this host: choose another")]
    CidInUse(u64),
    /// The kernel refused a step.
    #[error(transparent)]
    Setup(#[from] VhostError),
}

/// A socket device whose packets the kernel carries between the guest and `AF_VSOCK` sockets.
#[derive(Debug)]
pub struct VhostVsock {
    // Configuration.
    cid: u64,
    features: u64,
    // Wiring.
    device: Arc<File>,
    running: Option<Running>,
    // State.
    state: VsockState,
}

#[derive(Debug)]
struct Running {
    kernel: Kernel,
    queues: Vec<ActiveQueue>,
    /// The hypervisor forgets a trigger when its last descriptor is closed, and the kernel's reference
    /// to the counter is none.
    _calls: Vec<EventFd>,
}

impl VhostVsock {
    /// A device for the guest with context id `cid`, on `device`, an open /dev/vhost-vsock, or one that
    /// is opened here. The id is taken at once.
    ///
    /// [`Self::memory_listener`] has to hear of guest memory before the device is activated.
    ///
    /// # Errors
    /// See [`VhostVsockError`].
    pub fn new(cid: u64, device: Option<OwnedFd>) -> Result<Self, VhostVsockError> {
        if !is_guest_cid(cid) {
            return Err(VhostVsockError::Cid(cid));
        }
        let device = Arc::new(match device {
            Some(device) => File::from(device),
            None => open()?,
        });
        let kernel = Kernel::without_rings(Arc::clone(&device));
        kernel.set_owner().map_err(failed(format!("become the owner of {PATH}")))?;
        let features = kernel.get_features().map_err(failed("ask vhost-vsock for its features"))?;
        set_guest_cid(&device, cid)?;
        Ok(Self { cid, features, device, running: None, state: VsockState::default() })
    }

    /// Keeps the kernel's map of guest memory.
    pub fn memory_listener(&self) -> Box<dyn MemoryListener> {
        Box::new(VhostMemory::new("vhost-vsock", &self.device))
    }

    /// The state, for a device that is not active.
    pub fn save(&self) -> VsockState {
        self.state
    }

    /// Continue from `state`, before the device is activated.
    pub fn restore(&mut self, state: &VsockState) {
        self.state = *state;
    }

    /// Hand the packet queues to the kernel.
    fn start(&self, context: &mut Activation) -> Result<Running, VhostError> {
        let kernel = Kernel::new(Arc::clone(&self.device), context.memory.clone());
        let features = context.features & self.features & !VHOST_F_LOG_ALL;
        kernel
            .set_features(features)
            .map_err(failed(format!("set vhost features {features:#x}")))?;
        let mut calls = Vec::new();
        for (number, queue) in packet_queues(&mut context.queues) {
            let call = context.interrupt.queue_eventfd(queue.index).map_err(|source| {
                let attempted = format!("make a trigger for the interrupt of queue {number}");
                VhostError { attempted, source }
            })?;
            kernel.give_ring(number, queue, &call)?;
            calls.push(call);
        }
        if calls.len() != usize::from(EVENT) {
            let attempted = format!("start vhost-vsock with {} of its 2 queues", calls.len());
            return Err(VhostError { attempted, source: io::ErrorKind::InvalidInput.into() });
        }
        set_running(&self.device, true)?;
        // Buffers that came before the kernel had the doorbell.
        for (_, queue) in packet_queues(&mut context.queues) {
            let _ = queue.kick.write(1);
        }
        Ok(Running { kernel, queues: std::mem::take(&mut context.queues), _calls: calls })
    }
}

/// The queues that are the kernel's, with their numbers there.
fn packet_queues(queues: &mut [ActiveQueue]) -> impl Iterator<Item = (usize, &mut ActiveQueue)> {
    queues
        .iter_mut()
        .filter(|queue| queue.index < EVENT)
        .map(|queue| (usize::from(queue.index), queue))
}

/// Tell the driver that its connections are gone.
fn lose_connections(running: &mut Running, features: u64, interrupt: &Arc<dyn VirtioInterrupt>) {
    let Some(position) = running.queues.iter().position(|queue| queue.index == EVENT) else {
        return;
    };
    let queue = running.queues.remove(position);
    let mut events = DeviceQueue::new(queue, features, Arc::clone(interrupt));
    let memory = running.kernel.memory().memory();
    if let Err(error) = tell_transport_reset(&mut events, &memory) {
        events.fail(&error);
    }
    running.queues.insert(position, events.into_active());
}

fn open() -> Result<File, VhostVsockError> {
    OpenOptions::new().read(true).write(true).open(PATH).map_err(|error| {
        // Without the module there is no file, or one that leads to no driver.
        let missing = error.kind() == io::ErrorKind::NotFound
            || matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ENXIO));
        if missing { VhostVsockError::Missing } else { VhostVsockError::Open(error) }
    })
}

fn set_guest_cid(device: &File, cid: u64) -> Result<(), VhostVsockError> {
    // SAFETY: the kernel reads a u64 from the pointer, which the reference keeps valid.
    if unsafe { ioctl_with_ref(device, VHOST_VSOCK_SET_GUEST_CID(), &cid) } == 0 {
        return Ok(());
    }
    let source = io::Error::last_os_error();
    if source.raw_os_error() == Some(libc::EADDRINUSE) {
        return Err(VhostVsockError::CidInUse(cid));
    }
    let attempted = format!("take context id {cid} for a guest");
    Err(VhostError { attempted, source }.into())
}

fn set_running(device: &File, running: bool) -> Result<(), VhostError> {
    let value = libc::c_int::from(running);
    // SAFETY: the kernel reads an int from the pointer, which the reference keeps valid.
    if unsafe { ioctl_with_ref(device, VHOST_VSOCK_SET_RUNNING(), &value) } == 0 {
        return Ok(());
    }
    let attempted = if running { "start" } else { "stop" };
    Err(VhostError {
        attempted: format!("{attempted} vhost-vsock"),
        source: io::Error::last_os_error(),
    })
}

impl VirtioDevice for VhostVsock {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        self.features & !RING_FEATURES
    }

    fn config_read(&self, offset: u64, data: &mut [u8]) {
        config_read(self.cid, offset, data);
    }

    fn activate(&mut self, mut context: Activation) -> Result<(), ActivateError> {
        let (features, interrupt) = (context.features, Arc::clone(&context.interrupt));
        let mut running = self.start(&mut context).map_err(|error| {
            let VhostError { attempted, source } = error;
            ActivateError { attempted, source }
        })?;
        if self.state.was_active {
            lose_connections(&mut running, features, &interrupt);
        }
        self.state.was_active = true;
        self.running = Some(running);
        Ok(())
    }

    fn deactivate(&mut self) -> Vec<ActiveQueue> {
        let Some(Running { kernel, mut queues, .. }) = self.running.take() else {
            return Vec::new();
        };
        if let Err(error) = set_running(&self.device, false) {
            log::error!("{error}");
        }
        for (number, queue) in packet_queues(&mut queues) {
            if let Err(error) = kernel.take_ring(number, queue) {
                log::error!("{error}");
            }
        }
        queues
    }
}

impl Drop for VhostVsock {
    fn drop(&mut self) {
        self.deactivate();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_ids_before_it_asks_the_kernel() {
        for cid in [0, 1, 2, u64::from(u32::MAX), u64::MAX] {
            let error = VhostVsock::new(cid, None).unwrap_err();
            assert!(matches!(error, VhostVsockError::Cid(_)), "{error}");
        }
    }

    #[test]
    fn a_descriptor_of_something_else_is_refused_with_the_step() {
        let file = tempfile::tempfile().unwrap();
        let error = VhostVsock::new(3, Some(file.into())).unwrap_err();
        let text = error.to_string();
        assert!(text.starts_with("become the owner of /dev/vhost-vsock: "), "{text}");
    }

    #[test]
    fn a_host_without_the_device_is_told_of_the_alternative() {
        if std::path::Path::new(PATH).exists() {
            eprintln!("skipped: this host has {PATH}");
            return;
        }
        let text = VhostVsock::new(3, None).unwrap_err().to_string();
        assert!(text.contains("no /dev/vhost-vsock") && text.contains("unix socket"), "{text}");
    }
}
