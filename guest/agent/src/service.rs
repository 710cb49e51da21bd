// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The agent protocol's services.
//!
//! Left out until containers can be run: every call of `grpc.AgentService` but `GetGuestDetails`. Those are not
//! registered, so that the ttRPC server answers UNIMPLEMENTED, which clients take as "an older agent".

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use ecr_agent_protocol::API_VERSION;
use ecr_agent_protocol::agent::{AgentDetails, GuestDetailsRequest, GuestDetailsResponse};
use ecr_agent_protocol::agent_ttrpc::{AgentService, create_agent_service};
use ecr_agent_protocol::health::health_check_response::ServingStatus;
use ecr_agent_protocol::health::{CheckRequest, HealthCheckResponse, VersionCheckResponse};
use ecr_agent_protocol::health_ttrpc::{Health, create_health};
use protobuf::MessageField;
use ttrpc::r#async::{Service, TtrpcContext};
use ttrpc::{Code, Result, get_status};

const VERSION: &str = env!("CARGO_PKG_VERSION");
const MEMORY: &str = "/sys/devices/system/memory";

/// The calls of `grpc.AgentService` that [`Agent`] answers.
const ANSWERED: [&str; 1] = ["GetGuestDetails"];

/// `grpc.Health`.
pub fn health() -> HashMap<String, Service> {
    create_health(Arc::new(Agent::default()))
}

/// `grpc.AgentService`.
pub fn agent() -> HashMap<String, Service> {
    let mut services = create_agent_service(Arc::new(Agent::default()));
    for service in services.values_mut() {
        service.methods.retain(|name, _| ANSWERED.contains(&name.as_str()));
    }
    services
}

struct Agent {
    /// Where the kernel shows its memory blocks.
    memory: &'static Path,
}

impl Default for Agent {
    fn default() -> Self {
        Agent { memory: Path::new(MEMORY) }
    }
}

#[async_trait]
impl Health for Agent {
    /// An agent that can answer is serving.
    async fn check(&self, _: &TtrpcContext, _: CheckRequest) -> Result<HealthCheckResponse> {
        Ok(HealthCheckResponse { status: ServingStatus::SERVING.into(), ..Default::default() })
    }

    async fn version(&self, _: &TtrpcContext, _: CheckRequest) -> Result<VersionCheckResponse> {
        Ok(VersionCheckResponse {
            grpc_version: API_VERSION.into(),
            agent_version: VERSION.into(),
            ..Default::default()
        })
    }
}

#[async_trait]
impl AgentService for Agent {
    async fn get_guest_details(
        &self,
        _: &TtrpcContext,
        request: GuestDetailsRequest,
    ) -> Result<GuestDetailsResponse> {
        let mut response = GuestDetailsResponse {
            agent_details: MessageField::some(AgentDetails {
                version: VERSION.into(),
                init_daemon: std::process::id() == 1,
                ..Default::default()
            }),
            ..Default::default()
        };
        if request.mem_block_size {
            response.mem_block_size_bytes = self.memory_block_size().map_err(|error| {
                internal(format!("read the memory block size below {MEMORY}: {error}"))
            })?;
        }
        if request.mem_hotplug_probe {
            response.support_mem_hotplug_probe = self.memory.join("probe").exists();
        }
        Ok(response)
    }
}

impl Agent {
    /// Bytes per memory block; 0 where the kernel has no memory hotplug.
    fn memory_block_size(&self) -> io::Result<u64> {
        match fs::read_to_string(self.memory.join("block_size_bytes")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
            text => u64::from_str_radix(text?.trim(), 16).map_err(io::Error::other),
        }
    }
}

fn internal(message: String) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(get_status(Code::INTERNAL, message))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    use ecr_agent_protocol::agent::StartContainerRequest;
    use ecr_agent_protocol::client::AgentClient;
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
        let mut server = Server::new()
            .add_listener(listener)
            .register_service(health())
            .register_service(agent());
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
            ("0.0.1", VERSION)
        );
    }

    #[tokio::test(flavor = "current_thread")]
    async fn guest_details_over_a_socket() {
        let (client, _server) = client().await;
        let details =
            client.agent.get_guest_details(soon(), &GuestDetailsRequest::new()).await.unwrap();
        assert_eq!(details.agent_details.version, VERSION);
        assert!(!details.agent_details.init_daemon);
        assert_eq!(details.mem_block_size_bytes, 0, "not asked for");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn other_calls_are_unimplemented() {
        let (client, _server) = client().await;
        let error =
            client.agent.start_container(soon(), &StartContainerRequest::new()).await.unwrap_err();
        match error {
            ttrpc::Error::RpcStatus(status) => assert_eq!(status.code(), Code::UNIMPLEMENTED),
            other => panic!("{other}"),
        }
    }

    #[test]
    fn memory_block_size_is_hexadecimal() {
        let dir = tempfile::tempdir().unwrap();
        let agent = Agent { memory: Box::leak(dir.path().to_path_buf().into_boxed_path()) };
        assert_eq!(agent.memory_block_size().unwrap(), 0);
        fs::write(dir.path().join("block_size_bytes"), "8000000\n").unwrap();
        assert_eq!(agent.memory_block_size().unwrap(), 128 << 20);
        fs::write(dir.path().join("block_size_bytes"), "many\n").unwrap();
        assert!(agent.memory_block_size().is_err());
    }
}
