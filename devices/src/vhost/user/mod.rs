// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Devices whose queues another process serves, which is told of them over a unix socket (QEMU,
//! docs/interop/vhost-user.rst). It maps guest memory, so that has to come from files.
//!
//! `connection` carries the messages, each exchange within a time of its own, and notices when the other
//! side goes; `memory` keeps its map of guest memory; `rings` gives it queues and takes them back.
//!
//! Left out: requests that the other side makes, its configuration space, migration, and to connect again.

mod connection;
mod fs;
mod memory;
mod rings;

use std::io;
use std::path::PathBuf;

pub use fs::{FsConfig, VhostUserFs};

/// Why a device could not be had from another process.
#[derive(Debug, thiserror::Error)]
pub enum VhostUserError {
    /// Nobody answers at its socket.
    #[error("connect to vhost-user socket {}: {source}; is its daemon running?", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The daemon cannot be used for this device.
    #[error("vhost-user daemon at {}: {problem}", path.display())]
    Unfit {
        /// The socket.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A message failed.
    #[error("vhost-user daemon at {}: {attempted}: {problem}", path.display())]
    Failed {
        /// The socket.
        path: PathBuf,
        /// What was attempted.
        attempted: String,
        /// Why it failed.
        problem: String,
    },
    /// The system refused something that the connection needs.
    #[error("watch vhost-user daemon at {}: {source}", path.display())]
    Watch {
        /// The socket.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

#[cfg(test)]
mod peer;
#[cfg(test)]
mod tests;
