// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! gRPC calls over a unix socket, one request and one reply each: all that CRI needs of gRPC.
//!
//! The wire is that of "gRPC over HTTP2": a message is a flag, a length and its bytes; how the call ended stands in
//! the trailers.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use http::{HeaderMap, Request};
use protobuf::Message;
use tokio::net::UnixStream;

/// How a call ended, if not well.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{method}: code {code}: {message}")]
pub struct Status {
    /// Which call.
    pub method: String,
    /// gRPC's code.
    pub code: u32,
    /// What the server said.
    pub message: String,
}

/// A server.
#[derive(Debug, Clone)]
pub struct Channel {
    socket: PathBuf,
}

impl Channel {
    /// The server at `socket`; nothing is connected before the first call.
    #[must_use]
    pub fn new(socket: &Path) -> Self {
        Self { socket: socket.to_owned() }
    }

    /// Calls `method`, such as `runtime.v1.RuntimeService/Status`, on a connection of its own.
    ///
    /// # Errors
    /// The server refused ([`Status`]), did not answer within `limit`, or cannot be reached.
    pub fn call<Reply: Message>(
        &self,
        method: &str,
        request: &impl Message,
        limit: Duration,
    ) -> Result<Reply> {
        let request = request.write_to_bytes()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let reply = runtime.block_on(async {
            tokio::time::timeout(limit, self.exchange(method, &request, limit))
                .await
                .with_context(|| format!("{method}: no answer in {limit:?}"))?
        })?;
        Ok(Reply::parse_from_bytes(&reply)?)
    }

    async fn exchange(&self, method: &str, message: &[u8], limit: Duration) -> Result<Vec<u8>> {
        let stream = UnixStream::connect(&self.socket)
            .await
            .with_context(|| format!("connect to {}", self.socket.display()))?;
        let (client, connection) = h2::client::handshake(stream).await?;
        tokio::spawn(connection);
        let head = Request::post(format!("http://localhost/{method}"))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .header("grpc-timeout", format!("{}S", limit.as_secs() + 1))
            .body(())?;
        let (reply, mut body) = client.ready().await?.send_request(head, false)?;
        let length = u32::try_from(message.len())?;
        let frame = [&[0][..], &length.to_be_bytes(), message].concat();
        body.send_data(Bytes::from(frame), true)?;

        let (head, mut body) = reply.await?.into_parts();
        let mut received = Vec::new();
        while let Some(data) = body.data().await {
            let data = data?;
            body.flow_control().release_capacity(data.len())?;
            received.extend_from_slice(&data);
        }
        let trailers = body.trailers().await?.unwrap_or(head.headers);
        ended_well(method, &trailers)?;
        ensure!(received.len() >= 5 && received[0] == 0, "{method}: the reply is no plain message");
        Ok(received.split_off(5))
    }
}

fn ended_well(method: &str, trailers: &HeaderMap) -> Result<()> {
    let text =
        |name: &str| trailers.get(name).map(|value| String::from_utf8_lossy(value.as_bytes()));
    let code = text("grpc-status").context("the reply has no status")?.parse()?;
    if code == 0 {
        return Ok(());
    }
    let message = unescape(&text("grpc-message").unwrap_or_default());
    Err(Status { method: method.to_owned(), code, message }.into())
}

/// A message is percent-encoded ("gRPC over HTTP2", "Responses").
fn unescape(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let [first, more @ ..] = rest {
        let digits = more.get(..2).and_then(|d| std::str::from_utf8(d).ok());
        match digits.and_then(|d| u8::from_str_radix(d, 16).ok()) {
            Some(byte) if *first == b'%' => {
                bytes.push(byte);
                rest = &more[2..];
            }
            _ => {
                bytes.push(*first);
                rest = more;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_decoded() {
        assert_eq!(unescape("no \"%66oo\": 100%25 %zz %e"), "no \"foo\": 100% %zz %e");
    }

    #[test]
    fn a_status_tells_failure_from_success() {
        let mut trailers = HeaderMap::new();
        assert!(ended_well("m", &trailers).is_err());
        trailers.insert("grpc-status", "0".parse().unwrap());
        ended_well("m", &trailers).unwrap();
        trailers.insert("grpc-status", "5".parse().unwrap());
        trailers.insert("grpc-message", "not%20found".parse().unwrap());
        assert_eq!(ended_well("m", &trailers).unwrap_err().to_string(), "m: code 5: not found");
    }
}
