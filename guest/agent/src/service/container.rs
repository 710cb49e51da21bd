// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The calls for containers: lifecycle, processes, stdio. The work is done in [`crate::container`].

use std::io;
use std::sync::Arc;
use std::time::Duration;

use ecr_agent_protocol::agent as msg;
use protobuf::well_known_types::empty::Empty;
use ttrpc::{Code, Result};

use super::status;
use crate::container::{Error, Process, Source, lifecycle};
use crate::sandbox::Sandbox;

impl From<Error> for ttrpc::Error {
    /// What went wrong in the protocol's terms.
    fn from(error: Error) -> Self {
        let code = match &error {
            Error::UnknownContainer(_) | Error::Invalid(_) => Code::INVALID_ARGUMENT,
            Error::UnknownProcess(..) => Code::NOT_FOUND,
            Error::Exists(_) => Code::ALREADY_EXISTS,
            Error::State(_) => Code::FAILED_PRECONDITION,
            Error::Timeout(_) => Code::DEADLINE_EXCEEDED,
            Error::NoTerminal(_) => Code::UNAVAILABLE,
            Error::Other(_) => Code::INTERNAL,
        };
        status(code, error.to_string())
    }
}

/// Do it to the end, even if the client's deadline passes on the way.
async fn whole<T: Send + 'static>(
    work: impl Future<Output = std::result::Result<T, Error>> + Send + 'static,
) -> Result<T> {
    match tokio::spawn(work).await {
        Ok(outcome) => Ok(outcome?),
        Err(error) => Err(status(Code::INTERNAL, format!("the agent failed: {error}"))),
    }
}

pub async fn create_container(
    sandbox: &Arc<Sandbox>,
    request: msg::CreateContainerRequest,
) -> Result<Empty> {
    let sandbox = Arc::clone(sandbox);
    whole(async move { lifecycle::create(&sandbox, request).await }).await?;
    Ok(Empty::new())
}

pub async fn start_container(
    sandbox: &Arc<Sandbox>,
    request: msg::StartContainerRequest,
) -> Result<Empty> {
    let sandbox = Arc::clone(sandbox);
    whole(async move { lifecycle::start(&sandbox, &request.container_id).await }).await?;
    Ok(Empty::new())
}

pub async fn remove_container(
    sandbox: &Arc<Sandbox>,
    request: msg::RemoveContainerRequest,
) -> Result<Empty> {
    let sandbox = Arc::clone(sandbox);
    let patience = match request.timeout {
        0 => None,
        seconds => Some(Duration::from_secs(seconds.into())),
    };
    whole(async move { lifecycle::remove(&sandbox, &request.container_id, patience).await })
        .await?;
    Ok(Empty::new())
}

pub async fn exec_process(
    sandbox: &Arc<Sandbox>,
    request: msg::ExecProcessRequest,
) -> Result<Empty> {
    let sandbox = Arc::clone(sandbox);
    let msg::ExecProcessRequest { container_id, exec_id, process, .. } = request;
    let Some(process) = process.into_option() else {
        return Err(status(Code::INVALID_ARGUMENT, "the process to execute is missing"));
    };
    whole(async move {
        sandbox.containers.exec(&sandbox.reaper, &container_id, &exec_id, process).await
    })
    .await?;
    Ok(Empty::new())
}

pub async fn signal_process(
    sandbox: &Arc<Sandbox>,
    request: msg::SignalProcessRequest,
) -> Result<Empty> {
    let msg::SignalProcessRequest { container_id, exec_id, signal, .. } = request;
    sandbox.containers.signal(&container_id, &exec_id, signal)?;
    Ok(Empty::new())
}

pub async fn wait_process(
    sandbox: &Arc<Sandbox>,
    request: msg::WaitProcessRequest,
) -> Result<msg::WaitProcessResponse> {
    let process = process(sandbox, &request.container_id, &request.exec_id)?;
    let status = process.wait().await?;
    Ok(msg::WaitProcessResponse { status, ..Default::default() })
}

pub async fn update_container(
    sandbox: &Arc<Sandbox>,
    request: msg::UpdateContainerRequest,
) -> Result<Empty> {
    let resources = request.resources.get_or_default();
    sandbox.containers.update(&request.container_id, resources).await?;
    Ok(Empty::new())
}

pub async fn stats_container(
    sandbox: &Arc<Sandbox>,
    request: msg::StatsContainerRequest,
) -> Result<msg::StatsContainerResponse> {
    Ok(sandbox.containers.stats(&request.container_id)?)
}

pub async fn pause_container(
    sandbox: &Arc<Sandbox>,
    request: msg::PauseContainerRequest,
) -> Result<Empty> {
    let sandbox = Arc::clone(sandbox);
    whole(async move { sandbox.containers.pause(&request.container_id).await }).await?;
    Ok(Empty::new())
}

pub async fn resume_container(
    sandbox: &Arc<Sandbox>,
    request: msg::ResumeContainerRequest,
) -> Result<Empty> {
    let sandbox = Arc::clone(sandbox);
    whole(async move { sandbox.containers.resume(&request.container_id).await }).await?;
    Ok(Empty::new())
}

pub async fn write_stdin(
    sandbox: &Arc<Sandbox>,
    request: msg::WriteStreamRequest,
) -> Result<msg::WriteStreamResponse> {
    let process = process(sandbox, &request.container_id, &request.exec_id)?;
    let written = process.streams().write(&request.data).await;
    written.map_err(|error| {
        stream_failure("write to standard input", &request.container_id, &error)
    })?;
    // A message is far shorter than that.
    let len = u32::try_from(request.data.len()).unwrap_or(u32::MAX);
    Ok(msg::WriteStreamResponse { len, ..Default::default() })
}

pub async fn read_stdout(
    sandbox: &Arc<Sandbox>,
    request: msg::ReadStreamRequest,
) -> Result<msg::ReadStreamResponse> {
    read(sandbox, &request, Source::Stdout).await
}

pub async fn read_stderr(
    sandbox: &Arc<Sandbox>,
    request: msg::ReadStreamRequest,
) -> Result<msg::ReadStreamResponse> {
    read(sandbox, &request, Source::Stderr).await
}

async fn read(
    sandbox: &Arc<Sandbox>,
    request: &msg::ReadStreamRequest,
    source: Source,
) -> Result<msg::ReadStreamResponse> {
    let process = process(sandbox, &request.container_id, &request.exec_id)?;
    let data = process.streams().read(source, request.len as usize).await;
    let data =
        data.map_err(|error| stream_failure("read the output", &request.container_id, &error))?;
    Ok(msg::ReadStreamResponse { data, ..Default::default() })
}

pub async fn close_stdin(sandbox: &Arc<Sandbox>, request: msg::CloseStdinRequest) -> Result<Empty> {
    process(sandbox, &request.container_id, &request.exec_id)?.streams().close_stdin();
    Ok(Empty::new())
}

pub async fn tty_win_resize(
    sandbox: &Arc<Sandbox>,
    request: msg::TtyWinResizeRequest,
) -> Result<Empty> {
    let process = process(sandbox, &request.container_id, &request.exec_id)?;
    process.resize(request.row, request.column)?;
    Ok(Empty::new())
}

/// At the end of the sandbox: INTERNAL without a word, which the runtime takes as that.
pub async fn get_oom_event(
    sandbox: &Arc<Sandbox>,
    _: msg::GetOOMEventRequest,
) -> Result<msg::OOMEvent> {
    match sandbox.containers.next_oom().await {
        Some(container_id) => Ok(msg::OOMEvent { container_id, ..Default::default() }),
        None => Err(status(Code::INTERNAL, "")),
    }
}

fn process(sandbox: &Arc<Sandbox>, container: &str, exec: &str) -> Result<Arc<Process>> {
    let (_, process) = sandbox.containers.process(container, exec)?;
    Ok(process)
}

fn stream_failure(what: &str, container: &str, error: &io::Error) -> ttrpc::Error {
    status(Code::INTERNAL, format!("{what} of container {container}: {error}"))
}
