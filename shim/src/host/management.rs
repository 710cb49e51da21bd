// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The shim's management socket: plain HTTP on `/run/vc/sbs/<sandbox>/shim-monitor.sock`, with Kata's addresses.
//!
//! | address | method | answer |
//! |---|---|---|
//! | `/metrics` | GET | figures of the shim, the machine, virtiofsd and the agent |
//! | `/agent-url` | GET | where the agent listens |
//! | `/direct-volume/stats?path=` | GET | usage of a volume, as JSON |
//! | `/direct-volume/resize` | POST | `{"VolumePath": .., "Size": ..}` |
//! | `/iptables`, `/ip6tables` | GET, PUT | the guest's rules in the format of iptables-save |
//!
//! Clients are few and local, but not trusted with the shim's memory or time: requests, connections and waiting are
//! bounded.

use std::convert::Infallible;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ecr_agent_protocol::agent;
use ecr_agent_protocol::client::AgentClient;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::{Body as _, Bytes, Incoming};
use hyper::header::CONTENT_TYPE;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Deserialize;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use ttrpc::context;

use super::metrics::Sampler;

/// Clients at a time; more of them wait.
const MAX_CONNECTIONS: usize = 16;
/// A set of rules is the largest request.
const MAX_BODY: usize = 4 << 20;
/// Request line and headers.
const MAX_HEAD: usize = 16 << 10;
/// A request's head and body must be here by then.
const READ_LIMIT: Duration = Duration::from_secs(10);
/// Appendix A of the protocol: calls that do not wait for a process.
const AGENT_LIMIT: Duration = Duration::from_secs(60);
/// After a connection could not be accepted, for want of descriptors perhaps.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What the server asks of a sandbox.
pub trait ManagementState: Send + Sync + 'static {
    /// Where the agent listens: `vsock://<cid>:1024` or `hvsock://<path>:1024`.
    fn agent_url(&self) -> String;
    /// The connection to the agent, while there is one.
    fn agent(&self) -> Option<AgentClient>;
    /// virtiofsd's process.
    fn virtiofsd(&self) -> Option<u32>;
    /// The pod's network namespace.
    fn netns(&self) -> Option<PathBuf>;
}

struct Server {
    state: Arc<dyn ManagementState>,
    sampler: Arc<Sampler>,
}

/// Serve until dropped.
pub async fn serve(listener: UnixListener, state: Arc<dyn ManagementState>) {
    let server = Arc::new(Server { state, sampler: Arc::default() });
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    // Dropped with this future, and the connections with it.
    let mut connections = JoinSet::new();
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let server = Arc::clone(&server);
                connections.spawn(async move {
                    server.connection(stream).await;
                    drop(slot);
                });
            }
            Err(error) => {
                log::warn!("accept a management connection: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
        while connections.try_join_next().is_some() {}
    }
}

/// A request that fails: what is answered.
struct Failure(StatusCode, String);

impl<E: fmt::Display> From<E> for Failure {
    fn from(error: E) -> Self {
        Self(StatusCode::INTERNAL_SERVER_ERROR, error.to_string())
    }
}

/// What a request is answered with: its type and its content.
type Answer = (&'static str, Vec<u8>);

const TEXT: &str = "text/plain; charset=utf-8";
const METRICS: &str = "text/plain; version=0.0.4; charset=utf-8";
const JSON: &str = "application/json";

impl Server {
    async fn connection(self: Arc<Self>, stream: UnixStream) {
        let service = service_fn(|request| {
            let server = Arc::clone(&self);
            async move { Ok::<_, Infallible>(server.answer(request).await) }
        });
        let served = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(READ_LIMIT)
            .max_buf_size(MAX_HEAD)
            .serve_connection(TokioIo::new(stream), service)
            .await;
        if let Err(error) = served {
            log::debug!("management connection: {error}");
        }
    }

    async fn answer(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let what = format!("{} {}", request.method(), request.uri().path());
        let (status, kind, content) = match self.dispatch(request).await {
            Ok((kind, content)) => (StatusCode::OK, kind, content),
            Err(Failure(status, text)) => {
                log::info!("management request {what}: {status}: {text}");
                (status, TEXT, format!("{text}\n").into_bytes())
            }
        };
        let mut response = Response::new(Full::new(Bytes::from(content)));
        *response.status_mut() = status;
        response.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(kind));
        response
    }

    async fn dispatch(&self, request: Request<Incoming>) -> Result<Answer, Failure> {
        let path = request.uri().path().to_owned();
        match (path.as_str(), request.method()) {
            ("/metrics", &Method::GET) => self.metrics().await,
            ("/agent-url", &Method::GET) => Ok((TEXT, self.state.agent_url().into_bytes())),
            ("/direct-volume/stats", &Method::GET) => {
                self.volume_stats(request.uri().query()).await
            }
            ("/direct-volume/resize", &Method::POST) => self.resize_volume(request).await,
            ("/iptables", _) => self.iptables(request, false).await,
            ("/ip6tables", _) => self.iptables(request, true).await,
            (
                "/metrics" | "/agent-url" | "/direct-volume/stats" | "/direct-volume/resize",
                method,
            ) => {
                let text = format!("{method} is not possible on {path}");
                Err(Failure(StatusCode::METHOD_NOT_ALLOWED, text))
            }
            _ => Err(Failure(StatusCode::NOT_FOUND, format!("there is nothing at {path}"))),
        }
    }

    fn agent(&self) -> Result<AgentClient, Failure> {
        self.state.agent().ok_or_else(|| {
            let text = "there is no connection to the agent".to_owned();
            Failure(StatusCode::INTERNAL_SERVER_ERROR, text)
        })
    }

    async fn metrics(&self) -> Result<Answer, Failure> {
        let agent = async {
            let agent = self.state.agent()?.agent;
            let metrics = agent.get_metrics(deadline(), &agent::GetMetricsRequest::new()).await;
            metrics.inspect_err(|error| log::debug!("metrics of the agent: {error}")).ok()
        };
        let host = async {
            let (virtiofsd, netns) = (self.state.virtiofsd(), self.state.netns());
            let sampler = Arc::clone(&self.sampler);
            // Reading /proc may wait for the process's memory map.
            let sample = move || sampler.sample(virtiofsd, netns.as_deref());
            tokio::task::spawn_blocking(sample).await
        };
        let (agent, text) = futures_util::future::join(agent, host).await;
        let mut text = text?;
        if let Some(agent) = agent {
            text.push_str(&agent.metrics);
        }
        Ok((METRICS, text.into_bytes()))
    }

    async fn volume_stats(&self, query: Option<&str>) -> Result<Answer, Failure> {
        let path = query.unwrap_or_default().split('&').find_map(|pair| pair.strip_prefix("path="));
        let path = path.and_then(unescape).filter(|path| !path.is_empty()).ok_or_else(|| {
            Failure(StatusCode::BAD_REQUEST, "the parameter path is missing".to_owned())
        })?;
        let request = agent::VolumeStatsRequest { volume_guest_path: path, ..Default::default() };
        let stats = self.agent()?.agent.get_volume_stats(deadline(), &request).await?;
        let usage: Vec<_> = stats
            .usage
            .iter()
            .map(|usage| {
                serde_json::json!({
                    "available": usage.available,
                    "total": usage.total,
                    "used": usage.used,
                    "unit": usage.unit.value(),
                })
            })
            .collect();
        let mut answer = serde_json::json!({ "usage": usage });
        if let Some(condition) = stats.volume_condition.as_ref() {
            answer["volume_condition"] =
                serde_json::json!({ "abnormal": condition.abnormal, "message": condition.message });
        }
        Ok((JSON, answer.to_string().into_bytes()))
    }

    async fn resize_volume(&self, request: Request<Incoming>) -> Result<Answer, Failure> {
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Resize {
            volume_path: String,
            size: u64,
        }
        let body = read_body(request).await?;
        let resize: Resize = serde_json::from_slice(&body)
            .map_err(|error| Failure(StatusCode::BAD_REQUEST, format!("the request: {error}")))?;
        let request = agent::ResizeVolumeRequest {
            volume_guest_path: resize.volume_path,
            size: resize.size,
            ..Default::default()
        };
        self.agent()?.agent.resize_volume(deadline(), &request).await?;
        Ok((TEXT, Vec::new()))
    }

    async fn iptables(&self, request: Request<Incoming>, is_ipv6: bool) -> Result<Answer, Failure> {
        match *request.method() {
            Method::GET => {
                let request = agent::GetIPTablesRequest { is_ipv6, ..Default::default() };
                let answer = self.agent()?.agent.get_ip_tables(deadline(), &request).await?;
                Ok((TEXT, answer.data))
            }
            Method::PUT => {
                let data = read_body(request).await?.to_vec();
                let request = agent::SetIPTablesRequest { is_ipv6, data, ..Default::default() };
                let answer = self.agent()?.agent.set_ip_tables(deadline(), &request).await?;
                Ok((TEXT, answer.data))
            }
            ref other => {
                let text = format!("{other} is not possible on rules: GET or PUT");
                Err(Failure(StatusCode::NOT_IMPLEMENTED, text))
            }
        }
    }
}

fn deadline() -> context::Context {
    context::with_timeout(i64::try_from(AGENT_LIMIT.as_nanos()).unwrap_or(i64::MAX))
}

async fn read_body(request: Request<Incoming>) -> Result<Bytes, Failure> {
    let too_large = || {
        let text = format!("the request is larger than {MAX_BODY} bytes");
        Failure(StatusCode::PAYLOAD_TOO_LARGE, text)
    };
    if request.body().size_hint().lower() > MAX_BODY as u64 {
        return Err(too_large());
    }
    let body = Limited::new(request.into_body(), MAX_BODY).collect();
    match tokio::time::timeout(READ_LIMIT, body).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<http_body_util::LengthLimitError>() => Err(too_large()),
        Ok(Err(error)) => Err(Failure(StatusCode::BAD_REQUEST, error.to_string())),
        Err(_) => {
            let text = format!("the request was not here after {READ_LIMIT:?}");
            Err(Failure(StatusCode::REQUEST_TIMEOUT, text))
        }
    }
}

/// RFC 3986, 2.1: percent-encoding; `+` is a blank, as in forms. `None` when it is no text.
fn unescape(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let digits = [rest.next()?, rest.next()?];
                let digits = std::str::from_utf8(&digits).ok()?;
                u8::from_str_radix(digits, 16).ok()?
            }
            b'+' => b' ',
            other => other,
        });
    }
    String::from_utf8(bytes).ok()
}

/// Where a sandbox's management socket is, under the directory that all sandboxes share, usually `/run/vc/sbs`.
pub fn socket_path(root: &std::path::Path, sandbox: &str) -> io::Result<PathBuf> {
    let plain = !sandbox.is_empty()
        && sandbox.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte))
        && !sandbox.starts_with('.');
    if !plain {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{sandbox:?} is no name of a sandbox"),
        ));
    }
    Ok(root.join(sandbox).join("shim-monitor.sock"))
}

#[cfg(test)]
#[path = "management_tests.rs"]
mod tests;
