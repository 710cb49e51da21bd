// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! A running sandbox: its machine, its agent, its containers.

mod files;

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use ecr_agent_protocol::agent as rpc;
use oci_spec::runtime::{LinuxResources, Process};
use parking_lot::Mutex;
use tokio::sync::{Mutex as AsyncMutex, watch};
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use super::agent::{Agent, call, call_unbounded};
use super::confine::{self, Cpuset};
use super::hold::Hold;
use super::machine::Machine;
use super::{ContainerRequest, Output, ProcessId, Sandbox};
use crate::config::Config;
use crate::container::spec::{self, Constraints};
use crate::container::wire;
use crate::error::{Error, Kind, Result};
use crate::host::hooks::{self, Stage};
use crate::host::mount;

/// How long after the loss of the agent the reason may come.
const VERDICT: Duration = Duration::from_secs(3);

/// How long the guest may take to end what runs in it and write everything out.
const DESTROY: Duration = Duration::from_secs(5);

/// SIGKILL.
const KILL: u32 = 9;

/// A running sandbox.
pub struct Pod {
    id: String,
    config: Config,
    agent: Agent,
    machine: Machine,
    /// What the sandbox holds of the host; `None` once it was given back.
    hold: Arc<AsyncMutex<Option<Hold>>>,
    containers: Mutex<HashMap<String, Container>>,
    /// The disk that the first container's root file system came with at boot: its name and place.
    boot_disk: Mutex<Option<BootDisk>>,
    /// Why the sandbox has died, once it has.
    death: watch::Receiver<Option<String>>,
}

/// A disk that was there at boot for the first container.
#[derive(Debug)]
pub struct BootDisk {
    /// The container.
    pub container: String,
    /// Where the guest finds it.
    pub pci_path: String,
}

/// What a container holds of the host.
#[derive(Debug, Clone)]
struct Container {
    request: Arc<ContainerRequest>,
    /// Its root file system is mounted in its bundle.
    mounted: bool,
    /// Its disks that can be taken out of the machine.
    disks: Vec<String>,
    /// The devices behind its disks.
    devices: Vec<PathBuf>,
    /// Where it may run.
    cpuset: Cpuset,
    /// The agent knows it.
    created: bool,
}

impl fmt::Debug for Pod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pod").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Pod {
    /// A sandbox whose agent answers.
    pub fn new(
        id: String,
        config: Config,
        agent: Agent,
        machine: Machine,
        hold: Hold,
        boot_disk: Option<BootDisk>,
        death: watch::Receiver<Option<String>>,
    ) -> Self {
        Self {
            id,
            config,
            agent,
            machine,
            hold: Arc::new(AsyncMutex::new(Some(hold))),
            containers: Mutex::default(),
            boot_disk: Mutex::new(boot_disk),
            death,
        }
    }

    /// What it holds of the host.
    pub fn hold(&self) -> &Arc<AsyncMutex<Option<Hold>>> {
        &self.hold
    }

    fn edit(&self, id: &str, change: impl FnOnce(&mut Container)) {
        if let Some(container) = self.containers.lock().get_mut(id) {
            change(container);
        }
    }

    /// Everything of a container's creation. What it has taken is recorded as it is taken, for [`Self::release`].
    async fn build(&self, request: &ContainerRequest) -> Result<()> {
        let root = self.root(request).await?;
        let guest = spec::for_guest(&request.spec, &root.path, self.constraints());
        let mut message = rpc::CreateContainerRequest {
            container_id: request.id.clone(),
            exec_id: request.id.clone(),
            storages: root.storages,
            sandbox_pidns: guest.shares_pid_namespace,
            ..Default::default()
        };
        let mut spec = guest.spec;
        self.add_volumes(request, &mut spec, &mut message.storages).await?;
        message.oci = Some(spec).into();
        self.edit(&request.id, |container| container.created = true);
        call!(self.agent, "CreateContainer", create_container, message)?;
        if request.id == self.id {
            return Ok(()); // Those of the sandbox have run before there was one.
        }
        self.run_hooks(Arc::new(request.clone()), Stage::Prestart).await?;
        self.run_hooks(Arc::new(request.clone()), Stage::CreateRuntime).await
    }

    async fn run_hooks(&self, request: Arc<ContainerRequest>, stage: Stage) -> Result<()> {
        if request.spec.hooks().is_none() {
            return Ok(());
        }
        let hold = self.hold.lock().await;
        let netns = hold.as_ref().and_then(|hold| hold.netns.as_ref());
        let netns = netns.map(|netns| netns.path.clone());
        drop(hold);
        blocking(move || run_hooks(&request, netns.as_deref(), stage)).await
    }

    async fn follow_cpusets(&self) {
        let all =
            self.containers.lock().values().map(|container| container.cpuset.clone()).collect();
        confine::follow_cpusets(&self.hold, all).await;
    }

    fn request(&self, id: &str) -> Option<Arc<ContainerRequest>> {
        self.containers.lock().get(id).map(|container| Arc::clone(&container.request))
    }

    fn constraints(&self) -> Constraints {
        Constraints { disable_seccomp: self.config.runtime.disable_guest_seccomp }
    }

    /// The agent cannot be reached: say why, which is known a moment later.
    async fn explain(&self, error: Error) -> Error {
        let mut death = self.death.clone();
        match timeout(VERDICT, death.wait_for(Option::is_some)).await {
            Ok(Ok(why)) => match &*why {
                Some(why) => Error::new(error.kind(), format!("{error}: {why}")),
                None => error,
            },
            _ => error,
        }
    }

    /// Let the guest end what runs in it and write everything out. Where it does not, the machine ends all the same.
    async fn destroy(&self) {
        if self.death.borrow().is_some() {
            return;
        }
        let message = rpc::DestroySandboxRequest::new();
        let (agent, patience) = (&self.agent, Some(DESTROY));
        if let Err(error) = call!(agent, "DestroySandbox", destroy_sandbox, message, patience) {
            log::info!("sandbox {}: {error}", self.id);
        }
    }

    /// Give back what a container holds of the host.
    async fn release(&self, id: &str) -> Result<()> {
        let Some(container) = self.containers.lock().remove(id) else { return Ok(()) };
        for disk in &container.disks {
            // The machine may be gone, and its disks with it.
            if let Err(error) = self.machine.unplug(disk).await {
                log::warn!("container {id}: {error}");
            }
        }
        for device in &container.devices {
            if let Err(error) = confine::set_device(&self.hold, device, false).await {
                log::warn!("container {id}: {error}");
            }
        }
        self.follow_cpusets().await;
        let share = self.hold.lock().await.as_ref().and_then(Hold::share);
        let id = id.to_owned();
        blocking(move || {
            let shared = share.map_or(Ok(()), |share| share.remove_container(&id));
            let mounted = unmount_rootfs(&container);
            shared.and(mounted)
        })
        .await
    }
}

fn unmount_rootfs(container: &Container) -> anyhow::Result<()> {
    if container.mounted {
        mount::unmount(&container.request.bundle.join("rootfs"))
    } else {
        Ok(())
    }
}

/// Run `work` on a thread that may wait.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
) -> Result<T> {
    match spawn_blocking(work).await {
        Ok(result) => result.map_err(Error::from),
        Err(error) => Err(Error::new(Kind::Internal, format!("a worker thread failed: {error}"))),
    }
}

/// Run a container's hooks of one stage. Blocking.
pub(super) fn run_hooks(
    request: &ContainerRequest,
    netns: Option<&Path>,
    stage: Stage,
) -> anyhow::Result<()> {
    let ContainerRequest { id, bundle, spec, .. } = request;
    hooks::run(&hooks::Container { id, bundle, spec, netns }, stage)
}

/// The name of the disk with a container's root file system.
pub(super) fn disk_id(container: &str) -> String {
    format!("rootfs-{container}")
}

/// The agent's name of a process: that of a container's first process is the container's.
fn exec_id(id: ProcessId<'_>) -> String {
    if id.exec.is_empty() { id.container.into() } else { id.exec.into() }
}

#[async_trait]
impl Sandbox for Pod {
    async fn create_container(&self, request: &ContainerRequest) -> Result<()> {
        let container = Container {
            request: Arc::new(request.clone()),
            mounted: false,
            disks: Vec::new(),
            devices: Vec::new(),
            cpuset: Cpuset::of(&request.spec),
            created: false,
        };
        self.containers.lock().insert(request.id.clone(), container);
        self.follow_cpusets().await;
        let built = self.build(request).await;
        if let Err(error) = &built {
            log::warn!("create container {}: {error}", request.id);
            if let Err(error) = self.remove_container(&request.id).await {
                log::warn!("undo the creation of container {}: {error}", request.id);
            }
        }
        built
    }

    async fn start_container(&self, id: &str) -> Result<()> {
        let message = rpc::StartContainerRequest { container_id: id.into(), ..Default::default() };
        call!(self.agent, "StartContainer", start_container, message)?;
        match self.request(id) {
            Some(request) => self.run_hooks(request, Stage::Poststart).await,
            None => Ok(()),
        }
    }

    async fn remove_container(&self, id: &str) -> Result<()> {
        let created = self.containers.lock().get(id).is_some_and(|container| container.created);
        if created {
            let message =
                rpc::RemoveContainerRequest { container_id: id.into(), ..Default::default() };
            // The host's part is given back whatever the guest says.
            if let Err(error) = call!(self.agent, "RemoveContainer", remove_container, message) {
                log::info!("container {id}: {error}");
            }
        }
        let request = self.request(id).filter(|_| created);
        let released = self.release(id).await;
        match request {
            Some(request) => self.run_hooks(request, Stage::Poststop).await.and(released),
            None => released,
        }
    }

    async fn exec(&self, id: ProcessId<'_>, process: &Process) -> Result<()> {
        let mut process = wire::process(process);
        process.selinux_label.clear();
        process.apparmor_profile.clear();
        let message = rpc::ExecProcessRequest {
            container_id: id.container.into(),
            exec_id: id.exec.into(),
            process: Some(process).into(),
            ..Default::default()
        };
        call!(self.agent, "ExecProcess", exec_process, message).map(drop)
    }

    async fn signal(&self, id: ProcessId<'_>, signal: u32, all: bool) -> Result<()> {
        let everything = id.exec.is_empty() && (all || signal == KILL);
        let message = rpc::SignalProcessRequest {
            container_id: id.container.into(),
            exec_id: if everything { String::new() } else { exec_id(id) },
            signal,
            ..Default::default()
        };
        call!(self.agent, "SignalProcess", signal_process, message).map(drop)
    }

    async fn wait(&self, id: ProcessId<'_>) -> Result<u32> {
        let message = rpc::WaitProcessRequest {
            container_id: id.container.into(),
            exec_id: exec_id(id),
            ..Default::default()
        };
        match call_unbounded!(self.agent, "WaitProcess", wait_process, message) {
            Ok(answer) => Ok(answer.status.cast_unsigned()),
            Err(error) if error.kind() == Kind::Unavailable => Err(self.explain(error).await),
            Err(error) => Err(error),
        }
    }

    async fn write_stdin(&self, id: ProcessId<'_>, data: &[u8]) -> Result<usize> {
        let message = rpc::WriteStreamRequest {
            container_id: id.container.into(),
            exec_id: exec_id(id),
            data: data.to_vec(),
            ..Default::default()
        };
        let answer = call_unbounded!(self.agent, "WriteStdin", write_stdin, message)?;
        Ok(usize::try_from(answer.len).unwrap_or(data.len()).min(data.len()))
    }

    async fn close_stdin(&self, id: ProcessId<'_>) -> Result<()> {
        let message = rpc::CloseStdinRequest {
            container_id: id.container.into(),
            exec_id: exec_id(id),
            ..Default::default()
        };
        call!(self.agent, "CloseStdin", close_stdin, message).map(drop)
    }

    async fn read(&self, id: ProcessId<'_>, output: Output, limit: u32) -> Result<Vec<u8>> {
        let message = rpc::ReadStreamRequest {
            container_id: id.container.into(),
            exec_id: exec_id(id),
            len: limit,
            ..Default::default()
        };
        let answer = match output {
            Output::Stdout => call_unbounded!(self.agent, "ReadStdout", read_stdout, message),
            Output::Stderr => call_unbounded!(self.agent, "ReadStderr", read_stderr, message),
        };
        Ok(answer?.data)
    }

    async fn resize_terminal(&self, id: ProcessId<'_>, rows: u32, columns: u32) -> Result<()> {
        let message = rpc::TtyWinResizeRequest {
            container_id: id.container.into(),
            exec_id: exec_id(id),
            row: rows,
            column: columns,
            ..Default::default()
        };
        call!(self.agent, "TtyWinResize", tty_win_resize, message).map(drop)
    }

    async fn pause(&self, id: &str) -> Result<()> {
        let message = rpc::PauseContainerRequest { container_id: id.into(), ..Default::default() };
        call!(self.agent, "PauseContainer", pause_container, message).map(drop)
    }

    async fn resume(&self, id: &str) -> Result<()> {
        let message = rpc::ResumeContainerRequest { container_id: id.into(), ..Default::default() };
        call!(self.agent, "ResumeContainer", resume_container, message).map(drop)
    }

    async fn update(&self, id: &str, resources: &LinuxResources) -> Result<()> {
        self.edit(id, |container| container.cpuset.update(resources));
        self.follow_cpusets().await;
        let mut resources = wire::resources(resources);
        spec::constrain_resources(&mut resources);
        let message = rpc::UpdateContainerRequest {
            container_id: id.into(),
            resources: Some(resources).into(),
            ..Default::default()
        };
        call!(self.agent, "UpdateContainer", update_container, message).map(drop)
    }

    async fn stats(&self, id: &str) -> Result<rpc::StatsContainerResponse> {
        let message = rpc::StatsContainerRequest { container_id: id.into(), ..Default::default() };
        call!(self.agent, "StatsContainer", stats_container, message)
    }

    async fn stop(&self) -> Result<()> {
        // Held until all is given back, so that a second caller returns when nothing is left.
        let mut hold = self.hold.lock().await;
        let Some(mut taken) = hold.take() else { return Ok(()) };
        // Nobody shall take what comes now for a death.
        taken.tasks.shutdown().await;
        self.destroy().await;
        self.agent.mark_dead();
        let machine = self.machine.stop().await;
        let containers: Vec<Container> =
            self.containers.lock().drain().map(|(_, container)| container).collect();
        let unmount = move || {
            // All are tried.
            let results: Vec<anyhow::Result<()>> = containers.iter().map(unmount_rootfs).collect();
            results.into_iter().collect::<anyhow::Result<()>>()
        };
        let unmounted = blocking(unmount).await;
        let released = taken.release().await;
        machine.map_err(Error::from).and(unmounted).and(released)
    }
}
