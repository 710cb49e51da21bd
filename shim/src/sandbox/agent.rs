// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The agent in the guest, as the sandbox calls it: every call with a deadline, and errors that name the call.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ecr_agent_protocol::AGENT_PORT;
use ecr_agent_protocol::agent_ttrpc::AgentServiceClient;
use ecr_agent_protocol::client::{AgentClient, connect_multiplexed};
use ecr_agent_protocol::health::CheckRequest;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_vsock::{VsockAddr, VsockStream};
use ttrpc::Code;
use ttrpc::context::{Context, with_duration};

use crate::error::{Error, Kind, Result};

/// How long a call may take that does not wait for the guest's programs.
pub(super) const CALL: Duration = Duration::from_secs(60);

/// How long the agent may take to say that it is well.
pub const CHECK: Duration = Duration::from_secs(30);

/// How long one attempt to connect may take.
const ATTEMPT: Duration = Duration::from_secs(1);

/// Pauses between attempts to connect: the first, and the longest. A guest boots within a second where hardware helps.
const PAUSE: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(100));

/// Where the agent listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AgentAddress {
    /// The host's `AF_VSOCK`.
    Vsock {
        /// The guest's context id.
        cid: u32,
    },
    /// The VMM's unix socket, on which a port is asked for first.
    Hybrid {
        /// The socket.
        path: PathBuf,
    },
}

impl fmt::Display for AgentAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vsock { cid } => write!(f, "vsock://{cid}:{AGENT_PORT}"),
            Self::Hybrid { path } => write!(f, "hvsock://{}:{AGENT_PORT}", path.display()),
        }
    }
}

/// A connected agent. Clones share the connection.
#[derive(Debug, Clone)]
pub struct Agent {
    client: AgentClient,
    dead: Arc<AtomicBool>,
}

impl Agent {
    /// Connect to an agent that may not have started yet, and hear from it. Cancelled by dropping.
    ///
    /// # Errors
    /// It did not answer within `patience`.
    pub async fn connect(address: &AgentAddress, patience: Duration) -> Result<Self> {
        let deadline = Instant::now() + patience;
        let mut pause = PAUSE.0;
        let client = loop {
            let last = match timeout(ATTEMPT, dial(address)).await {
                Ok(Ok(client)) => break client,
                Ok(Err(error)) => error.to_string(),
                Err(_) => "no answer".to_owned(),
            };
            if Instant::now() + pause >= deadline {
                return Err(timed_out(address, patience, &last));
            }
            sleep(pause).await;
            pause = (pause * 2).min(PAUSE.1);
        };
        let agent = Self { client, dead: Arc::default() };
        // The connection may have been made with a guest that then stopped.
        match timeout_at(deadline, agent.check()).await {
            Ok(answer) => answer.map(|()| agent),
            Err(_) => {
                Err(timed_out(address, patience, "connected, but nobody answers as an agent does"))
            }
        }
    }

    /// Ask whether it is well.
    ///
    /// # Errors
    /// It did not say so.
    pub async fn check(&self) -> Result<()> {
        let context = with_duration(CHECK);
        let answer = self.client.health.check(context, &CheckRequest::new()).await;
        answer.map(drop).map_err(|error| {
            let text = format!("Failed to Check if grpc server is working: {}", text(&error));
            Error::new(Kind::Unavailable, text)
        })
    }

    /// The service to make one call of, and its context; see [`call`].
    ///
    /// # Errors
    /// The agent is dead.
    pub(super) fn open(&self, patience: Option<Duration>) -> Result<(AgentServiceClient, Context)> {
        if self.dead.load(Ordering::Acquire) {
            return Err(Error::new(Kind::Unavailable, "Dead agent"));
        }
        Ok((self.client.agent.clone(), patience.map(with_duration).unwrap_or_default()))
    }

    /// From now on every call fails at once.
    pub fn mark_dead(&self) {
        self.dead.store(true, Ordering::Release);
    }

    /// The connection itself.
    pub fn client(&self) -> &AgentClient {
        &self.client
    }
}

async fn dial(address: &AgentAddress) -> io::Result<AgentClient> {
    match address {
        AgentAddress::Vsock { cid } => {
            VsockStream::connect(VsockAddr::new(*cid, AGENT_PORT)).await.map(AgentClient::over)
        }
        AgentAddress::Hybrid { path } => connect_multiplexed(path, AGENT_PORT)
            .await
            .map(AgentClient::over)
            .map_err(io::Error::other),
    }
}

fn timed_out(address: &AgentAddress, patience: Duration, last: &str) -> Error {
    let text = match address {
        AgentAddress::Vsock { cid } => format!("timed out connecting to vsock {cid}:{AGENT_PORT}"),
        AgentAddress::Hybrid { .. } => format!("timed out connecting to {address}"),
    };
    Error::new(Kind::DeadlineExceeded, format!("{text} after {} s ({last})", patience.as_secs()))
}

/// What an answer says, without the names of the layers that it came through.
fn text(error: &ttrpc::Error) -> String {
    match error {
        ttrpc::Error::RpcStatus(status) => status.message().to_owned(),
        other => other.to_string(),
    }
}

/// Call the agent: `call!(agent, "Name", method, message)` is the answer, and errors have the name before them.
macro_rules! call {
    ($agent:expr, $name:literal, $method:ident, $message:expr) => {
        call!($agent, $name, $method, $message, Some($crate::sandbox::agent::CALL))
    };
    ($agent:expr, $name:literal, $method:ident, $message:expr, $patience:expr) => {
        async {
            let (service, context) = $agent.open($patience)?;
            let started = std::time::Instant::now();
            let answer = service.$method(context, &$message).await;
            $crate::host::metrics::AGENT_CALLS.observe(stringify!($method), started.elapsed());
            answer.map_err(|e| $crate::sandbox::agent::convert(&e))
        }
        .await
        .map_err(|error: $crate::error::Error| error.context($name))
    };
}

/// The same for calls that take as long as the guest's programs do.
macro_rules! call_unbounded {
    ($agent:expr, $name:literal, $method:ident, $message:expr) => {
        $crate::sandbox::agent::call!($agent, $name, $method, $message, None)
    };
}

pub(super) use {call, call_unbounded};

pub(super) fn convert(error: &ttrpc::Error) -> Error {
    let kind = match error {
        ttrpc::Error::RpcStatus(status) => match status.code() {
            Code::INVALID_ARGUMENT => Kind::InvalidArgument,
            Code::NOT_FOUND => Kind::NotFound,
            Code::ALREADY_EXISTS => Kind::AlreadyExists,
            Code::FAILED_PRECONDITION => Kind::FailedPrecondition,
            Code::UNIMPLEMENTED => Kind::Unimplemented,
            Code::DEADLINE_EXCEEDED => Kind::DeadlineExceeded,
            Code::UNAVAILABLE => Kind::Unavailable,
            _ => Kind::Internal,
        },
        _ => Kind::Unavailable,
    };
    Error::new(kind, text(error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixListener;

    #[test]
    fn addresses_are_written_as_clients_read_them() {
        assert_eq!(AgentAddress::Vsock { cid: 7 }.to_string(), "vsock://7:1024");
        let hybrid = AgentAddress::Hybrid { path: "/run/vc/vm/s/agent.sock".into() };
        assert_eq!(hybrid.to_string(), "hvsock:///run/vc/vm/s/agent.sock:1024");
    }

    #[tokio::test]
    async fn an_agent_that_never_listens_is_given_up_in_time() {
        let address = AgentAddress::Hybrid { path: "/nonexistent/agent.sock".into() };
        let error = Agent::connect(&address, Duration::from_secs(1)).await.unwrap_err();
        assert_eq!(error.kind(), Kind::DeadlineExceeded);
        assert!(error.to_string().contains("timed out connecting to"), "{error}");
        assert!(error.to_string().contains("after 1 s"), "{error}");
    }

    /// What `connect` makes of an agent that takes a connection and answers its first request with `bytes`.
    async fn connect_to_one_that_says(bytes: Vec<u8>) -> Error {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("agent.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0; 4096];
            assert!(stream.read(&mut request).await.unwrap() > 0, "no CONNECT");
            stream.write_all(b"OK 1\n").await.unwrap();
            assert!(stream.read(&mut request).await.unwrap() > 0, "no request");
            // It may be hung up on before the end.
            let _ = stream.write_all(&bytes).await;
            while stream.read(&mut request).await.is_ok_and(|count| count > 0) {}
        });
        let address = AgentAddress::Hybrid { path };
        let error = Agent::connect(&address, Duration::from_secs(2)).await.unwrap_err();
        server.abort();
        error
    }

    #[tokio::test]
    async fn an_agent_that_answers_nonsense_is_refused() {
        // A frame of ttrpc: length, stream, type, flags. The first request is stream 1.
        let frame = |length: u32, stream: u32, kind: u8, payload: &[u8]| {
            [&length.to_be_bytes()[..], &stream.to_be_bytes(), &[kind, 0], payload].concat()
        };
        for (what, bytes) in [
            ("text", b"SSH-2.0-OpenSSH_9.2\r\n".repeat(1000)),
            ("zeros", vec![0; 100_000]),
            ("no protobuf", frame(4, 1, 2, &[0xFF; 4])),
            ("an answer nobody asked for", frame(0, 77, 2, &[])),
            ("a frame longer than any may be", frame(u32::MAX, 1, 2, &[])),
            ("half a frame", frame(100, 1, 2, &[0; 50])),
        ] {
            let error = connect_to_one_that_says(bytes).await;
            let expected = [Kind::Unavailable, Kind::DeadlineExceeded].contains(&error.kind());
            assert!(expected, "{what}: {error:?}");
            assert!(error.to_string().len() < 1000, "{what}: {error}");
            println!("{what}: {error}");
        }
    }
}
