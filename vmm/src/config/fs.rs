// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::DiskConfig;

/// A directory of the host, served by a vhost-user daemon such as virtiofsd, which maps guest memory:
/// [`super::MemoryConfig::shared`] has to be set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FsConfig {
    /// Unique among all devices.
    pub id: String,
    /// The name under which the guest mounts it, 1 to 36 bytes.
    pub tag: String,
    /// The unix socket on which the daemon listens.
    pub socket: PathBuf,
    /// Request queues; where the daemon serves fewer, there are as many as it serves.
    #[serde(default = "FsConfig::default_queues")]
    pub queues: u16,
    /// Entries of a queue, a power of two.
    #[serde(default = "FsConfig::default_queue_size")]
    pub queue_size: u16,
}

impl FsConfig {
    /// Request queues where nothing else is asked for.
    pub const fn default_queues() -> u16 {
        1
    }

    /// Entries of a queue where nothing else is asked for.
    pub const fn default_queue_size() -> u16 {
        DiskConfig::default_queue_size()
    }
}
