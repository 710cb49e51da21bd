// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Kill and Delete.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use containerd_shim_protos::events::task::TaskDelete;
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::topics;
use tokio::time::timeout;

use super::container::Container;
use super::pod::Pod;
use super::process::{Exit, Phase, Process, UNKNOWN_STATUS};
use super::{run, timestamp};
use crate::error::{Error, Kind, Result};

const SIGKILL: u32 = 9;
const SIGTERM: u32 = 15;

/// How long a killed process may take to be gone before it is deleted all the same.
const DEATH: Duration = Duration::from_secs(10);

/// Send a signal to a container or an exec.
pub(super) async fn kill(
    pod: &Arc<Pod>,
    container: &Container,
    process: &Process,
    signal: u32,
    all: bool,
) -> Result<()> {
    match process.phase() {
        Phase::Exited(_) => gone(process, signal),
        Phase::Created | Phase::Starting if !process.is_first() => Err(Error::new(
            Kind::FailedPrecondition,
            format!("The exec process does not exist: {} was not started", process.name()),
        )),
        Phase::Created if is_deadly(signal) => {
            // It has never run, so nobody follows it.
            let exit = Exit { status: 128 + signal, at: SystemTime::now() };
            run::end(pod, container, process, exit);
            Ok(())
        }
        Phase::Created | Phase::Starting | Phase::Running | Phase::Paused => {
            // A sandbox that is stopped, or has died, takes its processes with it.
            let Ok(sandbox) = pod.sandbox() else { return gone(process, signal) };
            match sandbox.signal(process.id(), signal, all).await {
                // It has ended, and its output is still on its way.
                Err(error) if error.kind() == Kind::NotFound => gone(process, signal),
                result => result.map_err(|error| {
                    pod.explain(error)
                        .context(format_args!("send signal {signal} to {}", process.name()))
                }),
            }
        }
    }
}

/// What is gone cannot be signalled; a container that was to end has done so.
fn gone(process: &Process, signal: u32) -> Result<()> {
    if process.is_first() && is_deadly(signal) {
        return Ok(());
    }
    Err(Error::new(Kind::NotFound, "process already finished: not found"))
}

fn is_deadly(signal: u32) -> bool {
    signal == SIGKILL || signal == SIGTERM
}

/// Delete an exec: forget it.
pub(super) async fn delete_exec(
    pod: &Arc<Pod>,
    container: &Container,
    process: &Process,
) -> Result<Exit> {
    let exit = put_down(pod, container, process).await;
    process.close_streams();
    container.remove_exec(&process.exec);
    Ok(exit)
}

/// Delete a container, with all that is left of it.
pub(super) async fn delete(pod: &Arc<Pod>, container: &Container) -> Result<Exit> {
    let _change = container.change.lock().await;
    // Somebody else may have deleted it meanwhile.
    pod.container(&container.id)?;
    let exit = put_down(pod, container, &container.first).await;
    remove(pod, container).await;
    for exec in container.execs() {
        put_down(pod, container, &exec).await;
        exec.close_streams();
    }
    container.first.close_streams();
    pod.remove(&container.id);
    let event = TaskDelete {
        container_id: container.id.clone(),
        pid: pod.pid(),
        exit_status: exit.status,
        exited_at: MessageField::some(timestamp(exit.at)),
        ..Default::default()
    };
    pod.publish(topics::TASK_DELETE_EVENT_TOPIC, &event);
    Ok(exit)
}

/// See a process to its end: kill it if it runs.
async fn put_down(pod: &Arc<Pod>, container: &Container, process: &Process) -> Exit {
    match process.phase() {
        Phase::Exited(exit) => return exit,
        Phase::Created => {}
        Phase::Starting | Phase::Running | Phase::Paused => {
            let killed = async {
                let sandbox = pod.sandbox()?;
                if process.phase() == Phase::Paused {
                    // A frozen process does not even die.
                    sandbox.resume(&container.id).await?;
                }
                sandbox.signal(process.id(), SIGKILL, process.is_first()).await
            };
            match timeout(DEATH, killed).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => log::warn!("kill {}: {error}", process.name()),
                Err(_) => log::warn!("kill {}: not done within {DEATH:?}", process.name()),
            }
            if let Ok(exit) = timeout(DEATH, process.exited()).await {
                return exit;
            }
            log::warn!("{} does not end within {DEATH:?}", process.name());
        }
    }
    let exit = Exit { status: UNKNOWN_STATUS, at: SystemTime::now() };
    run::end(pod, container, process, exit);
    exit
}

/// Take a container out of the sandbox. It is gone for containerd even if that fails: what is left goes with the
/// sandbox.
async fn remove(pod: &Arc<Pod>, container: &Container) {
    match pod.sandbox() {
        Ok(sandbox) if !container.owns_sandbox() => {
            if let Err(error) = sandbox.remove_container(&container.id).await {
                log::warn!("remove container {}: {error}", container.id);
            }
        }
        // The sandbox goes, or is going, with all that was in it.
        Ok(_) | Err(_) => pod.stop_sandbox().await,
    }
}
