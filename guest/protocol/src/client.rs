// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The host's connection to an agent, over any byte stream.
//!
//! With vhost-vsock the stream is an `AF_VSOCK` socket to the guest's CID. Where the VMM serves vsock itself, it is a
//! Unix socket on which the port is asked for first: the client writes `CONNECT <port>\n`, and a line that begins with
//! `OK` means that the guest accepted. Everything after that line belongs to the guest.

use std::io;
use std::path::{Path, PathBuf};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;
use ttrpc::r#async::Client;
use ttrpc::r#async::transport::Socket;

use crate::agent_ttrpc::AgentServiceClient;
use crate::health_ttrpc::HealthClient;

/// The longest first line that a multiplexer may answer, newline included.
const MAX_GREETING: usize = 64;

/// Why there is no connection to the agent.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The Unix socket or the connection on it failed.
    #[error("reach guest port {port} through {path}: {source}")]
    Io {
        /// The multiplexer's socket.
        path: PathBuf,
        /// The guest's vsock port.
        port: u32,
        /// What the operating system said.
        source: io::Error,
    },
    /// The multiplexer closed the connection or answered something else than `OK`: nobody listens on the port, yet.
    #[error(
        "guest port {port} through {path} is not open (answer: {answer:?}); the guest may still be starting"
    )]
    Refused {
        /// The multiplexer's socket.
        path: PathBuf,
        /// The guest's vsock port.
        port: u32,
        /// The line that came back; empty when the connection was closed without one.
        answer: String,
    },
}

/// Both services of one agent, over one connection. Clones share the connection.
#[derive(Clone)]
pub struct AgentClient {
    /// `grpc.Health`.
    pub health: HealthClient,
    /// `grpc.AgentService`.
    pub agent: AgentServiceClient,
}

impl std::fmt::Debug for AgentClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AgentClient").finish_non_exhaustive()
    }
}

impl AgentClient {
    /// Speak to the agent at the other end of `stream`. Needs a tokio runtime, whose tasks move the bytes.
    pub fn over(stream: impl AsyncRead + AsyncWrite + Send + Sync + 'static) -> Self {
        let client = Client::new(Socket::new(stream));
        AgentClient {
            health: HealthClient::new(client.clone()),
            agent: AgentServiceClient::new(client),
        }
    }

    /// Connect to `port` of the guest whose VMM multiplexes vsock on the Unix socket `path`.
    pub async fn connect(path: &Path, port: u32) -> Result<Self, ConnectError> {
        connect_multiplexed(path, port).await.map(Self::over)
    }
}

/// Open a stream to `port` of the guest whose VMM multiplexes vsock on the Unix socket `path`.
pub async fn connect_multiplexed(path: &Path, port: u32) -> Result<UnixStream, ConnectError> {
    let io_error = |source| ConnectError::Io { path: path.to_owned(), port, source };
    let mut stream = UnixStream::connect(path).await.map_err(io_error)?;
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).await.map_err(io_error)?;
    let answer = read_line(&mut stream).await.map_err(io_error)?;
    if answer == "OK" || answer.starts_with("OK ") {
        Ok(stream)
    } else {
        Err(ConnectError::Refused { path: path.to_owned(), port, answer })
    }
}

/// Read up to a newline or the end of the stream and not a byte further: what follows is the guest's.
async fn read_line(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<String> {
    let mut line = Vec::with_capacity(MAX_GREETING);
    let mut byte = [0];
    while line.len() < MAX_GREETING && stream.read(&mut byte).await? == 1 && byte != *b"\n" {
        line.extend(byte);
    }
    Ok(String::from_utf8_lossy(&line).into_owned())
}
