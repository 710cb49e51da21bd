// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Create: the first container of a pod, or a container without one, brings the sandbox with it; others join. What a
//! failed or abandoned Create made is undone, and its name is free again only after that.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use containerd_shim_protos::api::CreateTaskRequest;
use containerd_shim_protos::events::task::{TaskCreate, TaskIO};
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::topics;
use oci_spec::runtime::Spec;
use tokio::task::{JoinError, JoinHandle};

use super::container::Container;
use super::io::{Stdio, Streams};
use super::options;
use super::pod::Pod;
use super::process::Process;
use crate::error::{Error, Kind, Result};
use crate::process::group::{Role, read_bounded};
use crate::process::id;
use crate::sandbox::{ContainerRequest, Launched, Mount, Sandbox};

/// CRI-O leaves this annotation on everything it makes.
const CRIO: &str = "io.kubernetes.cri-o.ContainerType";

/// Create a container.
pub(super) async fn create(pod: &Arc<Pod>, call: CreateTaskRequest) -> Result<()> {
    id::check_container(&call.id)?;
    pod.reserve(&call.id)?;
    let mut half = Half { pod: pod.clone(), id: call.id.clone(), made: Some(Made::Nothing) };
    let completed = tokio::select! {
        completed = half.complete(&call) => completed,
        () = pod.terminating() => Err(Error::new(Kind::Unavailable, "the shim is ending")),
    };
    match completed {
        Ok(container) => {
            half.made = None;
            pod.add(container);
            publish(pod, call);
            Ok(())
        }
        Err(error) => {
            let error = pod.explain(error).context(format_args!("create container {}", call.id));
            if let Some(undone) = half.undo() {
                // A task that panicked has said so.
                let _ = undone.await;
            }
            Err(error)
        }
    }
}

/// A container on its way into being.
struct Half {
    pod: Arc<Pod>,
    id: String,
    /// What there is to undo; `None` when that has been seen to.
    made: Option<Made>,
}

enum Made {
    Nothing,
    /// The sandbox is being launched.
    Launch(JoinHandle<Result<Launched>>),
    /// The sandbox that the container brought with it, if it came to be.
    Sandbox,
    /// The container, or a part of it, in a sandbox that others live in.
    Container(Arc<dyn Sandbox>),
}

impl Half {
    async fn complete(&mut self, call: &CreateTaskRequest) -> Result<Container> {
        let request = read(call)?;
        let annotations = request.spec.annotations().clone().unwrap_or_default();
        let role = Role::of(&annotations)?;
        let stdio = Stdio {
            terminal: call.terminal,
            stdin: call.stdin.clone(),
            stdout: call.stdout.clone(),
            stderr: call.stderr.clone(),
        };
        let streams = Streams::open(&stdio, &self.pod.namespace, &call.id).await?;
        let sandbox = match &role {
            Role::Member(sandbox) => self.join(sandbox)?,
            Role::Owner => self.launch(&request).await?,
        };
        sandbox.create_container(&request).await?;
        let first = Process::first(&call.id, stdio, streams);
        let is_crio_s = annotations.contains_key(CRIO);
        Ok(Container::new(call.id.clone(), request.bundle, role, is_crio_s, first))
    }

    /// Use the pod's sandbox.
    fn join(&mut self, sandbox: &str) -> Result<Arc<dyn Sandbox>> {
        if sandbox != self.pod.id {
            return Err(invalid(format!(
                "the container belongs to sandbox {sandbox}, but this is the shim of sandbox {}",
                self.pod.id
            )));
        }
        let sandbox = self.pod.sandbox()?;
        self.made = Some(Made::Container(sandbox.clone()));
        Ok(sandbox)
    }

    /// Start the pod's sandbox.
    async fn launch(&mut self, request: &ContainerRequest) -> Result<Arc<dyn Sandbox>> {
        self.pod.begin_launch()?;
        let (launcher, request) = (self.pod.launcher.clone(), request.clone());
        let launch = tokio::spawn(async move { launcher.launch(&request).await });
        let Made::Launch(launch) = self.made.insert(Made::Launch(launch)) else {
            return Err(Error::new(Kind::Internal, "the launch was lost"));
        };
        let launched = launch.await;
        // Whether it failed or not, there is nothing more to wait for.
        self.made = Some(Made::Sandbox);
        let launched = launched.unwrap_or_else(|error| Err(panicked(&error)));
        Ok(self.pod.launched(launched?))
    }

    /// Undo, in a task of its own.
    fn undo(&mut self) -> Option<JoinHandle<()>> {
        let made = self.made.take()?;
        let (pod, id) = (self.pod.clone(), self.id.clone());
        // Without a runtime the process is about to end, and the sandbox with it.
        let runtime = tokio::runtime::Handle::try_current().ok()?;
        Some(runtime.spawn(async move {
            match made {
                Made::Nothing => {}
                // A launch that was cut off would leave nobody to wait for what it undoes.
                Made::Launch(launch) => {
                    if let Ok(Ok(launched)) = launch.await {
                        pod.launched(launched);
                        pod.stop_sandbox().await;
                    }
                    pod.not_launched();
                }
                Made::Sandbox => {
                    pod.stop_sandbox().await;
                    pod.not_launched();
                }
                Made::Container(sandbox) => {
                    if let Err(error) = sandbox.remove_container(&id).await {
                        log::warn!("undo the creation of container {id}: {error}");
                    }
                }
            }
            pod.remove(&id);
        }))
    }
}

impl Drop for Half {
    fn drop(&mut self) {
        if self.made.is_some() {
            log::warn!("the creation of container {} was abandoned by its caller", self.id);
            self.undo();
        }
    }
}

/// What containerd asks for, checked.
fn read(call: &CreateTaskRequest) -> Result<ContainerRequest> {
    if !call.checkpoint.is_empty() || !call.parent_checkpoint.is_empty() {
        return Err(Error::new(
            Kind::Unimplemented,
            "a container cannot be restored from a checkpoint",
        ));
    }
    let bundle = PathBuf::from(&call.bundle);
    if !bundle.is_absolute() {
        return Err(invalid(format!("bundle {:?} is not an absolute path", call.bundle)));
    }
    let spec = read_spec(&bundle.join("config.json"))?;
    let rootfs = call.rootfs.iter().map(|mount| Mount {
        kind: mount.type_.clone(),
        source: mount.source.clone(),
        options: mount.options.clone(),
    });
    Ok(ContainerRequest {
        id: call.id.clone(),
        rootfs: rootfs.collect(),
        spec,
        config_path: options::config_path(call.options.as_ref())?,
        bundle,
    })
}

fn read_spec(path: &Path) -> Result<Spec> {
    serde_json::from_slice(&read_bounded(path)?)
        .map_err(|error| invalid(format!("read {}: {error}", path.display())))
}

fn publish(pod: &Pod, call: CreateTaskRequest) {
    let io = TaskIO {
        stdin: call.stdin,
        stdout: call.stdout,
        stderr: call.stderr,
        terminal: call.terminal,
        ..Default::default()
    };
    let event = TaskCreate {
        container_id: call.id,
        bundle: call.bundle,
        rootfs: call.rootfs,
        io: MessageField::some(io),
        pid: pod.pid(),
        ..Default::default()
    };
    pod.publish(topics::TASK_CREATE_EVENT_TOPIC, &event);
}

fn panicked(error: &JoinError) -> Error {
    Error::new(Kind::Internal, format!("start the sandbox: {error}"))
}

fn invalid(text: String) -> Error {
    Error::new(Kind::InvalidArgument, text)
}
