// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Block device, VIRTIO 1.2 section 5.2.
//!
//! `device` has the registers and hands the queues out, `request` reads one request from a chain, and
//! `worker` serves one queue on an io thread with a backend of its own. Data moves between guest memory
//! and the file without a copy.
//!
//! Left out: geometry, lifetime, secure erase, zones, and resizing while the guest runs.

mod device;
mod request;
mod worker;

pub use device::{Blk, BlkConfig, BlkError};

#[cfg(test)]
mod tests;
