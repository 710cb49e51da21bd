// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The calls for containers: lifecycle, processes, stdio. The work is done in [`crate::container`].

use std::sync::Arc;

use ecr_agent_protocol::agent as msg;
use protobuf::well_known_types::empty::Empty;
use ttrpc::Result;

use super::unimplemented;
use crate::sandbox::Sandbox;

pub async fn create_container(_: &Arc<Sandbox>, _: msg::CreateContainerRequest) -> Result<Empty> {
    unimplemented("CreateContainer")
}

pub async fn start_container(_: &Arc<Sandbox>, _: msg::StartContainerRequest) -> Result<Empty> {
    unimplemented("StartContainer")
}

pub async fn remove_container(_: &Arc<Sandbox>, _: msg::RemoveContainerRequest) -> Result<Empty> {
    unimplemented("RemoveContainer")
}

pub async fn exec_process(_: &Arc<Sandbox>, _: msg::ExecProcessRequest) -> Result<Empty> {
    unimplemented("ExecProcess")
}

pub async fn signal_process(_: &Arc<Sandbox>, _: msg::SignalProcessRequest) -> Result<Empty> {
    unimplemented("SignalProcess")
}

pub async fn wait_process(
    _: &Arc<Sandbox>,
    _: msg::WaitProcessRequest,
) -> Result<msg::WaitProcessResponse> {
    unimplemented("WaitProcess")
}

pub async fn update_container(_: &Arc<Sandbox>, _: msg::UpdateContainerRequest) -> Result<Empty> {
    unimplemented("UpdateContainer")
}

pub async fn stats_container(
    _: &Arc<Sandbox>,
    _: msg::StatsContainerRequest,
) -> Result<msg::StatsContainerResponse> {
    unimplemented("StatsContainer")
}

pub async fn pause_container(_: &Arc<Sandbox>, _: msg::PauseContainerRequest) -> Result<Empty> {
    unimplemented("PauseContainer")
}

pub async fn resume_container(_: &Arc<Sandbox>, _: msg::ResumeContainerRequest) -> Result<Empty> {
    unimplemented("ResumeContainer")
}

pub async fn write_stdin(
    _: &Arc<Sandbox>,
    _: msg::WriteStreamRequest,
) -> Result<msg::WriteStreamResponse> {
    unimplemented("WriteStdin")
}

pub async fn read_stdout(
    _: &Arc<Sandbox>,
    _: msg::ReadStreamRequest,
) -> Result<msg::ReadStreamResponse> {
    unimplemented("ReadStdout")
}

pub async fn read_stderr(
    _: &Arc<Sandbox>,
    _: msg::ReadStreamRequest,
) -> Result<msg::ReadStreamResponse> {
    unimplemented("ReadStderr")
}

pub async fn close_stdin(_: &Arc<Sandbox>, _: msg::CloseStdinRequest) -> Result<Empty> {
    unimplemented("CloseStdin")
}

pub async fn tty_win_resize(_: &Arc<Sandbox>, _: msg::TtyWinResizeRequest) -> Result<Empty> {
    unimplemented("TtyWinResize")
}

pub async fn get_oom_event(_: &Arc<Sandbox>, _: msg::GetOOMEventRequest) -> Result<msg::OOMEvent> {
    unimplemented("GetOOMEvent")
}
