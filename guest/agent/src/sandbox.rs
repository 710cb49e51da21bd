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
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use parking_lot::RwLock;
use tokio::sync::watch;

use crate::container::Containers;
use crate::reaper::Reaper;
use crate::storage::Storages;
use crate::uevent::Uevents;

/// What the agent makes for containers is below this.
pub const RUN: &str = "/run/kata-containers";
/// Where the host's share is mounted.
pub const SHARED: &str = "/run/kata-containers/shared/containers";
/// How long a device may take to show up, if nobody says otherwise.
pub const HOTPLUG_LIMIT: Duration = Duration::from_secs(3);

/// The sandbox. Its fields lock themselves.
#[derive(Debug)]
pub struct Sandbox {
    /// Every process of this agent is started through it, or its end is lost.
    pub reaper: Reaper,
    /// The containers by id.
    pub containers: Containers,
    /// Namespaces that outlive every container.
    pub namespaces: RwLock<Namespaces>,
    /// Where the image has programs to run beside containers, in `prestart`, `poststart` and `poststop`.
    pub guest_hooks: RwLock<Option<PathBuf>>,
    /// Devices that come.
    pub uevents: Uevents,
    /// What has been made to appear for containers.
    pub storages: Storages,
    /// Whether `CreateSandbox` has been here.
    pub created: AtomicBool,
    stop: watch::Sender<bool>,
}

/// Bind mounts of the namespaces that all containers of the sandbox share.
#[derive(Clone, Debug, Default)]
pub struct Namespaces {
    pub ipc: Option<PathBuf>,
    pub uts: Option<PathBuf>,
}

impl Sandbox {
    #[cfg(test)]
    pub fn new(reaper: Reaper) -> Arc<Self> {
        Self::with_hotplug_limit(reaper, HOTPLUG_LIMIT)
    }

    /// Devices may take this long to show up.
    pub fn with_hotplug_limit(reaper: Reaper, limit: Duration) -> Arc<Self> {
        Arc::new(Sandbox {
            reaper,
            containers: Containers::default(),
            namespaces: RwLock::default(),
            guest_hooks: RwLock::default(),
            uevents: Uevents::new(limit),
            storages: Storages::default(),
            created: AtomicBool::new(false),
            stop: watch::Sender::new(false),
        })
    }

    /// Ask for the end of the sandbox, which is the end of the guest.
    pub fn stop(&self) {
        self.stop.send_replace(true);
    }

    /// Wait until the end of the sandbox has been asked for.
    pub async fn stopped(&self) {
        // The sender is this sandbox's own, so there is an answer.
        let _ = self.stop.subscribe().wait_for(|stop| *stop).await;
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A sandbox in which devices do not take any time.
    pub fn sandbox() -> Arc<Sandbox> {
        Sandbox::with_hotplug_limit(Reaper::that_never_collects(), Duration::ZERO)
    }

    #[tokio::test(flavor = "current_thread")]
    async fn an_end_is_heard_before_and_after_it_was_asked_for() {
        let sandbox = sandbox();
        let heard = async {
            sandbox.stopped().await;
            sandbox.stopped().await;
        };
        tokio::join!(heard, async { sandbox.stop() });
    }
}
