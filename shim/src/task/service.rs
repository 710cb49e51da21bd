// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The calls as they come from the wire. A call that the caller gave a time limit ends with it, and one whose caller is
//! gone ends at once; whatever they say, none takes longer than its limit here, except those that wait for a process.

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use containerd_shim_protos::api;
use containerd_shim_protos::events::task::TaskExecAdded;
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::shim_async::Task;
use containerd_shim_protos::topics;
use oci_spec::runtime::{LinuxResources, Process as ProcessSpec};
use protobuf::well_known_types::any::Any;
use serde::de::DeserializeOwned;
use tokio::time::timeout;
use ttrpc::r#async::TtrpcContext;
use ttrpc::{Code, get_status};

use super::container::Container;
use super::io::Stdio;
use super::pod::Pod;
use super::process::{Phase, Process};
use super::{create, end, run, stats, timestamp};
use crate::error::{Error, Kind, Result};
use crate::host::metrics;

/// Most calls ask the guest one thing.
const CALL: Duration = Duration::from_secs(60);

/// Create may start a virtual machine, on a host that has more to do.
const CREATE: Duration = Duration::from_secs(600);

/// The longest error text that is sent. It may carry a guest's last words.
const MAX_TEXT: usize = 16 << 10;

/// `containerd.task.v2.Task` and `containerd.task.v3.Task`.
#[derive(Debug)]
pub struct TaskService {
    pod: Arc<Pod>,
}

impl TaskService {
    /// Serve a pod.
    pub fn new(pod: Arc<Pod>) -> Self {
        Self { pod }
    }

    fn find(&self, id: &str, exec: &str) -> Result<(Arc<Container>, Arc<Process>)> {
        let container = self.pod.container(id)?;
        let process = container.process(exec)?;
        Ok((container, process))
    }

    async fn do_create(&self, call: api::CreateTaskRequest) -> Result<api::CreateTaskResponse> {
        create::create(&self.pod, call).await?;
        Ok(api::CreateTaskResponse { pid: self.pod.pid(), ..Default::default() })
    }

    async fn do_start(&self, call: &api::StartRequest) -> Result<api::StartResponse> {
        let (container, process) = self.find(&call.id, &call.exec_id)?;
        let _change = if process.is_first() { Some(container.change.lock().await) } else { None };
        run::start(&self.pod, &container, &process).await?;
        Ok(api::StartResponse { pid: self.pod.pid(), ..Default::default() })
    }

    async fn do_delete(&self, call: &api::DeleteRequest) -> Result<api::DeleteResponse> {
        let (container, process) = self.find(&call.id, &call.exec_id)?;
        let pod = self.pod.clone();
        let exit = finish(async move {
            if process.is_first() {
                end::delete(&pod, &container).await
            } else {
                end::delete_exec(&pod, &container, &process).await
            }
        })
        .await?;
        Ok(api::DeleteResponse {
            pid: self.pod.pid(),
            exit_status: exit.status,
            exited_at: MessageField::some(timestamp(exit.at)),
            ..Default::default()
        })
    }

    fn do_exec(&self, call: api::ExecProcessRequest) -> Result<api::Empty> {
        let container = self.pod.container(&call.id)?;
        let spec: ProcessSpec = json("exec specification", call.spec.as_ref())?;
        let stdio = Stdio {
            terminal: call.terminal,
            stdin: call.stdin,
            stdout: call.stdout,
            stderr: call.stderr,
        };
        run::add_exec(&container, &call.exec_id, stdio, spec)?;
        let event =
            TaskExecAdded { container_id: call.id, exec_id: call.exec_id, ..Default::default() };
        self.pod.publish(topics::TASK_EXEC_ADDED_EVENT_TOPIC, &event);
        Ok(api::Empty::new())
    }

    fn do_state(&self, call: &api::StateRequest) -> Result<api::StateResponse> {
        let (container, process) = self.find(&call.id, &call.exec_id)?;
        let phase = process.phase();
        let mut state = api::StateResponse {
            id: if process.is_first() { call.id.clone() } else { call.exec_id.clone() },
            bundle: container.bundle.to_string_lossy().into_owned(),
            status: status(phase).into(),
            stdin: process.stdio.stdin.clone(),
            stdout: process.stdio.stdout.clone(),
            stderr: process.stdio.stderr.clone(),
            terminal: process.stdio.terminal,
            ..Default::default()
        };
        // An exec that was not started has no pid.
        if process.is_first() || phase != Phase::Created {
            state.pid = self.pod.pid();
        }
        if let Phase::Exited(exit) = phase {
            state.exit_status = exit.status;
            state.exited_at = MessageField::some(timestamp(exit.at));
        }
        Ok(state)
    }

    async fn do_kill(&self, call: &api::KillRequest) -> Result<api::Empty> {
        let (container, process) = self.find(&call.id, &call.exec_id)?;
        end::kill(&self.pod, &container, &process, call.signal, call.all).await?;
        Ok(api::Empty::new())
    }

    async fn do_set_paused(&self, id: &str, paused: bool) -> Result<api::Empty> {
        let container = self.pod.container(id)?;
        let pod = self.pod.clone();
        finish(async move { run::set_paused(&pod, &container, paused).await }).await?;
        Ok(api::Empty::new())
    }

    async fn do_resize(&self, call: &api::ResizePtyRequest) -> Result<api::Empty> {
        let (_, process) = self.find(&call.id, &call.exec_id)?;
        if !process.stdio.terminal {
            let text = format!("{} has no terminal", process.name());
            return Err(Error::new(Kind::InvalidArgument, text));
        }
        if !process.keep_size(call.height, call.width)? {
            let sandbox = self.pod.sandbox()?;
            let resized = sandbox.resize_terminal(process.id(), call.height, call.width).await;
            resized.map_err(|error| self.pod.explain(error))?;
        }
        Ok(api::Empty::new())
    }

    async fn do_close_io(&self, call: &api::CloseIORequest) -> Result<api::Empty> {
        let (_, process) = self.find(&call.id, &call.exec_id)?;
        if call.stdin
            && let Some(copying) = process.close_input()
        {
            copying.input_closed().await;
        }
        Ok(api::Empty::new())
    }

    async fn do_update(&self, call: &api::UpdateTaskRequest) -> Result<api::Empty> {
        let container = self.pod.container(&call.id)?;
        let resources: LinuxResources = json("resources", call.resources.as_ref())?;
        let _change = container.change.lock().await;
        if let phase @ Phase::Exited(_) = container.first.phase() {
            return Err(container.first.wrong_phase(phase, "update"));
        }
        let updated = self.pod.sandbox()?.update(&call.id, &resources).await;
        updated.map_err(|error| {
            self.pod.explain(error).context(format_args!("update container {}", call.id))
        })?;
        Ok(api::Empty::new())
    }

    async fn do_stats(&self, call: &api::StatsRequest) -> Result<api::StatsResponse> {
        let container = self.pod.container(&call.id)?;
        let stats = self.pod.sandbox()?.stats(&container.id).await;
        let stats = stats.map_err(|error| {
            self.pod.explain(error).context(format_args!("statistics of container {}", call.id))
        })?;
        Ok(api::StatsResponse {
            stats: MessageField::some(stats::for_host(&stats)?),
            ..Default::default()
        })
    }

    async fn do_wait(&self, call: &api::WaitRequest) -> Result<api::WaitResponse> {
        let (_, process) = self.find(&call.id, &call.exec_id)?;
        let exit = process.exited().await;
        Ok(api::WaitResponse {
            exit_status: exit.status,
            exited_at: MessageField::some(timestamp(exit.at)),
            ..Default::default()
        })
    }

    fn do_pids(&self, call: &api::PidsRequest) -> Result<api::PidsResponse> {
        self.pod.container(&call.id)?;
        let process = api::ProcessInfo { pid: self.pod.pid(), ..Default::default() };
        Ok(api::PidsResponse { processes: vec![process], ..Default::default() })
    }

    /// containerd asks this to find out who is there, even before it knows of containers.
    fn do_connect(&self, call: &api::ConnectRequest) -> api::ConnectResponse {
        let pid = self.pod.pid();
        api::ConnectResponse {
            shim_pid: pid,
            task_pid: if self.pod.container(&call.id).is_ok() { pid } else { 0 },
            ..Default::default()
        }
    }
}

#[async_trait]
impl Task for TaskService {
    async fn create(
        &self,
        _: &TtrpcContext,
        call: api::CreateTaskRequest,
    ) -> ttrpc::Result<api::CreateTaskResponse> {
        bounded("Create", CREATE, self.do_create(call)).await
    }

    async fn start(
        &self,
        _: &TtrpcContext,
        call: api::StartRequest,
    ) -> ttrpc::Result<api::StartResponse> {
        bounded("Start", CALL, self.do_start(&call)).await
    }

    async fn delete(
        &self,
        _: &TtrpcContext,
        call: api::DeleteRequest,
    ) -> ttrpc::Result<api::DeleteResponse> {
        bounded("Delete", 2 * CALL, self.do_delete(&call)).await
    }

    async fn exec(
        &self,
        _: &TtrpcContext,
        call: api::ExecProcessRequest,
    ) -> ttrpc::Result<api::Empty> {
        answer("Exec", self.do_exec(call))
    }

    async fn state(
        &self,
        _: &TtrpcContext,
        call: api::StateRequest,
    ) -> ttrpc::Result<api::StateResponse> {
        answer("State", self.do_state(&call))
    }

    async fn kill(&self, _: &TtrpcContext, call: api::KillRequest) -> ttrpc::Result<api::Empty> {
        bounded("Kill", CALL, self.do_kill(&call)).await
    }

    async fn pause(&self, _: &TtrpcContext, call: api::PauseRequest) -> ttrpc::Result<api::Empty> {
        bounded("Pause", CALL, self.do_set_paused(&call.id, true)).await
    }

    async fn resume(
        &self,
        _: &TtrpcContext,
        call: api::ResumeRequest,
    ) -> ttrpc::Result<api::Empty> {
        bounded("Resume", CALL, self.do_set_paused(&call.id, false)).await
    }

    async fn resize_pty(
        &self,
        _: &TtrpcContext,
        call: api::ResizePtyRequest,
    ) -> ttrpc::Result<api::Empty> {
        bounded("ResizePty", CALL, self.do_resize(&call)).await
    }

    async fn close_io(
        &self,
        _: &TtrpcContext,
        call: api::CloseIORequest,
    ) -> ttrpc::Result<api::Empty> {
        bounded("CloseIO", CALL, self.do_close_io(&call)).await
    }

    async fn update(
        &self,
        _: &TtrpcContext,
        call: api::UpdateTaskRequest,
    ) -> ttrpc::Result<api::Empty> {
        bounded("Update", CALL, self.do_update(&call)).await
    }

    async fn stats(
        &self,
        _: &TtrpcContext,
        call: api::StatsRequest,
    ) -> ttrpc::Result<api::StatsResponse> {
        bounded("Stats", CALL, self.do_stats(&call)).await
    }

    async fn wait(
        &self,
        _: &TtrpcContext,
        call: api::WaitRequest,
    ) -> ttrpc::Result<api::WaitResponse> {
        answer("Wait", self.do_wait(&call).await)
    }

    async fn pids(
        &self,
        _: &TtrpcContext,
        call: api::PidsRequest,
    ) -> ttrpc::Result<api::PidsResponse> {
        answer("Pids", self.do_pids(&call))
    }

    async fn connect(
        &self,
        _: &TtrpcContext,
        call: api::ConnectRequest,
    ) -> ttrpc::Result<api::ConnectResponse> {
        Ok(self.do_connect(&call))
    }

    async fn shutdown(
        &self,
        _: &TtrpcContext,
        _: api::ShutdownRequest,
    ) -> ttrpc::Result<api::Empty> {
        self.pod.shutdown().await;
        Ok(api::Empty::new())
    }

    async fn checkpoint(
        &self,
        _: &TtrpcContext,
        call: api::CheckpointTaskRequest,
    ) -> ttrpc::Result<api::Empty> {
        let text =
            format!("container {} cannot be checkpointed: it lives in a virtual machine", call.id);
        answer("Checkpoint", Err(Error::new(Kind::Unimplemented, text)))
    }
}

/// Do something to its end, even if the caller does not wait.
async fn finish<T: Send + 'static>(
    work: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    tokio::spawn(work).await.unwrap_or_else(|error| {
        Err(Error::new(Kind::Internal, format!("the call did not finish: {error}")))
    })
}

/// Answer a call within a limit. What it takes longer for is dropped, and undoes itself.
async fn bounded<T>(
    name: &'static str,
    limit: Duration,
    call: impl Future<Output = Result<T>>,
) -> ttrpc::Result<T> {
    let started = Instant::now();
    let result = timeout(limit, call).await.unwrap_or_else(|_| {
        Err(Error::new(Kind::DeadlineExceeded, format!("{name} was not done within {limit:?}")))
    });
    metrics::SHIM_CALLS.observe(name, started.elapsed());
    answer(name, result)
}

fn answer<T>(name: &str, result: Result<T>) -> ttrpc::Result<T> {
    result.map_err(|error| {
        log::info!("{name}: {error}");
        let code = match error.kind() {
            Kind::InvalidArgument => Code::INVALID_ARGUMENT,
            Kind::NotFound => Code::NOT_FOUND,
            Kind::AlreadyExists => Code::ALREADY_EXISTS,
            Kind::FailedPrecondition => Code::FAILED_PRECONDITION,
            Kind::Unimplemented => Code::UNIMPLEMENTED,
            Kind::DeadlineExceeded => Code::DEADLINE_EXCEEDED,
            Kind::Unavailable => Code::UNAVAILABLE,
            Kind::Internal => Code::UNKNOWN,
        };
        let mut text = error.to_string();
        text.truncate(text.floor_char_boundary(MAX_TEXT));
        ttrpc::Error::RpcStatus(get_status(code, text))
    })
}

/// What containerd wraps in an `Any` as JSON.
fn json<T: DeserializeOwned>(what: &str, any: Option<&Any>) -> Result<T> {
    let invalid = |why: &dyn std::fmt::Display| {
        Error::new(Kind::InvalidArgument, format!("read {what}: {why}"))
    };
    let any = any.ok_or_else(|| invalid(&"there is none"))?;
    serde_json::from_slice(&any.value)
        .map_err(|error| invalid(&format_args!("{} ({error})", any.type_url)))
}

fn status(phase: Phase) -> api::Status {
    match phase {
        Phase::Created | Phase::Starting => api::Status::CREATED,
        Phase::Running => api::Status::RUNNING,
        Phase::Paused => api::Status::PAUSED,
        Phase::Exited(_) => api::Status::STOPPED,
    }
}
