// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What all calls of the agent protocol share: the one sandbox that this guest is.
//!
//! There is one [`Sandbox`] per agent, made at start and handed to every call as `&Arc<Sandbox>`. It has no lock of its
//! own: each field locks itself, for as long as a look or a change takes and never over an `await`.
//!
//! Who owns what: `containers` belongs to [`crate::container`], `reaper` to [`crate::reaper`], everything else to the
//! code behind `service/guest.rs`. What making a container needs of the rest:
//!
//! - [`Sandbox::namespaces`]: the persistent IPC and UTS namespaces that `CreateSandbox` makes; none before it.
//! - [`crate::device::devices_into_spec`]: wait for the devices, put their numbers into the OCI spec.
//! - [`crate::storage::add_storages`], [`crate::storage::remove_storages`]: make the mounts, drop them again.

use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::RwLock;

use crate::container::Containers;
use crate::reaper::Reaper;

/// The sandbox. Its fields lock themselves.
#[derive(Debug)]
pub struct Sandbox {
    /// Every process of this agent is started through it, or its end is lost.
    pub reaper: Reaper,
    /// The containers by id.
    pub containers: Containers,
    /// Namespaces that outlive every container.
    pub namespaces: RwLock<Namespaces>,
}

/// Bind mounts of the namespaces that all containers of the sandbox share.
#[derive(Clone, Debug, Default)]
pub struct Namespaces {
    pub ipc: Option<PathBuf>,
    pub uts: Option<PathBuf>,
}

impl Sandbox {
    pub fn new(reaper: Reaper) -> Arc<Self> {
        Arc::new(Sandbox {
            reaper,
            containers: Containers::default(),
            namespaces: RwLock::default(),
        })
    }
}
