// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Containers: OCI specifications, as the agent protocol carries them, become processes.
//!
//! | module | subject |
//! |---|---|
//! | [`lifecycle`] | making, starting, pausing and removing containers |
//! | [`process`] | one process of a container: its end, its signals, its streams ([`stdio`]) |
//! | [`bundle`] | the container's directory, and what the guest changes in a specification |
//! | [`hooks`] | programs of the image that run beside containers |
//! | [`launch`], [`wire`], [`helper`] | how a process comes to be: the agent's side, the words, the other side |
//! | [`cgroup`], [`resources`], [`stats`], [`oom`] | limits, and what has been used |
//! | [`seccomp`] | system call filters |
//!
//! Why this is not a library's work: a filter for a process that may gain privileges has to be loaded before its
//! capabilities are dropped, in the middle of what a runtime library does, and the libraries that do so need C's
//! libseccomp. It also keeps every process a child of the agent, and the agent small.
//!
//! Left out, because the virtual machine is the wall: user namespaces, device rules, AppArmor and SELinux.

mod bundle;
mod cgroup;
pub mod helper;
mod hooks;
mod launch;
pub mod lifecycle;
mod oom;
mod process;
mod registry;
mod resources;
mod seccomp;
mod stats;
mod stdio;
mod wire;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use ecr_agent_protocol::oci::LinuxSeccomp;
use parking_lot::Mutex;
use tokio::task::AbortHandle;

use crate::reaper::Ended;
use cgroup::Cgroup;
use oom::Events;
pub use process::Process;
use registry::Registry;
pub use stdio::Source;

/// The annotation that names the file.
const TERMINATION_MESSAGE: &str = "io.kubernetes.container.terminationMessagePath";
const TERMINATION_MESSAGE_LENGTH: u64 = 4096;

/// The containers of the sandbox.
#[derive(Debug, Default)]
pub struct Containers {
    registry: Registry<Container>,
    /// The first process in the PID namespace that containers share, if they do.
    first: Mutex<Option<Ended>>,
    oom: Events,
    pipe_size: AtomicU32,
}

/// One container.
#[derive(Debug)]
pub struct Container {
    id: String,
    /// What the runtime calls the first process, beside the empty string.
    exec_id: String,
    cgroup: Cgroup,
    bundle: PathBuf,
    /// For [`crate::storage::remove_storages`].
    storages: Vec<String>,
    annotations: HashMap<String, String>,
    seccomp: Option<LinuxSeccomp>,
    first: Arc<Process>,
    execs: Registry<Process>,
    /// One change of state at a time.
    changing: tokio::sync::Mutex<()>,
    paused: AtomicBool,
    /// SIGKILL is on its way to all its processes.
    killed: AtomicBool,
    oom_watch: Mutex<Option<AbortHandle>>,
}

/// Why a call failed; the classes are those that clients tell apart.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("container {0:?} is not known")]
    UnknownContainer(String),
    #[error("container {0} has no process {1:?}")]
    UnknownProcess(String, String),
    #[error("{0} exists already")]
    Exists(String),
    #[error("{0}")]
    Invalid(String),
    #[error("{0}")]
    State(String),
    #[error("{0}")]
    Timeout(String),
    #[error("{0}")]
    NoTerminal(String),
    #[error("{0:#}")]
    Other(#[from] anyhow::Error),
}

pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Containers {
    /// The container of this id.
    pub fn get(&self, id: &str) -> Result<Arc<Container>> {
        self.registry.get(id).ok_or_else(|| Error::UnknownContainer(id.into()))
    }

    /// The process of a container; the empty name is its first one's.
    pub fn process(&self, id: &str, exec_id: &str) -> Result<(Arc<Container>, Arc<Process>)> {
        let container = self.get(id)?;
        let process = if exec_id.is_empty() || exec_id == container.exec_id {
            Arc::clone(&container.first)
        } else {
            container
                .execs
                .get(exec_id)
                .ok_or_else(|| Error::UnknownProcess(id.into(), exec_id.into()))?
        };
        Ok((container, process))
    }

    /// Ids of all containers, in no order.
    pub fn ids(&self) -> Vec<String> {
        self.registry.all().into_iter().map(|(id, _)| id).collect()
    }

    /// The capacity in bytes of pipes to processes that are made from now on; 0 is the kernel's own.
    pub fn set_pipe_size(&self, size: u32) {
        self.pipe_size.store(size, Ordering::Relaxed);
    }

    /// Wait until some container runs out of memory: its id. `None` when the sandbox ends.
    pub async fn next_oom(&self) -> Option<String> {
        self.oom.next().await
    }
}

impl Container {
    /// What a container says about its end, in the file that Kubernetes has agreed on with it: at most 4 KiB.
    pub fn diagnostic(&self, kind: &str) -> Result<String> {
        if kind != "termination_log" {
            return Err(Error::Invalid(format!("diagnostic data {kind:?} is not known")));
        }
        let Some(path) = self.annotations.get(TERMINATION_MESSAGE) else {
            let id = &self.id;
            return Err(Error::Invalid(format!("container {id} has no {TERMINATION_MESSAGE}")));
        };
        Ok(bundle::read_below(&bundle::rootfs(&self.bundle), path, TERMINATION_MESSAGE_LENGTH)?)
    }

    fn is_first(&self, process: &Arc<Process>) -> bool {
        Arc::ptr_eq(&self.first, process)
    }
}
