// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What a sandbox holds of the host, taken step by step and given back in the reverse order, whether the sandbox ran for
//! a year or its start failed half-way.

use std::sync::Arc;

use tokio::task::JoinSet;

use super::paths::Paths;
use super::persist;
use super::pod::blocking;
use crate::error::{Error, Result};
use crate::host::cgroup::SandboxCgroups;
use crate::host::netns::{self, PodNetns};
use crate::host::network::Network;
use crate::host::share::Share;
use crate::host::virtiofsd::Virtiofsd;

/// What a sandbox holds of the host. Give it back with [`Hold::release`].
#[derive(Debug)]
pub struct Hold {
    paths: Paths,
    /// Cgroups.
    pub(super) cgroups: Option<SandboxCgroups>,
    /// The shared directory.
    pub(super) share: Option<Arc<Share>>,
    /// What serves it.
    pub(super) virtiofsd: Option<Arc<Virtiofsd>>,
    /// The pod's network namespace.
    pub(super) netns: Option<PodNetns>,
    /// What was done in it.
    pub(super) network: Option<Network>,
    /// Tasks that watch over the sandbox and serve its sockets.
    pub(super) tasks: JoinSet<()>,
}

impl Hold {
    /// Of a sandbox with these directories, which are made.
    ///
    /// # Errors
    /// They cannot be made.
    pub fn new(paths: Paths) -> Result<Self> {
        let hold = Self {
            paths,
            cgroups: None,
            share: None,
            virtiofsd: None,
            netns: None,
            network: None,
            tasks: JoinSet::new(),
        };
        hold.paths.create()?;
        Ok(hold)
    }

    /// The shared directory, if there is one.
    pub fn share(&self) -> Option<Arc<Share>> {
        self.share.clone()
    }

    /// Write down what is held, for those who clean up when this process is gone.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn record(&self, agent_url: &str) -> anyhow::Result<()> {
        let state = persist::State {
            state: "running".into(),
            hypervisor_state: persist::Hypervisor {
                kind: "ecr".into(),
                api_socket: self.paths.qmp_socket(),
                pid: std::process::id(),
                virtiofs_daemon_pid: self.virtiofsd.as_ref().map_or(0, |v| v.id()),
            },
            agent_state: persist::Agent { url: agent_url.into() },
            network: persist::Network {
                network_id: self.netns.as_ref().map(|n| n.path.clone()).unwrap_or_default(),
                network_created: self.netns.as_ref().is_some_and(|netns| netns.created),
                endpoints: self.network.as_ref().map(Network::record),
            },
            cgroups: self.cgroups.as_ref().map(|cgroups| cgroups.record().clone()),
            ..Default::default()
        };
        state.save(&self.paths.state_file())
    }

    /// Give everything back. All is tried; the first failure is told, the others are logged.
    ///
    /// # Errors
    /// Something is left.
    pub async fn release(mut self) -> Result<()> {
        self.tasks.shutdown().await;
        let mut first = Ok(());
        let mut note = |what: &str, result: Result<()>| {
            if let Err(error) = result {
                log::warn!("give back {what}: {error}");
                if first.is_ok() {
                    first = Err(error.context(format!("give back {what}")));
                }
            }
        };
        if let Some(virtiofsd) = self.virtiofsd.take() {
            note("virtiofsd", virtiofsd.stop().await.map_err(Error::from));
        }
        if let Some(mut network) = self.network.take() {
            note("the network", blocking(move || network.detach()).await);
        }
        if let Some(netns) = self.netns.take_if(|netns| netns.created) {
            note("the network namespace", blocking(move || netns::delete(&netns.path)).await);
        }
        if let Some(share) = self.share.take() {
            note("the shared directory", blocking(move || share.remove()).await);
        }
        if let Some(cgroups) = self.cgroups.take() {
            note("the cgroups", blocking(move || cgroups.delete()).await);
        }
        let paths = self.paths;
        note("the sandbox's directories", blocking(move || paths.remove()).await);
        first
    }
}
