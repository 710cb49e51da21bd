// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What watches over a running sandbox: for its death, for containers that ran out of memory, and for what the guest says
//! on its console.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ecr_agent_protocol::agent::GetOOMEventRequest;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, watch};
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};

use super::agent::{Agent, call_unbounded};
use super::machine::{Machine, with_last_output};
use super::{Sandbox, SandboxEvent};
use crate::error::{Kind, Result};
use crate::host::virtiofsd::Virtiofsd;

/// How often the agent is asked whether it is well.
const PERIOD: Duration = Duration::from_secs(5);

/// How much later than virtiofsd's the end of a machine may be told that ended first.
const VERDICT: Duration = Duration::from_secs(1);

/// The pause after a failed wait for the next lack of memory.
const RETRY: Duration = Duration::from_secs(1);

/// Wait until the machine or virtiofsd has ended; returns which, and how.
pub async fn end(machine: &Machine, virtiofsd: Option<&Virtiofsd>) -> String {
    let share = async {
        match virtiofsd {
            Some(virtiofsd) => virtiofsd.ended().await,
            None => std::future::pending().await,
        }
    };
    let machine = async { format!("the virtual machine has ended: {}", machine.ended().await) };
    tokio::pin!(machine);
    tokio::select! {
        biased;
        how = &mut machine => how,
        // It also ends with the machine, whose own end is told a moment later and is then the reason.
        how = share => match timeout(VERDICT, machine).await {
            Ok(machine) => machine,
            Err(_) => format!("virtiofsd has ended: {how}"),
        }
    }
}

/// Wait for the sandbox's death; returns why.
async fn death(machine: &Machine, agent: &Agent, virtiofsd: Option<Arc<Virtiofsd>>) -> String {
    let how = tokio::select! {
        how = end(machine, virtiofsd.as_deref()) => how,
        error = illness(agent) => error,
    };
    with_last_output(&how, &machine.last_output().await)
}

/// Ask the agent from time to time until it does not say that it is well.
async fn illness(agent: &Agent) -> String {
    let mut ticks = interval(PERIOD);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        if let Err(error) = agent.check().await {
            return error.to_string();
        }
    }
}

/// When the sandbox dies, say so and give back what it holds.
pub async fn watch(
    machine: Machine,
    agent: Agent,
    virtiofsd: Option<Arc<Virtiofsd>>,
    events: mpsc::UnboundedSender<SandboxEvent>,
    verdict: watch::Sender<Option<String>>,
    sandbox: std::sync::Weak<dyn Sandbox>,
) {
    let why = death(&machine, &agent, virtiofsd).await;
    agent.mark_dead();
    log::error!("the sandbox has died: {why}");
    // Nobody may listen any more.
    let _ = events.send(SandboxEvent::Died(why.clone()));
    verdict.send_replace(Some(why));
    // Not in this task, which ends with the sandbox.
    tokio::spawn(async move {
        if let Some(sandbox) = sandbox.upgrade()
            && let Err(error) = sandbox.stop().await
        {
            log::error!("clean up after the sandbox: {error}");
        }
    });
}

/// Tell of containers whose processes were killed for want of memory, until the agent is gone.
pub async fn watch_memory(agent: Agent, events: mpsc::UnboundedSender<SandboxEvent>) {
    loop {
        match next_lack_of_memory(&agent).await {
            Ok(container) => {
                if events.send(SandboxEvent::OutOfMemory(container)).is_err() {
                    return;
                }
            }
            Err(error) if matches!(error.kind(), Kind::Unavailable | Kind::Unimplemented) => return,
            Err(error) => {
                log::debug!("{error}");
                sleep(RETRY).await;
            }
        }
    }
}

async fn next_lack_of_memory(agent: &Agent) -> Result<String> {
    let request = GetOOMEventRequest::new();
    Ok(call_unbounded!(agent, "GetOOMEvent", get_oom_event, request)?.container_id)
}

/// Put the guest's console, served on `socket`, into the log.
pub async fn log_console(socket: PathBuf) {
    if let Err(error) = follow_console(&socket).await {
        log::warn!("the guest's console {}: {error}", socket.display());
    }
}

async fn follow_console(socket: &Path) -> std::io::Result<()> {
    let mut lines = BufReader::new(UnixStream::connect(socket).await?).split(b'\n');
    while let Some(line) = lines.next_segment().await? {
        log::info!("console: {}", String::from_utf8_lossy(&line).trim_end());
    }
    Ok(())
}
