// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The agent protocol's services.
//!
//! `grpc.AgentService` is one table below: which function answers which call. The functions stand in [`container`]
//! (lifecycle and stdio of containers) and [`guest`] (everything else); each gets the one [`Sandbox`] and the request.
//! A call without a function yet answers UNIMPLEMENTED, which clients take as "an older agent".
//!
//! A client's deadline drops the function's future, so whatever must not stop half way runs in a task of its own.

mod container;
mod guest;
mod health;

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use ecr_agent_protocol::agent as msg;
use ecr_agent_protocol::agent_ttrpc::{AgentService, create_agent_service};
use ecr_agent_protocol::csi::VolumeStatsResponse;
use ecr_agent_protocol::health_ttrpc::create_health;
use ecr_agent_protocol::types::Interface;
use protobuf::well_known_types::empty::Empty;
use ttrpc::r#async::{Service, TtrpcContext};
use ttrpc::{Code, Result, get_status};

use crate::sandbox::Sandbox;

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// `grpc.Health`.
pub fn health() -> HashMap<String, Service> {
    create_health(Arc::new(health::Health))
}

/// `grpc.AgentService`.
pub fn agent(sandbox: Arc<Sandbox>) -> HashMap<String, Service> {
    create_agent_service(Arc::new(Agent { sandbox }))
}

struct Agent {
    sandbox: Arc<Sandbox>,
}

macro_rules! agent_service {
    ($($module:ident::$call:ident($request:ty) -> $response:ty;)*) => {
        #[async_trait]
        impl AgentService for Agent {
            $(
                async fn $call(&self, _: &TtrpcContext, request: $request) -> Result<$response> {
                    $module::$call(&self.sandbox, request).await
                }
            )*
        }
    };
}

agent_service! {
    container::create_container(msg::CreateContainerRequest) -> Empty;
    container::start_container(msg::StartContainerRequest) -> Empty;
    container::remove_container(msg::RemoveContainerRequest) -> Empty;
    container::exec_process(msg::ExecProcessRequest) -> Empty;
    container::signal_process(msg::SignalProcessRequest) -> Empty;
    container::wait_process(msg::WaitProcessRequest) -> msg::WaitProcessResponse;
    container::update_container(msg::UpdateContainerRequest) -> Empty;
    container::stats_container(msg::StatsContainerRequest) -> msg::StatsContainerResponse;
    container::pause_container(msg::PauseContainerRequest) -> Empty;
    container::resume_container(msg::ResumeContainerRequest) -> Empty;
    container::write_stdin(msg::WriteStreamRequest) -> msg::WriteStreamResponse;
    container::read_stdout(msg::ReadStreamRequest) -> msg::ReadStreamResponse;
    container::read_stderr(msg::ReadStreamRequest) -> msg::ReadStreamResponse;
    container::close_stdin(msg::CloseStdinRequest) -> Empty;
    container::tty_win_resize(msg::TtyWinResizeRequest) -> Empty;
    container::get_oom_event(msg::GetOOMEventRequest) -> msg::OOMEvent;

    guest::create_sandbox(msg::CreateSandboxRequest) -> Empty;
    guest::destroy_sandbox(msg::DestroySandboxRequest) -> Empty;
    guest::update_ephemeral_mounts(msg::UpdateEphemeralMountsRequest) -> Empty;
    guest::remove_stale_virtiofs_share_mounts(msg::RemoveStaleVirtiofsShareMountsRequest) -> Empty;
    guest::get_diagnostic_data(msg::GetDiagnosticDataRequest) -> msg::GetDiagnosticDataResponse;
    guest::update_interface(msg::UpdateInterfaceRequest) -> Interface;
    guest::update_routes(msg::UpdateRoutesRequest) -> msg::Routes;
    guest::list_interfaces(msg::ListInterfacesRequest) -> msg::Interfaces;
    guest::list_routes(msg::ListRoutesRequest) -> msg::Routes;
    guest::add_arp_neighbors(msg::AddARPNeighborsRequest) -> Empty;
    guest::get_ip_tables(msg::GetIPTablesRequest) -> msg::GetIPTablesResponse;
    guest::set_ip_tables(msg::SetIPTablesRequest) -> msg::SetIPTablesResponse;
    guest::get_metrics(msg::GetMetricsRequest) -> msg::Metrics;
    guest::mem_agent_memcg_set(msg::MemAgentMemcgConfig) -> Empty;
    guest::mem_agent_compact_set(msg::MemAgentCompactConfig) -> Empty;
    guest::online_cpu_mem(msg::OnlineCPUMemRequest) -> Empty;
    guest::reseed_random_dev(msg::ReseedRandomDevRequest) -> Empty;
    guest::get_guest_details(msg::GuestDetailsRequest) -> msg::GuestDetailsResponse;
    guest::mem_hotplug_by_probe(msg::MemHotplugByProbeRequest) -> Empty;
    guest::set_guest_date_time(msg::SetGuestDateTimeRequest) -> Empty;
    guest::copy_file(msg::CopyFileRequest) -> Empty;
    guest::add_swap(msg::AddSwapRequest) -> Empty;
    guest::add_swap_path(msg::AddSwapPathRequest) -> Empty;
    guest::get_volume_stats(msg::VolumeStatsRequest) -> VolumeStatsResponse;
    guest::resize_volume(msg::ResizeVolumeRequest) -> Empty;
    guest::set_policy(msg::SetPolicyRequest) -> Empty;
}

/// An error of the protocol.
fn status(code: Code, message: impl Into<String>) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(get_status(code, message.into()))
}

/// INTERNAL, as the protocol answers when nothing more exact is agreed. All causes are in the message.
fn internal(error: impl Into<anyhow::Error>) -> ttrpc::Error {
    status(Code::INTERNAL, format!("{:#}", error.into()))
}

/// What a call answers that this agent does not have.
fn unimplemented<T>(call: &str) -> Result<T> {
    Err(status(Code::UNIMPLEMENTED, format!("{call} is not implemented by this agent")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    use ecr_agent_protocol::API_VERSION;
    use ecr_agent_protocol::client::AgentClient;
    use ecr_agent_protocol::health::CheckRequest;
    use ecr_agent_protocol::health::health_check_response::ServingStatus;
    use tokio::net::UnixStream;
    use ttrpc::r#async::Server;
    use ttrpc::r#async::transport::Listener;
    use ttrpc::context::{Context, with_duration};

    /// The services as [`health`] and [`agent`] make them, at the other end of a socket pair.
    async fn client() -> (AgentClient, Server) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut theirs = Some(Ok(theirs));
        // One connection, and then none for ever.
        let listener = Listener::new(futures_util::stream::poll_fn(move |_| {
            theirs.take().map_or(std::task::Poll::Pending, |one| std::task::Poll::Ready(Some(one)))
        }));
        let sandbox = Sandbox::new(crate::reaper::Reaper::that_never_collects());
        let mut server = Server::new()
            .add_listener(listener)
            .register_service(health())
            .register_service(agent(sandbox));
        server.start().await.unwrap();
        (AgentClient::over(ours), server)
    }

    fn soon() -> Context {
        with_duration(Duration::from_secs(10))
    }

    #[tokio::test(flavor = "current_thread")]
    async fn health_over_a_socket() {
        let (client, _server) = client().await;
        let health = client.health.check(soon(), &CheckRequest::new()).await.unwrap();
        assert_eq!(health.status.enum_value(), Ok(ServingStatus::SERVING));
        let version = client.health.version(soon(), &CheckRequest::new()).await.unwrap();
        assert_eq!(
            (version.grpc_version.as_str(), version.agent_version.as_str()),
            (API_VERSION, VERSION)
        );
    }

    #[tokio::test(flavor = "current_thread")]
    async fn guest_details_over_a_socket() {
        let (client, _server) = client().await;
        let request = msg::GuestDetailsRequest::new();
        let details = client.agent.get_guest_details(soon(), &request).await.unwrap();
        assert_eq!(details.agent_details.version, VERSION);
        assert!(!details.agent_details.init_daemon);
        assert_eq!(details.mem_block_size_bytes, 0, "not asked for");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn calls_that_nobody_has_are_unimplemented() {
        let (client, _server) = client().await;
        let request = msg::ResizeVolumeRequest::new();
        let error = client.agent.resize_volume(soon(), &request).await.unwrap_err();
        match error {
            ttrpc::Error::RpcStatus(status) => assert_eq!(status.code(), Code::UNIMPLEMENTED),
            other => panic!("{other}"),
        }
    }
}
