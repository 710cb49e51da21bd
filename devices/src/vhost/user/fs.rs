// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! File system device, VIRTIO 1.2 section 5.11, served by a daemon such as virtiofsd. What goes through the
//! queues is FUSE, and nobody's business here.
//!
//! Left out: the notification queue and the window of shared memory (DAX), which no daemon has.

use std::io;
use std::path::PathBuf;

use super::VhostUserError;
use super::rings::{GivenRings, Rings};
use crate::io_thread::IoHandle;
use crate::memory::MemoryListener;
use crate::virtio::{ActivateError, Activation, ActiveQueue, VirtioDevice};

/// Device type, section 5.11.1.
const DEVICE_TYPE: u32 = 26;

/// Bytes of a tag, section 5.11.4.
const TAG_SIZE: usize = 36;

/// What a file system device is made of.
#[derive(Debug, Clone)]
pub struct FsConfig {
    /// The daemon's socket.
    pub socket: PathBuf,
    /// The name under which the guest mounts it; 36 bytes of it.
    pub tag: String,
    /// Request queues, as far as the daemon serves so many.
    pub queues: u16,
    /// Entries of a queue: a power of two, 2 to 32768.
    pub queue_size: u16,
}

/// A file system device.
#[derive(Debug)]
pub struct VhostUserFs {
    // Configuration.
    tag: [u8; TAG_SIZE],
    queue_sizes: Vec<u16>,
    // Wiring.
    rings: Rings,
    // State.
    given: Option<GivenRings>,
}

impl VhostUserFs {
    /// A device whose daemon is connected to at once, and watched on the thread of `io`. When it goes,
    /// `on_lost` is called there, once.
    ///
    /// [`Self::memory_listener`] has to hear of guest memory before the device is activated.
    ///
    /// # Errors
    /// See [`VhostUserError`].
    pub fn new(
        config: &FsConfig,
        io: &IoHandle,
        on_lost: Box<dyn FnOnce() + Send>,
    ) -> Result<Self, VhostUserError> {
        // Queue 0 is for what must not wait behind requests.
        let wanted = 1 + u64::from(config.queues);
        let rings = Rings::connect(&config.socket, wanted, io, on_lost)?;
        let queues = wanted.min(rings.most());
        if queues < 2 {
            let problem = format!("it serves {} queues, and a file system needs 2", rings.most());
            return Err(rings.unfit(problem));
        }
        if queues < wanted {
            let (wanted, requests) = (config.queues, queues - 1);
            log::info!("{}: {requests} of {wanted} request queues", config.socket.display());
        }
        let mut tag = [0; TAG_SIZE];
        for (to, from) in tag.iter_mut().zip(config.tag.bytes()) {
            *to = from;
        }
        // At most what was wanted.
        let queue_sizes = vec![config.queue_size; queues as usize];
        Ok(Self { tag, queue_sizes, rings, given: None })
    }

    /// Keeps the daemon's map of guest memory.
    pub fn memory_listener(&self) -> Box<dyn MemoryListener> {
        self.rings.memory_listener()
    }
}

impl VirtioDevice for VhostUserFs {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        0
    }

    fn ring_features(&self) -> u64 {
        self.rings.features()
    }

    /// Read `struct virtio_fs_config`, section 5.11.4.
    fn config_read(&self, offset: u64, data: &mut [u8]) {
        let requests = (self.queue_sizes.len() - 1) as u32;
        let space = self.tag.into_iter().chain(requests.to_le_bytes());
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        data.fill(0);
        for (to, from) in data.iter_mut().zip(space.skip(offset)) {
            *to = from;
        }
    }

    fn activate(&mut self, context: Activation) -> Result<(), ActivateError> {
        let given = self.rings.give(context).map_err(|error| ActivateError {
            attempted: "start a file system device".into(),
            source: io::Error::other(error),
        })?;
        self.given = Some(given);
        Ok(())
    }

    fn deactivate(&mut self) -> Vec<ActiveQueue> {
        match self.given.take() {
            Some(given) => self.rings.take(given),
            None => Vec::new(),
        }
    }
}

impl Drop for VhostUserFs {
    fn drop(&mut self) {
        self.deactivate();
    }
}
