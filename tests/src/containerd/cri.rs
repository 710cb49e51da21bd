// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! A small CRI client: pods and their containers, as a kubelet asks for them.

use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use protobuf::{EnumOrUnknown, Message, MessageField};

use super::grpc::Channel;
use super::image::{BUSYBOX, BUSYBOX_SHELL};

include!(concat!(env!("OUT_DIR"), "/modules.rs"));

use cri::{
    ContainerConfig, ContainerMetadata, ContainerState, ContainerStats, ContainerStatus, DNSConfig,
    ExecSyncResponse, ImageSpec, LinuxContainerConfig, LinuxContainerResources, Mount,
    PodSandboxConfig, PodSandboxMetadata, PodSandboxStatus,
};

/// Longer than any call takes in an emulated host, and shorter than a test's time limit.
const LIMIT: Duration = Duration::from_secs(300);

/// A pod to be run.
#[derive(Debug, Clone)]
pub struct PodSpec(pub PodSandboxConfig);

impl PodSpec {
    /// A pod of this name, its containers' logs below `logs`.
    #[must_use]
    pub fn new(name: &str, logs: &Path) -> Self {
        let metadata = PodSandboxMetadata {
            name: name.into(),
            uid: format!("uid-{name}"),
            namespace: "tests".into(),
            ..Default::default()
        };
        let dns = DNSConfig { servers: vec!["192.0.2.53".into()], ..Default::default() };
        Self(PodSandboxConfig {
            metadata: MessageField::some(metadata),
            hostname: name.into(),
            log_directory: logs.join(name).display().to_string(),
            dns_config: MessageField::some(dns),
            linux: MessageField::some(cri::LinuxPodSandboxConfig {
                cgroup_parent: "/ecr-tests".into(),
                ..Default::default()
            }),
            ..Default::default()
        })
    }

    /// With an annotation.
    #[must_use]
    pub fn annotation(mut self, key: &str, value: &str) -> Self {
        self.0.annotations.insert(key.into(), value.into());
        self
    }

    /// In the host's own network.
    #[must_use]
    pub fn host_network(mut self) -> Self {
        let options = cri::NamespaceOption {
            network: EnumOrUnknown::new(cri::NamespaceMode::NODE),
            ..Default::default()
        };
        let context = cri::LinuxSandboxSecurityContext {
            namespace_options: MessageField::some(options),
            ..Default::default()
        };
        if let Some(linux) = self.0.linux.as_mut() {
            linux.security_context = MessageField::some(context);
        }
        self
    }
}

/// A container to be created in a pod.
#[derive(Debug, Clone)]
pub struct ContainerSpec(pub ContainerConfig);

impl ContainerSpec {
    /// Busybox, running this shell script.
    #[must_use]
    pub fn script(name: &str, script: &str) -> Self {
        let metadata = ContainerMetadata { name: name.into(), ..Default::default() };
        let image = ImageSpec { image: BUSYBOX.into(), ..Default::default() };
        Self(ContainerConfig {
            metadata: MessageField::some(metadata),
            image: MessageField::some(image),
            command: BUSYBOX_SHELL.map(str::to_owned).into_iter().chain([script.into()]).collect(),
            log_path: format!("{name}.log"),
            linux: MessageField::some(LinuxContainerConfig::default()),
            ..Default::default()
        })
    }

    /// With a file or directory of the host.
    #[must_use]
    pub fn mount(mut self, host: &Path, container: &str, readonly: bool) -> Self {
        self.0.mounts.push(Mount {
            container_path: container.into(),
            host_path: host.display().to_string(),
            readonly,
            ..Default::default()
        });
        self
    }

    /// With limits.
    #[must_use]
    pub fn resources(mut self, resources: LinuxContainerResources) -> Self {
        self.linux().resources = MessageField::some(resources);
        self
    }

    /// What is Linux's own.
    pub fn linux(&mut self) -> &mut LinuxContainerConfig {
        self.0.linux.mut_or_insert_default()
    }
}

/// containerd's CRI service.
#[derive(Debug, Clone)]
pub struct Cri {
    channel: Channel,
    handler: String,
}

impl Cri {
    /// The service at `socket`; pods are run by the runtime handler `handler`.
    #[must_use]
    pub fn new(socket: &Path, handler: &str) -> Self {
        Self { channel: Channel::new(socket), handler: handler.into() }
    }

    fn call<Reply: Message>(&self, method: &str, request: &impl Message) -> Result<Reply> {
        self.channel.call(&format!("runtime.v1.RuntimeService/{method}"), request, LIMIT)
    }

    fn tell(&self, method: &str, request: &impl Message) -> Result<()> {
        self.call::<cri::Nothing>(method, request).map(drop)
    }

    /// What containerd says is not ready: runtime, network.
    ///
    /// # Errors
    /// It does not answer.
    pub fn not_ready(&self) -> Result<Vec<String>> {
        let reply: cri::StatusResponse = self.call("Status", &cri::StatusRequest::default())?;
        let conditions = reply.status.unwrap_or_default().conditions;
        let bad = conditions.into_iter().filter(|condition| !condition.status);
        Ok(bad.map(|c| format!("{}: {} {}", c.type_, c.reason, c.message)).collect())
    }

    /// Runs a pod; returns its id.
    ///
    /// # Errors
    /// The call failed; so with all that follow.
    pub fn run_pod(&self, pod: &PodSpec) -> Result<String> {
        std::fs::create_dir_all(&pod.0.log_directory)?;
        let request = cri::RunPodSandboxRequest {
            config: MessageField::some(pod.0.clone()),
            runtime_handler: self.handler.clone(),
            ..Default::default()
        };
        let reply: cri::RunPodSandboxResponse = self.call("RunPodSandbox", &request)?;
        Ok(reply.pod_sandbox_id)
    }

    /// What containerd says of a pod, and of what it passed to the runtime.
    ///
    /// # Errors
    /// As [`Self::run_pod`].
    pub fn pod_status(&self, pod: &str) -> Result<(PodSandboxStatus, HashMap<String, String>)> {
        let request = cri::PodSandboxStatusRequest {
            pod_sandbox_id: pod.into(),
            verbose: true,
            ..Default::default()
        };
        let reply: cri::PodSandboxStatusResponse = self.call("PodSandboxStatus", &request)?;
        Ok((reply.status.unwrap_or_default(), reply.info))
    }

    /// A pod's address in its network.
    ///
    /// # Errors
    /// As [`Self::run_pod`].
    pub fn pod_ip(&self, pod: &str) -> Result<String> {
        Ok(self.pod_status(pod)?.0.network.unwrap_or_default().ip)
    }

    /// The ids of all pods.
    ///
    /// # Errors
    /// As [`Self::run_pod`].
    pub fn pods(&self) -> Result<Vec<String>> {
        let request = cri::ListPodSandboxRequest::default();
        let reply: cri::ListPodSandboxResponse = self.call("ListPodSandbox", &request)?;
        Ok(reply.items.into_iter().map(|pod| pod.id).collect())
    }

    /// Stops a pod and removes it with its containers.
    ///
    /// # Errors
    /// As [`Self::run_pod`].
    pub fn remove_pod(&self, pod: &str) -> Result<()> {
        let pod_sandbox_id = pod.to_owned();
        self.tell(
            "StopPodSandbox",
            &cri::StopPodSandboxRequest {
                pod_sandbox_id: pod_sandbox_id.clone(),
                ..Default::default()
            },
        )?;
        self.tell(
            "RemovePodSandbox",
            &cri::RemovePodSandboxRequest { pod_sandbox_id, ..Default::default() },
        )
    }

    /// Creates a container in a pod; returns its id.
    ///
    /// # Errors
    /// As [`Self::run_pod`].
    pub fn create(&self, pod: &str, of: &PodSpec, container: &ContainerSpec) -> Result<String> {
        let request = cri::CreateContainerRequest {
            pod_sandbox_id: pod.into(),
            config: MessageField::some(container.0.clone()),
            sandbox_config: MessageField::some(of.0.clone()),
            ..Default::default()
        };
        let reply: cri::CreateContainerResponse = self.call("CreateContainer", &request)?;
        Ok(reply.container_id)
    }

    /// Starts a created container.
    ///
    /// # Errors
    /// As [`Self::run_pod`].
    pub fn start(&self, container: &str) -> Result<()> {
        let container_id = container.to_owned();
        let request = cri::StartContainerRequest { container_id, ..Default::default() };
        self.tell("StartContainer", &request)
    }

    /// Creates a container and starts it; returns its id.
    ///
    /// # Errors
    /// As [`Self::run_pod`].
    pub fn run(&self, pod: &str, of: &PodSpec, container: &ContainerSpec) -> Result<String> {
        let id = self.create(pod, of, container)?;
        self.start(&id)?;
        Ok(id)
    }

    /// Stops a container, by SIGTERM and after `grace` by SIGKILL.
    ///
    /// # Errors
    /// As [`Self::run_pod`].
    pub fn stop(&self, container: &str, grace: Duration) -> Result<()> {
        let request = cri::StopContainerRequest {
            container_id: container.into(),
            timeout: i64::try_from(grace.as_secs())?,
            ..Default::default()
        };
        self.tell("StopContainer", &request)
    }

    /// Removes a container.
    ///
    /// # Errors
    /// As [`Self::run_pod`].
    pub fn remove(&self, container: &str) -> Result<()> {
        let container_id = container.to_owned();
        let request = cri::RemoveContainerRequest { container_id, ..Default::default() };
        self.tell("RemoveContainer", &request)
    }

    /// How a container is.
    ///
    /// # Errors
    /// As [`Self::run_pod`].
    pub fn status(&self, container: &str) -> Result<ContainerStatus> {
        let container_id = container.to_owned();
        let request = cri::ContainerStatusRequest { container_id, ..Default::default() };
        let reply: cri::ContainerStatusResponse = self.call("ContainerStatus", &request)?;
        reply.status.into_option().context("ContainerStatus: no status")
    }

    /// Waits until a container has exited; returns its exit code.
    ///
    /// # Errors
    /// It has not, in time.
    pub fn wait(&self, container: &str) -> Result<i32> {
        let until = Instant::now() + LIMIT;
        while Instant::now() < until {
            let status = self.status(container)?;
            if status.state == EnumOrUnknown::new(ContainerState::CONTAINER_EXITED) {
                return Ok(status.exit_code);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        bail!("container {container} still runs after {LIMIT:?}")
    }

    /// Runs a shell script in a running container.
    ///
    /// # Errors
    /// As [`Self::run_pod`]; a script that fails is no error.
    pub fn exec(&self, container: &str, script: &str) -> Result<ExecSyncResponse> {
        let request = cri::ExecSyncRequest {
            container_id: container.into(),
            cmd: BUSYBOX_SHELL.map(str::to_owned).into_iter().chain([script.into()]).collect(),
            timeout: 60,
            ..Default::default()
        };
        self.call("ExecSync", &request)
    }

    /// Runs a shell script that must succeed; returns what it printed.
    ///
    /// # Errors
    /// As [`Self::run_pod`], and the script failed.
    pub fn exec_ok(&self, container: &str, script: &str) -> Result<String> {
        let reply = self.exec(container, script)?;
        let (out, err) =
            (String::from_utf8_lossy(&reply.stdout), String::from_utf8_lossy(&reply.stderr));
        if reply.exit_code != 0 {
            bail!("`{script}` ended with {}; it said:\n{out}{err}", reply.exit_code);
        }
        Ok(out.into_owned())
    }

    /// Changes a container's limits.
    ///
    /// # Errors
    /// As [`Self::run_pod`].
    pub fn update(&self, container: &str, resources: LinuxContainerResources) -> Result<()> {
        let request = cri::UpdateContainerResourcesRequest {
            container_id: container.into(),
            linux: MessageField::some(resources),
            ..Default::default()
        };
        self.tell("UpdateContainerResources", &request)
    }

    /// What a container uses.
    ///
    /// # Errors
    /// As [`Self::run_pod`].
    pub fn stats(&self, container: &str) -> Result<ContainerStats> {
        let container_id = container.to_owned();
        let request = cri::ContainerStatsRequest { container_id, ..Default::default() };
        let reply: cri::ContainerStatsResponse = self.call("ContainerStats", &request)?;
        reply.stats.into_option().context("ContainerStats: no statistics")
    }
}
