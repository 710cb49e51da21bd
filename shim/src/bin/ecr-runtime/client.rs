// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Ask a sandbox's shim over its management socket.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::Request;
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;

use ecr_shim::host::management;

/// Figures of a large guest are some hundred kilobytes.
const MAX_ANSWER: usize = 16 << 20;
/// A little more than the shim gives the agent.
const PATIENCE: Duration = Duration::from_secs(65);

/// What the shim of `sandbox` answers to a GET of `path`.
pub fn ask(root: &Path, sandbox: &str, path: &str) -> Result<String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(ask_async(root, sandbox, path))
}

/// The same, in a runtime.
pub async fn ask_async(root: &Path, sandbox: &str, path: &str) -> Result<String> {
    let socket = management::socket_path(root, sandbox)?;
    let exchange = tokio::time::timeout(PATIENCE, exchange(&socket, path));
    exchange.await.unwrap_or_else(|_| Err(anyhow!("no answer within {PATIENCE:?}"))).with_context(
        || {
            let socket = socket.display();
            format!("ask the shim of sandbox {sandbox} for {path} on {socket}")
        },
    )
}

async fn exchange(socket: &Path, path: &str) -> Result<String> {
    let stream = UnixStream::connect(socket).await.context("is the sandbox running?")?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let request =
        Request::get(path).header(hyper::header::HOST, "shim").body(Empty::<Bytes>::new())?;
    let answer = async {
        let (head, body) = sender.send_request(request).await?.into_parts();
        let body = Limited::new(body, MAX_ANSWER).collect().await;
        let body = body.map_err(|error| anyhow!("read the answer: {error}"))?.to_bytes();
        let text = String::from_utf8(body.to_vec()).context("the answer is no text")?;
        if !head.status.is_success() {
            bail!("{}: {}", head.status, text.trim());
        }
        Ok(text)
    };
    tokio::pin!(answer);
    tokio::select! {
        answer = &mut answer => answer,
        // The connection may end before the answer has been looked at.
        ended = connection => match ended {
            Ok(()) => answer.await,
            Err(error) => Err(error.into()),
        },
    }
}
