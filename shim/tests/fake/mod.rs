// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! A sandbox without a virtual machine: its containers are processes of this host. Annotations make it slow or let it
//! fail, and it notes what it is asked.
//!
//! | annotation | effect |
//! |---|---|
//! | `fake/launch-delay`, `fake/create-delay`, `fake/start-delay` | milliseconds |
//! | `fake/launch-error`, `fake/create-error`, `fake/start-error` | the text |

#![allow(dead_code, missing_docs, clippy::needless_pass_by_value, clippy::unwrap_used)]

mod command;
pub mod harness;
mod process;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use ecr_agent_protocol::agent::{
    CgroupStats, CpuStats, CpuUsage, PidsStats, StatsContainerResponse,
};
use ecr_shim::error::{Error, Kind, Result};
use ecr_shim::sandbox::{
    ContainerRequest, Launched, Launcher, Output, ProcessId, Sandbox, SandboxEvent,
};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use oci_spec::runtime::{LinuxResources, Process as ProcessSpec};
use parking_lot::Mutex;
use process::Running;
use protobuf::MessageField;
use tokio::sync::{mpsc, watch};

/// Makes fake sandboxes. Clones share their notes.
#[derive(Clone, Default)]
pub struct FakeLauncher {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    notes: Mutex<Vec<String>>,
    events: Mutex<Option<mpsc::UnboundedSender<SandboxEvent>>>,
    processes: Mutex<HashMap<(String, String), Arc<Running>>>,
    /// The agent cannot be reached any more.
    lost: watch::Sender<bool>,
}

pub struct FakeSandbox {
    shared: Arc<Shared>,
    containers: Mutex<HashMap<String, ContainerRequest>>,
}

impl FakeLauncher {
    /// What the sandbox was asked, in order.
    pub fn notes(&self) -> Vec<String> {
        self.shared.notes.lock().clone()
    }

    /// Has it been asked this?
    pub fn noted(&self, note: &str) -> bool {
        self.notes().iter().any(|noted| noted == note)
    }

    /// Memory is short in a container.
    pub fn lack_memory(&self, container: &str) {
        self.shared.tell(SandboxEvent::OutOfMemory(container.into()));
    }

    /// The sandbox dies, which its processes are the first to show.
    pub async fn die(&self, why: &str) {
        self.shared.lost.send_replace(true);
        self.shared.kill_all();
        tokio::time::sleep(Duration::from_millis(50)).await;
        self.shared.tell(SandboxEvent::Died(why.into()));
    }
}

impl Shared {
    fn note(&self, note: String) {
        self.notes.lock().push(note);
    }

    fn tell(&self, event: SandboxEvent) {
        self.events.lock().as_ref().unwrap().send(event).unwrap();
    }

    fn kill_all(&self) {
        for process in self.processes.lock().values() {
            process.kill(9);
        }
    }

    fn process(&self, id: ProcessId<'_>) -> Result<Arc<Running>> {
        let key = (id.container.to_owned(), id.exec.to_owned());
        let found = self.processes.lock().get(&key).cloned();
        found.ok_or_else(|| Error::new(Kind::NotFound, format!("no process {id:?}")))
    }
}

/// Be slow, then fail, if the annotations say so.
async fn obey(request: &ContainerRequest, step: &str) -> Result<()> {
    let annotations = request.spec.annotations().clone().unwrap_or_default();
    if let Some(delay) = annotations.get(&format!("fake/{step}-delay")) {
        tokio::time::sleep(Duration::from_millis(delay.parse().unwrap())).await;
    }
    match annotations.get(&format!("fake/{step}-error")) {
        None => Ok(()),
        Some(text) => Err(Error::new(Kind::Internal, text.clone())),
    }
}

#[async_trait]
impl Launcher for FakeLauncher {
    async fn launch(&self, request: &ContainerRequest) -> Result<Launched> {
        self.shared.note(format!("launch {}", request.id));
        obey(request, "launch").await?;
        let (sender, events) = mpsc::unbounded_channel();
        *self.shared.events.lock() = Some(sender);
        let sandbox = FakeSandbox { shared: self.shared.clone(), containers: Mutex::default() };
        self.shared.note("launched".into());
        Ok(Launched { sandbox: Arc::new(sandbox), events })
    }
}

impl FakeSandbox {
    fn request(&self, id: &str) -> Result<ContainerRequest> {
        let found = self.containers.lock().get(id).cloned();
        found.ok_or_else(|| Error::new(Kind::NotFound, format!("no container {id}")))
    }

    fn run(&self, id: ProcessId<'_>, spec: &ProcessSpec) -> Result<()> {
        let request = self.request(id.container)?;
        let rootfs = request.bundle.join("rootfs");
        let root = (!request.rootfs.is_empty()).then_some(rootfs);
        let running = Running::start(spec, root.as_deref()).map_err(|error| {
            Error::new(Kind::Internal, format!("run {:?}: {error}", spec.args()))
        })?;
        let key = (id.container.to_owned(), id.exec.to_owned());
        self.shared.processes.lock().insert(key, Arc::new(running));
        Ok(())
    }
}

#[async_trait]
impl Sandbox for FakeSandbox {
    async fn create_container(&self, request: &ContainerRequest) -> Result<()> {
        self.shared.note(format!("create {}", request.id));
        obey(request, "create").await?;
        for entry in &request.rootfs {
            let target = request.bundle.join("rootfs");
            let data: Vec<_> = entry.options.iter().filter(|o| o.contains('=')).cloned().collect();
            mount(
                Some(entry.source.as_str()),
                &target,
                Some(entry.kind.as_str()),
                if entry.kind == "bind" { MsFlags::MS_BIND } else { MsFlags::empty() },
                Some(data.join(",").as_str()),
            )
            .map_err(|error| Error::new(Kind::Internal, format!("mount {entry:?}: {error}")))?;
        }
        self.containers.lock().insert(request.id.clone(), request.clone());
        Ok(())
    }

    async fn start_container(&self, id: &str) -> Result<()> {
        self.shared.note(format!("start {id}"));
        let request = self.request(id)?;
        obey(&request, "start").await?;
        let spec = request.spec.process().clone().unwrap();
        self.run(ProcessId { container: id, exec: "" }, &spec)
    }

    async fn remove_container(&self, id: &str) -> Result<()> {
        self.shared.note(format!("remove {id}"));
        for ((container, _), process) in self.shared.processes.lock().iter() {
            if container == id {
                process.kill(9);
            }
        }
        if let Some(request) = self.containers.lock().remove(id)
            && !request.rootfs.is_empty()
        {
            let _ = umount2(&request.bundle.join("rootfs"), MntFlags::MNT_DETACH);
        }
        Ok(())
    }

    async fn exec(&self, id: ProcessId<'_>, process: &ProcessSpec) -> Result<()> {
        self.shared.note(format!("exec {} {}", id.container, id.exec));
        self.run(id, process)
    }

    async fn signal(&self, id: ProcessId<'_>, signal: u32, all: bool) -> Result<()> {
        self.shared.note(format!("signal {} {:?} {signal} {all}", id.container, id.exec));
        self.shared.process(id)?.kill(i32::try_from(signal).unwrap());
        Ok(())
    }

    async fn wait(&self, id: ProcessId<'_>) -> Result<u32> {
        let process = self.shared.process(id)?;
        let mut lost = self.shared.lost.subscribe();
        tokio::select! {
            biased;
            _ = lost.wait_for(|&lost| lost) => Err(Error::new(Kind::Unavailable, "Dead agent")),
            status = process.wait() => Ok(status),
        }
    }

    async fn write_stdin(&self, id: ProcessId<'_>, data: &[u8]) -> Result<usize> {
        self.shared.process(id)?.write(data).await
    }

    async fn close_stdin(&self, id: ProcessId<'_>) -> Result<()> {
        self.shared.process(id)?.close_stdin().await;
        Ok(())
    }

    async fn read(&self, id: ProcessId<'_>, output: Output, limit: u32) -> Result<Vec<u8>> {
        self.shared.process(id)?.read(output, limit as usize).await
    }

    async fn resize_terminal(&self, id: ProcessId<'_>, rows: u32, columns: u32) -> Result<()> {
        self.shared.note(format!("resize {} {rows}x{columns}", id.container));
        self.shared.process(id)?.resize(rows, columns)
    }

    async fn pause(&self, id: &str) -> Result<()> {
        self.shared.note(format!("pause {id}"));
        self.shared.process(ProcessId { container: id, exec: "" })?.kill(19);
        Ok(())
    }

    async fn resume(&self, id: &str) -> Result<()> {
        self.shared.note(format!("resume {id}"));
        self.shared.process(ProcessId { container: id, exec: "" })?.kill(18);
        Ok(())
    }

    async fn update(&self, id: &str, resources: &LinuxResources) -> Result<()> {
        let limit = resources.memory().as_ref().and_then(|memory| memory.limit());
        self.shared.note(format!("update {id} {limit:?}"));
        Ok(())
    }

    async fn stats(&self, id: &str) -> Result<StatsContainerResponse> {
        self.request(id)?;
        let usage = CpuUsage {
            total_usage: 9_000_000,
            usage_in_kernelmode: 2_000_000,
            usage_in_usermode: 7_000_000,
            ..Default::default()
        };
        let cpu = CpuStats { cpu_usage: MessageField::some(usage), ..Default::default() };
        let group = CgroupStats {
            cpu_stats: MessageField::some(cpu),
            pids_stats: MessageField::some(PidsStats { current: 2, ..Default::default() }),
            ..Default::default()
        };
        Ok(StatsContainerResponse { cgroup_stats: MessageField::some(group), ..Default::default() })
    }

    async fn stop(&self) -> Result<()> {
        self.shared.note("stop".into());
        self.shared.kill_all();
        let ids: Vec<_> = self.containers.lock().keys().cloned().collect();
        for id in ids {
            self.remove_container(&id).await?;
        }
        Ok(())
    }
}
