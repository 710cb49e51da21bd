// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The device as its driver configures it.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use super::request::{MAX_DISCARD_SECTORS, MAX_SEGMENTS, MAX_WRITE_ZEROES_SECTORS, SECTOR_SIZE};
use super::worker::QueueWorker;
use crate::backend::block::{self, BlockFile, IoEngine};
use crate::io_thread::{IoHandle, WorkerSet};
use crate::virtio::queue::DeviceQueue;
use crate::virtio::{ActivateError, Activation, ActiveQueue, VirtioDevice};

/// What a block device is made of.
#[derive(Debug)]
pub struct BlkConfig {
    /// Its contents. The device is read-only where the file is.
    pub file: BlockFile,
    /// What the guest reads as its serial number; 20 bytes of it.
    pub serial: String,
    /// Number of request queues.
    pub queues: u16,
    /// Entries of a queue: a power of two, 4 to 32768.
    pub queue_size: u16,
    /// How requests reach the host.
    pub io: IoEngine,
}

/// Why a block device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum BlkError {
    /// No queue, or no thread to serve one.
    #[error("a block device needs a queue and an io thread; it was given {queues} and {threads}")]
    NothingToServe {
        /// Queues asked for.
        queues: u16,
        /// Threads given.
        threads: usize,
    },
    /// A queue size that virtio has not.
    #[error("queue size {0} is not a power of two from 4 to 32768")]
    QueueSize(u16),
    /// io_uring was asked for and the host does not allow it.
    #[error(
        "io_uring for disk {}: {source}; let the device choose, or have it use system calls",
        path.display()
    )]
    Uring {
        /// The file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

/// What the queues of a device share.
#[derive(Debug)]
pub(super) struct Disk {
    pub(super) file: BlockFile,
    pub(super) sectors: u64,
    pub(super) id: [u8; VIRTIO_BLK_ID_BYTES as usize],
    /// Whether completed writes may still be lost to a power failure, section 5.2.6.2.
    pub(super) writeback: AtomicBool,
}

/// A block device.
#[derive(Debug)]
pub struct Blk {
    // configuration
    disk: Arc<Disk>,
    queue_sizes: Vec<u16>,
    io: IoEngine,
    // wiring
    threads: Vec<IoHandle>,
    // state
    workers: WorkerSet,
    /// Features that the present driver accepted.
    accepted: u64,
}

impl Blk {
    /// A device whose queues are spread over `threads`.
    ///
    /// # Errors
    /// Any [`BlkError`].
    pub fn new(config: BlkConfig, threads: Vec<IoHandle>) -> Result<Self, BlkError> {
        let BlkConfig { file, serial, queues, queue_size, io } = config;
        if queues == 0 || threads.is_empty() {
            return Err(BlkError::NothingToServe { queues, threads: threads.len() });
        }
        if !queue_size.is_power_of_two() || queue_size < 4 {
            return Err(BlkError::QueueSize(queue_size));
        }
        if io == IoEngine::Uring {
            // Better now, in words, than when the guest's driver starts.
            block::backend(&file, io, queue_size)
                .map_err(|source| BlkError::Uring { path: file.path().to_owned(), source })?;
        }
        let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
        for (to, from) in id.iter_mut().zip(serial.bytes()) {
            *to = from;
        }
        let sectors = file.size() / u64::from(SECTOR_SIZE);
        let disk = Disk { file, sectors, id, writeback: AtomicBool::new(true) };
        Ok(Self {
            disk: Arc::new(disk),
            queue_sizes: vec![queue_size; usize::from(queues)],
            io,
            threads,
            workers: WorkerSet::default(),
            accepted: 0,
        })
    }

    /// struct `virtio_blk_config`, section 5.2.4.
    fn config_space(&self) -> [u8; 60] {
        let file = &self.disk.file;
        let block_sectors = file.logical_block_size() / SECTOR_SIZE;
        let physical_exponent =
            (file.physical_block_size() / file.logical_block_size()).max(1).ilog2();
        // One descriptor for the header, one for the status.
        let segments = self.queue_sizes.first().map_or(0, |size| u32::from(*size) - 2);
        let writeback = self.disk.writeback.load(Ordering::Relaxed);

        let mut space = [0; 60];
        let mut put = |offset: usize, bytes: &[u8]| {
            space[offset..offset + bytes.len()].copy_from_slice(bytes);
        };
        put(0, &self.disk.sectors.to_le_bytes()); // capacity
        put(12, &segments.to_le_bytes()); // seg_max
        put(20, &file.logical_block_size().to_le_bytes()); // blk_size
        put(24, &[physical_exponent as u8]); // topology.physical_block_exp
        put(26, &1u16.to_le_bytes()); // topology.min_io_size
        put(CONFIG_WRITEBACK, &[u8::from(writeback)]);
        put(34, &(self.queue_sizes.len() as u16).to_le_bytes()); // num_queues
        put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
        put(40, &MAX_SEGMENTS.to_le_bytes()); // max_discard_seg
        put(44, &block_sectors.to_le_bytes()); // discard_sector_alignment
        put(48, &MAX_WRITE_ZEROES_SECTORS.to_le_bytes());
        put(52, &MAX_SEGMENTS.to_le_bytes()); // max_write_zeroes_seg
        put(56, &[1]); // write_zeroes_may_unmap
        space
    }
}

/// Offset of the cache mode in the configuration space; the one field that a driver may write.
const CONFIG_WRITEBACK: usize = 32;

impl VirtioDevice for Blk {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        let always = 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_FLUSH
            | 1 << VIRTIO_BLK_F_TOPOLOGY
            | 1 << VIRTIO_BLK_F_CONFIG_WCE
            | 1 << VIRTIO_BLK_F_MQ;
        let kind = if self.disk.file.readonly() {
            1 << VIRTIO_BLK_F_RO
        } else {
            1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
        };
        always | kind
    }

    fn config_read(&self, offset: u64, data: &mut [u8]) {
        let space = self.config_space();
        let from = usize::try_from(offset).unwrap_or(usize::MAX).min(space.len());
        let known = data.len().min(space.len() - from);
        data.fill(0);
        data[..known].copy_from_slice(&space[from..from + known]);
    }

    fn config_write(&mut self, offset: u64, data: &[u8]) {
        let at =
            (CONFIG_WRITEBACK as u64).checked_sub(offset).and_then(|n| usize::try_from(n).ok());
        if self.accepted >> VIRTIO_BLK_F_CONFIG_WCE & 1 != 0
            && let Some(mode) = at.and_then(|at| data.get(at))
        {
            self.disk.writeback.store(*mode != 0, Ordering::Relaxed);
        }
    }

    fn activate(&mut self, context: Activation) -> Result<(), ActivateError> {
        self.accepted = context.features;
        if context.features >> VIRTIO_BLK_F_CONFIG_WCE & 1 == 0 {
            // A driver that never flushes must not need to.
            let flushes = context.features >> VIRTIO_BLK_F_FLUSH & 1 != 0;
            self.disk.writeback.store(flushes, Ordering::Relaxed);
        }
        let path = self.disk.file.path().display();
        for (active, thread) in context.queues.into_iter().zip(self.threads.iter().cycle()) {
            let queue = DeviceQueue::new(active, context.features, context.interrupt.clone());
            let backend =
                block::backend(&self.disk.file, self.io, queue.size()).map_err(|source| {
                    ActivateError {
                        attempted: format!("making a ring for a queue of disk {path}"),
                        source,
                    }
                })?;
            let worker =
                QueueWorker::new(Arc::clone(&self.disk), context.memory.clone(), queue, backend);
            self.workers.add(thread, Box::new(worker)).map_err(|error| ActivateError {
                attempted: format!("starting a queue of disk {path}"),
                source: io::Error::other(error),
            })?;
        }
        Ok(())
    }

    fn deactivate(&mut self) -> Vec<ActiveQueue> {
        self.workers.take_queues()
    }
}
