// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The management server, asked over its socket, with an agent played by the test.

use async_trait::async_trait;
use ecr_agent_protocol::agent_ttrpc::{AgentService, create_agent_service};
use ecr_agent_protocol::csi;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use ttrpc::r#async::{Server as TtrpcServer, TtrpcContext};

use super::*;

struct FakeAgent;

#[async_trait]
impl AgentService for FakeAgent {
    async fn get_metrics(
        &self,
        _: &TtrpcContext,
        _: agent::GetMetricsRequest,
    ) -> ttrpc::Result<agent::Metrics> {
        Ok(agent::Metrics { metrics: "kata_agent_threads 3\n".into(), ..Default::default() })
    }

    async fn get_volume_stats(
        &self,
        _: &TtrpcContext,
        request: agent::VolumeStatsRequest,
    ) -> ttrpc::Result<csi::VolumeStatsResponse> {
        assert_eq!(request.volume_guest_path, "/a b/c");
        let mut answer = csi::VolumeStatsResponse::new();
        answer.usage.push(csi::VolumeUsage {
            total: 10,
            unit: csi::volume_usage::Unit::BYTES.into(),
            ..Default::default()
        });
        Ok(answer)
    }

    async fn get_ip_tables(
        &self,
        _: &TtrpcContext,
        request: agent::GetIPTablesRequest,
    ) -> ttrpc::Result<agent::GetIPTablesResponse> {
        let data = if request.is_ipv6 { b"six".to_vec() } else { b"four".to_vec() };
        Ok(agent::GetIPTablesResponse { data, ..Default::default() })
    }

    async fn set_ip_tables(
        &self,
        _: &TtrpcContext,
        request: agent::SetIPTablesRequest,
    ) -> ttrpc::Result<agent::SetIPTablesResponse> {
        Ok(agent::SetIPTablesResponse { data: request.data, ..Default::default() })
    }
}

struct FakeSandbox(Option<AgentClient>);

impl ManagementState for FakeSandbox {
    fn agent_url(&self) -> String {
        "vsock://7:1024".into()
    }
    fn agent(&self) -> Option<AgentClient> {
        self.0.clone()
    }
    fn virtiofsd(&self) -> Option<u32> {
        None
    }
    fn netns(&self) -> Option<PathBuf> {
        None
    }
}

/// A server, and what keeps it alive.
struct Site {
    directory: TempDir,
    _agent: Option<TtrpcServer>,
    served: tokio::task::JoinHandle<()>,
}

impl Site {
    async fn new(with_agent: bool) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (agent, client) = if with_agent {
            let path = directory.path().join("agent.sock");
            let mut agent = TtrpcServer::new()
                .bind(&format!("unix://{}", path.display()))
                .unwrap()
                .register_service(create_agent_service(Arc::new(FakeAgent)));
            agent.start().await.unwrap();
            let client = AgentClient::over(UnixStream::connect(&path).await.unwrap());
            (Some(agent), Some(client))
        } else {
            (None, None)
        };
        let listener = UnixListener::bind(directory.path().join("m.sock")).unwrap();
        let served = tokio::spawn(serve(listener, Arc::new(FakeSandbox(client))));
        Self { directory, _agent: agent, served }
    }

    async fn connect(&self) -> UnixStream {
        UnixStream::connect(self.directory.path().join("m.sock")).await.unwrap()
    }

    /// The status and the body that the request is answered with.
    async fn ask(&self, method: &str, path: &str, body: &str) -> (u16, String) {
        let mut stream = self.connect().await;
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: shim\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.into())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_address_answers() {
    let site = Site::new(true).await;
    assert_eq!(site.ask("GET", "/agent-url", "").await, (200, "vsock://7:1024".into()));
    let (status, metrics) = site.ask("GET", "/metrics", "").await;
    assert_eq!(status, 200);
    assert!(
        metrics.contains("\nkata_shim_threads ") && metrics.ends_with("kata_agent_threads 3\n")
    );
    let (status, stats) = site.ask("GET", "/direct-volume/stats?x=1&path=%2Fa+b%2fc", "").await;
    let stats: serde_json::Value = serde_json::from_str(&stats).unwrap();
    assert_eq!(
        (status, &stats["usage"][0]["total"], &stats["usage"][0]["unit"]),
        (200, &10.into(), &1.into())
    );
    assert_eq!(site.ask("GET", "/iptables", "").await, (200, "four".into()));
    assert_eq!(site.ask("GET", "/ip6tables", "").await, (200, "six".into()));
    assert_eq!(site.ask("PUT", "/iptables", "*nat").await, (200, "*nat".into()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_answered_says_why() {
    let site = Site::new(true).await;
    for (method, path, body, status, text) in [
        ("GET", "/", "", 404, "there is nothing at /"),
        ("POST", "/metrics", "", 405, "POST is not possible on /metrics"),
        ("DELETE", "/iptables", "", 501, "GET or PUT"),
        ("GET", "/direct-volume/stats", "", 400, "the parameter path is missing"),
        ("GET", "/direct-volume/stats?path=%f", "", 400, "the parameter path is missing"),
        ("POST", "/direct-volume/resize", "{}", 400, "missing field"),
        // The agent of this test does not offer it.
        ("POST", "/direct-volume/resize", r#"{"VolumePath":"/v","Size":1}"#, 500, ""),
    ] {
        let (found, answer) = site.ask(method, path, body).await;
        assert_eq!(found, status, "{method} {path}: {answer}");
        assert!(answer.contains(text), "{method} {path}: {answer}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_an_agent_there_are_still_figures() {
    let site = Site::new(false).await;
    let (status, metrics) = site.ask("GET", "/metrics", "").await;
    assert_eq!(status, 200);
    assert!(metrics.contains("kata_shim_fds "), "{metrics}");
    let (status, text) = site.ask("GET", "/iptables", "").await;
    assert_eq!((status, text.as_str()), (500, "there is no connection to the agent\n"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_are_bounded() {
    let site = Site::new(false).await;
    let mut stream = site.connect().await;
    let head =
        format!("PUT /iptables HTTP/1.1\r\nHost: shim\r\nContent-Length: {}\r\n\r\n", MAX_BODY + 1);
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = [0; 64];
    let length = stream.read(&mut answer).await.unwrap();
    assert!(answer[..length].starts_with(b"HTTP/1.1 413 "), "{:?}", &answer[..length]);

    let mut stream = site.connect().await;
    let long = vec![b'a'; MAX_HEAD * 2];
    let _ = stream.write_all(&[b"GET /", long.as_slice()].concat()).await;
    let length = stream.read(&mut answer).await.unwrap_or(0);
    assert!(length == 0 || answer.starts_with(b"HTTP/1.1 4"), "{:?}", &answer[..length]);

    // Connections that say nothing do not keep the server from ending.
    let _idle = site.connect().await;
    site.served.abort();
}

#[test]
fn escapes_are_undone() {
    assert_eq!(unescape("a%20b+c").as_deref(), Some("a b c"));
    for wrong in ["%", "%2", "%zz", "%ff"] {
        assert_eq!(unescape(wrong), None, "{wrong}");
    }
}

#[test]
fn a_sandbox_is_a_name_and_no_path() {
    let root = std::path::Path::new("/run/vc/sbs");
    assert_eq!(socket_path(root, "abc-1.x_y").unwrap(), root.join("abc-1.x_y/shim-monitor.sock"));
    for wrong in ["", ".", "..", "a/b", "../x", "a b"] {
        assert!(socket_path(root, wrong).is_err(), "{wrong}");
    }
}
