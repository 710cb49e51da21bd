// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! A pod's virtual machine as the task API sees it: [`Launcher`] makes one, [`Sandbox`] runs containers in it.
//!
//! Everything here may be called at the same time from several tasks. Dropping a future cancels the call.

pub mod agent;
mod cleanup;
mod confine;
mod hold;
mod launch;
mod machine;
mod monitor;
mod paths;
pub mod persist;
mod pod;
mod request;

pub use cleanup::clean_up;
pub use launch::HostLauncher;

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use ecr_agent_protocol::agent::StatsContainerResponse;
use oci_spec::runtime::{LinuxResources, Process, Spec};
use tokio::sync::mpsc;

use crate::error::Result;

/// Makes the one sandbox of this process.
#[async_trait]
pub trait Launcher: Send + Sync + 'static {
    /// Start the virtual machine that the first container of a pod, or a container without a pod, lives in. When this
    /// fails, nothing is left behind on the host.
    async fn launch(&self, request: &ContainerRequest) -> Result<Launched>;
}

/// A sandbox that has just been started. Its agent answers; no container is in it yet.
pub struct Launched {
    /// The sandbox.
    pub sandbox: Arc<dyn Sandbox>,
    /// What happens in it on its own.
    pub events: mpsc::UnboundedReceiver<SandboxEvent>,
}

impl fmt::Debug for Launched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Launched")
    }
}

/// What happens in a sandbox on its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SandboxEvent {
    /// The guest's kernel killed a process of this container for want of memory.
    OutOfMemory(String),
    /// The sandbox has died: every call fails from now on. The text says why, with the guest's last words.
    Died(String),
}

/// A container to be created, as containerd asks for it.
#[derive(Debug, Clone)]
pub struct ContainerRequest {
    /// Its id, already validated.
    pub id: String,
    /// Its bundle on the host.
    pub bundle: PathBuf,
    /// How its root file system is to be mounted on `<bundle>/rootfs`; empty: it is there already.
    pub rootfs: Vec<Mount>,
    /// `config.json` of the bundle.
    pub spec: Spec,
    /// A configuration file named by the task options.
    pub config_path: Option<PathBuf>,
}

/// A mount as containerd describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// File system type, or `bind`.
    pub kind: String,
    /// Device, directory or file.
    pub source: String,
    /// Options as in fstab.
    pub options: Vec<String>,
}

/// A process of a container: its first, or an exec.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProcessId<'a> {
    /// The container.
    pub container: &'a str,
    /// The exec; empty for the container's first process.
    pub exec: &'a str,
}

/// An output stream of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    /// Standard output; with a terminal, everything.
    Stdout,
    /// Standard error.
    Stderr,
}

/// A running virtual machine, and containers in it.
#[async_trait]
pub trait Sandbox: Send + Sync + 'static {
    /// Create a container; its first process waits to be started. When this fails, nothing of it is left behind.
    async fn create_container(&self, request: &ContainerRequest) -> Result<()>;
    /// Start a container's first process.
    async fn start_container(&self, id: &str) -> Result<()>;
    /// Kill what runs in a container and remove it with everything it had on host and guest. Removing what is not
    /// there succeeds.
    async fn remove_container(&self, id: &str) -> Result<()>;
    /// Start another process in a running container.
    async fn exec(&self, id: ProcessId<'_>, process: &Process) -> Result<()>;
    /// Send a signal; `all` means every process of the container.
    async fn signal(&self, id: ProcessId<'_>, signal: u32, all: bool) -> Result<()>;
    /// Wait for a process to end; returns its exit status, 128 + signal when a signal ended it.
    async fn wait(&self, id: ProcessId<'_>) -> Result<u32>;
    /// Write to a process's standard input; returns how many bytes were taken.
    async fn write_stdin(&self, id: ProcessId<'_>, data: &[u8]) -> Result<usize>;
    /// Close a process's standard input.
    async fn close_stdin(&self, id: ProcessId<'_>) -> Result<()>;
    /// Read at most `limit` bytes; empty at the end of the stream.
    async fn read(&self, id: ProcessId<'_>, output: Output, limit: u32) -> Result<Vec<u8>>;
    /// Set the size of a process's terminal.
    async fn resize_terminal(&self, id: ProcessId<'_>, rows: u32, columns: u32) -> Result<()>;
    /// Freeze a container.
    async fn pause(&self, id: &str) -> Result<()>;
    /// Let it run again.
    async fn resume(&self, id: &str) -> Result<()>;
    /// Change a container's limits.
    async fn update(&self, id: &str, resources: &LinuxResources) -> Result<()>;
    /// What a container uses.
    async fn stats(&self, id: &str) -> Result<StatsContainerResponse>;
    /// End the virtual machine and give back everything that the sandbox took of the host. Called again, it does
    /// nothing.
    async fn stop(&self) -> Result<()>;
}
