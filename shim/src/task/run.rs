// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! From Start to the exit: processes are started, followed, and their end is told.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use containerd_shim_protos::events::task::{
    TaskExecStarted, TaskExit, TaskPaused, TaskResumed, TaskStart,
};
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::topics;
use oci_spec::runtime;
use tokio::time::timeout;

use super::container::Container;
use super::io::copy::Drained;
use super::io::{Copying, Stdio, Streams};
use super::pod::Pod;
use super::process::{Exit, Phase, Process, UNKNOWN_STATUS};
use super::timestamp;
use crate::error::{Error, Kind, Result};
use crate::process::id;
use crate::sandbox::Sandbox;

/// A process that could not be started, or half started, is killed within this.
const KILL: Duration = Duration::from_secs(10);

/// SIGKILL.
const SIGKILL: u32 = 9;

/// Register an exec; Start starts it.
pub(super) fn add_exec(
    container: &Container,
    exec: &str,
    stdio: Stdio,
    mut spec: runtime::Process,
) -> Result<()> {
    id::check_exec(exec)?;
    match container.first.phase() {
        Phase::Created | Phase::Starting | Phase::Running => {}
        phase @ (Phase::Paused | Phase::Exited(_)) => {
            return Err(container.first.wrong_phase(phase, &format!("add exec {exec} to")));
        }
    }
    if spec.args().as_ref().is_none_or(Vec::is_empty) {
        return Err(Error::new(
            Kind::InvalidArgument,
            format!("exec {exec} of container {}: there is no command", container.id),
        ));
    }
    spec.set_terminal(Some(stdio.terminal));
    container.add_exec(Process::exec(&container.id, exec, stdio, spec))
}

/// Start a container's first process, or an exec.
pub(super) async fn start(
    pod: &Arc<Pod>,
    container: &Arc<Container>,
    process: &Arc<Process>,
) -> Result<()> {
    if !process.is_first()
        && let phase = container.first.phase()
        && phase != Phase::Running
    {
        return Err(container.first.wrong_phase(phase, &format!("start exec {} in", process.exec)));
    }
    let streams = process.begin_start()?;
    let mut half = Half { pod, process, settled: false };
    let result = half.complete(container, streams).await;
    half.settled = true;
    result.map_err(|error| {
        // There was no start, so there is no exit to tell of; but somebody may wait.
        process.set_exited(Exit { status: UNKNOWN_STATUS, at: SystemTime::now() }, || {});
        pod.explain(error).context(format_args!("start {}", process.name()))
    })
}

/// A process on its way into being. Dropped before that is settled, it is killed.
struct Half<'a> {
    pod: &'a Arc<Pod>,
    process: &'a Arc<Process>,
    settled: bool,
}

impl Half<'_> {
    async fn complete(&self, container: &Arc<Container>, streams: Option<Streams>) -> Result<()> {
        let (pod, process) = (self.pod, self.process);
        let sandbox = pod.sandbox()?;
        let streams = match streams {
            Some(streams) => streams,
            None => Streams::open(&process.stdio, &pod.namespace, &process.container).await?,
        };
        match &process.spec {
            None => sandbox.start_container(&process.container).await?,
            Some(spec) => sandbox.exec(process.id(), spec).await?,
        }
        let copying = streams.start(&sandbox, process.id(), &pod.callers);
        if let Err(error) = process.set_running(copying.clone()) {
            // It was killed meanwhile.
            copying.stop();
            kill_in_background(pod, process);
            return Err(error);
        }
        if let Some((rows, columns)) = process.kept_size()
            && let Err(error) = sandbox.resize_terminal(process.id(), rows, columns).await
        {
            log::warn!("set the terminal size of {}: {error}", process.name());
        }
        publish_start(pod, process);
        let watched = (pod.clone(), container.clone(), process.clone());
        tokio::spawn(follow(watched, sandbox, copying));
        Ok(())
    }
}

impl Drop for Half<'_> {
    fn drop(&mut self) {
        if !self.settled {
            log::warn!("the start of {} was abandoned by its caller", self.process.name());
            self.process.set_exited(Exit { status: UNKNOWN_STATUS, at: SystemTime::now() }, || {});
            kill_in_background(self.pod, self.process);
        }
    }
}

/// Kill what may or may not run.
fn kill_in_background(pod: &Arc<Pod>, process: &Arc<Process>) {
    let Ok(sandbox) = pod.sandbox() else { return };
    // Without a runtime this process is about to end, and the sandbox with it.
    let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
    let process = process.clone();
    runtime.spawn(async move {
        process.close_streams();
        // There may be nothing to kill.
        let _ = timeout(KILL, sandbox.signal(process.id(), SIGKILL, process.is_first())).await;
    });
}

fn publish_start(pod: &Pod, process: &Process) {
    let pid = pod.pid();
    let container_id = process.container.clone();
    if process.is_first() {
        let event = TaskStart { container_id, pid, ..Default::default() };
        pod.publish(topics::TASK_START_EVENT_TOPIC, &event);
    } else {
        let exec_id = process.exec.clone();
        let event = TaskExecStarted { container_id, exec_id, pid, ..Default::default() };
        pod.publish(topics::TASK_EXEC_STARTED_EVENT_TOPIC, &event);
    }
}

/// Follow a process to its end.
async fn follow(
    (pod, container, process): (Arc<Pod>, Arc<Container>, Arc<Process>),
    sandbox: Arc<dyn Sandbox>,
    copying: Copying,
) {
    let waited = tokio::select! {
        biased;
        waited = sandbox.wait(process.id()) => waited,
        reason = pod.died() => Err(Error::new(Kind::Unavailable, &*reason)),
    };
    let status = match waited {
        Ok(status) => status,
        Err(error) => {
            log::warn!("nobody knows how {} ended: {error}", process.name());
            if error.kind() == Kind::Unavailable {
                pod.hear_of_death().await;
            }
            UNKNOWN_STATUS
        }
    };
    let at = SystemTime::now();
    copying.stop_input();
    let drained = copying.drain().await;
    log::info!("{} ended with status {status}, output {drained:?}", process.name());
    // A process of an ended container has nothing to say any more; one of a running container may.
    if drained == Drained::Held && process.is_first() {
        copying.stop();
    }
    end(&pod, &container, &process, Exit { status, at });
}

/// A process has ended: tell whoever wants to know. The sandbox does not outlive the container that it was made for.
pub(super) fn end(pod: &Arc<Pod>, container: &Container, process: &Process, exit: Exit) {
    process.set_exited(exit, || {
        let event = TaskExit {
            container_id: process.container.clone(),
            id: if process.is_first() { &process.container } else { &process.exec }.clone(),
            pid: pod.pid(),
            exit_status: exit.status,
            exited_at: MessageField::some(timestamp(exit.at)),
            ..Default::default()
        };
        pod.publish(topics::TASK_EXIT_EVENT_TOPIC, &event);
    });
    if process.is_first() && container.owns_sandbox() {
        let pod = pod.clone();
        tokio::spawn(async move { pod.stop_sandbox().await });
    }
}

/// Freeze a container, or let it run again.
pub(super) async fn set_paused(pod: &Pod, container: &Container, paused: bool) -> Result<()> {
    let _change = container.change.lock().await;
    let (from, what) = if paused { (Phase::Running, "pause") } else { (Phase::Paused, "resume") };
    let phase = container.first.phase();
    if phase != from {
        return Err(container.first.wrong_phase(phase, what));
    }
    let sandbox = pod.sandbox()?;
    let done = if paused {
        sandbox.pause(&container.id).await
    } else {
        sandbox.resume(&container.id).await
    };
    done.map_err(|error| {
        pod.explain(error).context(format_args!("{what} container {}", container.id))
    })?;
    container.first.set_paused(paused);
    let container_id = container.id.clone();
    if paused {
        let event = TaskPaused { container_id, ..Default::default() };
        pod.publish(topics::TASK_PAUSED_EVENT_TOPIC, &event);
    } else {
        let event = TaskResumed { container_id, ..Default::default() };
        pod.publish(topics::TASK_RESUMED_EVENT_TOPIC, &event);
    }
    Ok(())
}
