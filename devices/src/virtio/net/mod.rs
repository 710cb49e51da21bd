// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Network device, VIRTIO 1.2 section 5.1: several pairs of queues, checksums and segmentation left to the
//! other side, buffers that are merged for large frames.
//!
//! `registers` is what the driver sees and negotiates, `control` the queue of commands; both serve the
//! devices whose frames the kernel carries as well. Here a worker for each pair of queues moves frames
//! between guest memory and a descriptor of the host, without a copy: `receive` and `transmit`.
//!
//! Left out: filters, because the host's bridge knows addresses; RSS and hash reports; statistics;
//! notification coalescing; changes of the link's state.

pub(crate) mod control;
mod device;
mod pieces;
mod receive;
pub(crate) mod registers;
mod transmit;
mod worker;

pub use device::{Net, NetConfig, NetError};

#[cfg(test)]
mod tests;
