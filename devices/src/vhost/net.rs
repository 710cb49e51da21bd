// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Network device, VIRTIO 1.2 section 5.1, whose frames the host's kernel carries between guest memory and a
//! tap (Linux, drivers/vhost/net.c).
//!
//! Each pair of queues has an open /dev/vhost-net of its own, whose rings 0 and 1 it is. The control queue
//! stays here.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use vhost::VhostBackend;
use vhost::vhost_kern::vhost_binding::{VHOST_NET_SET_BACKEND, vhost_vring_file};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::ioctl_with_ref;

use super::kernel::{Kernel, VhostError, failed};
use super::memory::VhostMemory;
use crate::backend::tap::NetBackend;
use crate::io_thread::{IoHandle, WorkerSet};
use crate::memory::MemoryListener;
use crate::virtio::net::control::{self, Backends, ControlWorker};
use crate::virtio::net::registers::Registers;
use crate::virtio::net::{NetConfig, NetError};
use crate::virtio::queue::DeviceQueue;
use crate::virtio::{ActivateError, Activation, ActiveQueue, VirtioDevice, VirtioInterrupt};

/// Features of rings and transport, section 6.
const RING_FEATURES: u64 = ((1 << 41) - 1) & !((1 << 24) - 1);
/// In the kernel's own numbering of features (linux/vhost.h): log writes for a migration, and frames without
/// headers in the tap.
const VHOST_F_LOG_ALL: u64 = 1 << 26;
const VHOST_NET_F_VIRTIO_NET_HDR: u64 = 1 << 27;
/// What of the device's features the kernel has a part in.
const SHARED_FEATURES: u64 = RING_FEATURES | 1 << VIRTIO_NET_F_MRG_RXBUF;

/// Why the kernel cannot carry a device's frames.
#[derive(Debug, thiserror::Error)]
pub enum VhostNetError {
    /// The device cannot be made at all.
    #[error(transparent)]
    Net(#[from] NetError),
    /// Each pair of queues needs one.
    #[error("{kernels} descriptors of /dev/vhost-net for {pairs} pairs of queues: use as many")]
    Count {
        /// Descriptors.
        kernels: usize,
        /// Pairs of queues.
        pairs: usize,
    },
    /// The kernel refused a step.
    #[error(transparent)]
    Setup(#[from] VhostError),
}

/// A network device whose frames the kernel carries.
#[derive(Debug)]
pub struct VhostNet {
    // Configuration.
    registers: Registers,
    /// What the kernel can do.
    features: u64,
    // Wiring.
    devices: Vec<Arc<File>>,
    backends: Backends,
    io: IoHandle,
    // State.
    control: WorkerSet,
    pairs: Vec<Pair>,
    /// Queues that nobody serves.
    idle: Vec<ActiveQueue>,
}

/// A pair of queues that the kernel has.
#[derive(Debug)]
struct Pair {
    kernel: Kernel,
    queues: Vec<ActiveQueue>,
    /// The hypervisor forgets a trigger when its last descriptor is closed, and the kernel's reference
    /// to the counter is none.
    calls: Vec<EventFd>,
}

impl VhostNet {
    /// A device before the taps of `config`, with one of `devices`, each an open /dev/vhost-net, for each of
    /// them. Commands are served on the thread of `io`.
    ///
    /// All of [`Self::memory_listeners`] have to hear of guest memory before the device is activated.
    ///
    /// # Errors
    /// See [`VhostNetError`].
    pub fn new(
        config: NetConfig,
        devices: Vec<OwnedFd>,
        io: IoHandle,
    ) -> Result<Self, VhostNetError> {
        let NetConfig { mac, mtu, queue_size, backends } = config;
        let (kernels, pairs) = (devices.len(), backends.len());
        if kernels != pairs {
            return Err(VhostNetError::Count { kernels, pairs });
        }
        let offloads = backends.first().map_or(0, |backend| backend.offloads());
        let registers = Registers::new(mac, mtu, pairs, queue_size, offloads)
            .ok_or(NetError::Queues { pairs, size: queue_size })?;
        let devices: Vec<_> =
            devices.into_iter().map(|device| Arc::new(File::from(device))).collect();
        let mut features = u64::MAX;
        for device in &devices {
            let kernel = Kernel::without_rings(Arc::clone(device));
            kernel.set_owner().map_err(failed("become the owner of /dev/vhost-net"))?;
            features &=
                kernel.get_features().map_err(failed("ask /dev/vhost-net for its features"))?;
        }
        Ok(Self {
            registers,
            features,
            devices,
            backends: backends.into(),
            io,
            control: WorkerSet::default(),
            pairs: Vec::new(),
            idle: Vec::new(),
        })
    }

    /// Keep the kernel's maps of guest memory, one for each pair of queues.
    pub fn memory_listeners(&self) -> Vec<Box<dyn MemoryListener>> {
        let listener = |device| Box::new(VhostMemory::new("vhost-net", device)) as Box<_>;
        self.devices.iter().map(listener).collect()
    }

    fn start(&mut self, context: Activation) -> Result<(), VhostError> {
        let Activation { memory, features, queues, interrupt } = context;
        let attempted = "prepare the tap".to_owned();
        control::begin(&self.backends, features)
            .map_err(|source| VhostError { attempted, source })?;
        let number = self.registers.control_queue(features);
        let mut commands = None;
        let mut pairs: Vec<Vec<ActiveQueue>> = self.devices.iter().map(|_| Vec::new()).collect();
        for queue in queues {
            match pairs.get_mut(usize::from(queue.index / 2)) {
                _ if queue.index == number => commands = Some(queue),
                Some(pair) if queue.index < number => pair.push(queue),
                _ => self.idle.push(queue),
            }
        }
        for (index, queues) in pairs.into_iter().enumerate() {
            let kernel = Kernel::new(Arc::clone(&self.devices[index]), memory.clone());
            let mut pair = Pair { kernel, queues, calls: Vec::new() };
            let given = self.give(&mut pair, index, features, &interrupt);
            // What the kernel has got of it is taken back with the others.
            self.pairs.push(pair);
            given?;
        }
        if let Some(queue) = commands {
            let queue = DeviceQueue::new(queue, features, interrupt);
            let worker = ControlWorker::new(memory, Arc::clone(&self.backends), features, queue);
            self.control.add(&self.io, Box::new(worker)).map_err(|error| VhostError {
                attempted: "serve the control queue of a network device".into(),
                source: io::Error::other(error),
            })?;
        }
        Ok(())
    }

    /// Hand a pair of queues over to the kernel.
    fn give(
        &self,
        pair: &mut Pair,
        index: usize,
        features: u64,
        interrupt: &Arc<dyn VirtioInterrupt>,
    ) -> Result<(), VhostError> {
        if pair.queues.is_empty() {
            return Ok(());
        }
        let own = VHOST_F_LOG_ALL | VHOST_NET_F_VIRTIO_NET_HDR;
        let features = features & self.features & SHARED_FEATURES & !own;
        let kernel = &pair.kernel;
        kernel
            .set_features(features)
            .map_err(failed(format!("set vhost features {features:#x}")))?;
        for queue in &pair.queues {
            let call = interrupt.queue_eventfd(queue.index).map_err(|source| {
                let attempted =
                    format!("make a trigger for the interrupt of queue {}", queue.index);
                VhostError { attempted, source }
            })?;
            kernel.give_ring(ring(queue), queue, &call)?;
            pair.calls.push(call);
        }
        for queue in &pair.queues {
            set_tap(kernel, ring(queue), Some(self.backends[index].as_ref()))?;
            // Buffers that came before the kernel had the doorbell.
            let _ = queue.kick.write(1);
        }
        Ok(())
    }
}

/// The number that a queue has in its pair.
fn ring(queue: &ActiveQueue) -> usize {
    usize::from(queue.index % 2)
}

/// Let the kernel carry frames between a ring and a tap, or no more.
fn set_tap(kernel: &Kernel, ring: usize, tap: Option<&dyn NetBackend>) -> Result<(), VhostError> {
    let fd = tap.map_or(-1, AsRawFd::as_raw_fd);
    let request = vhost_vring_file { index: ring as u32, fd };
    // SAFETY: the kernel reads the structure, which the reference keeps valid.
    if unsafe { ioctl_with_ref(kernel, VHOST_NET_SET_BACKEND(), &request) } == 0 {
        return Ok(());
    }
    let attempted = format!("connect ring {ring} of /dev/vhost-net with descriptor {fd}");
    Err(VhostError { attempted, source: io::Error::last_os_error() })
}

impl VirtioDevice for VhostNet {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn queue_max_sizes(&self) -> &[u16] {
        self.registers.queue_sizes()
    }

    fn features(&self) -> u64 {
        // The kernel has to know of the header's size; the rest is the tap's business.
        self.registers.features() & (self.features | !SHARED_FEATURES)
    }

    fn ring_features(&self) -> u64 {
        self.features
    }

    fn config_read(&self, offset: u64, data: &mut [u8]) {
        self.registers.read(offset, data);
    }

    fn activate(&mut self, context: Activation) -> Result<(), ActivateError> {
        self.start(context).map_err(|error| {
            self.deactivate();
            let VhostError { attempted, source } = error;
            ActivateError { attempted, source }
        })
    }

    fn deactivate(&mut self) -> Vec<ActiveQueue> {
        let mut all = self.control.take_queues();
        all.append(&mut self.idle);
        for Pair { kernel, mut queues, calls } in self.pairs.drain(..) {
            // Rings that were given; an earlier failure has left the others here.
            for queue in queues.iter_mut().take(calls.len()) {
                let number = ring(queue);
                let taken = set_tap(&kernel, number, None);
                if let Err(error) = taken.and_then(|()| kernel.take_ring(number, queue)) {
                    log::error!("{error}");
                }
            }
            all.append(&mut queues);
        }
        all.sort_by_key(|queue| queue.index);
        all
    }
}

impl Drop for VhostNet {
    fn drop(&mut self) {
        self.deactivate();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::tap::Tap;
    use crate::io_thread::IoThread;

    fn config(backends: Vec<Arc<dyn NetBackend>>) -> NetConfig {
        NetConfig { mac: [2, 0, 0, 0, 0, 1], mtu: None, queue_size: 256, backends }
    }

    fn thread() -> IoThread {
        IoThread::spawn("ecr-test", Box::new(|why| panic!("{why}"))).unwrap()
    }

    #[test]
    fn each_pair_needs_a_descriptor() {
        let file = tempfile::tempfile().unwrap();
        let error = VhostNet::new(config(Vec::new()), vec![file.into()], thread().handle());
        let text = error.unwrap_err().to_string();
        assert!(text.starts_with("1 descriptors of /dev/vhost-net for 0 pairs"), "{text}");
        let error = VhostNet::new(config(Vec::new()), Vec::new(), thread().handle()).unwrap_err();
        assert!(matches!(error, VhostNetError::Net(NetError::Queues { pairs: 0, .. })));
    }

    #[test]
    fn a_descriptor_of_something_else_is_refused_with_the_step() {
        let Ok(mut taps) = Tap::open("", 1) else {
            eprintln!("skipped: this host gives no taps");
            return;
        };
        let tap: Arc<dyn NetBackend> = Arc::new(taps.remove(0));
        let file = tempfile::tempfile().unwrap();
        let error = VhostNet::new(config(vec![tap]), vec![file.into()], thread().handle());
        let text = error.unwrap_err().to_string();
        assert!(text.starts_with("become the owner of /dev/vhost-net: "), "{text}");
    }
}
