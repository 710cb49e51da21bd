// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! A shim in this process, with a fake sandbox below it and a fake containerd above.

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use containerd_shim_protos::api;
use containerd_shim_protos::shim_async::{Client, Events, TaskClient, create_events};
use ecr_shim::process::serve;
use ecr_shim::task::events::Publisher;
use ecr_shim::task::pod::Pod;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use parking_lot::Mutex;
use protobuf::well_known_types::any::Any;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::unix::pipe;
use tokio::time::{Instant, sleep};
use ttrpc::r#async::transport::{Listener, Socket};
use ttrpc::r#async::{Server, TtrpcContext};
use ttrpc::{Code, context};

use super::FakeLauncher;

/// Nothing in these tests takes longer.
pub const LIMIT: Duration = Duration::from_secs(30);

/// Events that containerd was sent: topic, container, exec or process.
pub type Received = Arc<Mutex<Vec<(String, Any)>>>;

pub struct Shim {
    pub dir: TempDir,
    pub launcher: FakeLauncher,
    pub pod: Arc<Pod>,
    pub received: Received,
    containerd: Option<Server>,
    server: Server,
}

struct EventSink(Received);

#[async_trait]
impl Events for EventSink {
    async fn forward(
        &self,
        ctx: &TtrpcContext,
        call: api::ForwardRequest,
    ) -> ttrpc::Result<api::Empty> {
        assert_eq!(ctx.metadata["containerd-namespace-ttrpc"], ["test"]);
        let envelope = call.envelope.unwrap();
        assert_eq!(envelope.namespace, "test");
        self.0.lock().push((envelope.topic, envelope.event.unwrap()));
        Ok(api::Empty::new())
    }
}

impl Shim {
    /// The shim of sandbox `s1`.
    pub async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let launcher = FakeLauncher::default();
        let address = dir.path().join("events.sock").to_str().unwrap().to_owned();
        let events = Publisher::start("test", Some(address));
        let pod = Pod::new("test", "s1", Arc::new(launcher.clone()), events);
        let listener = UnixListener::bind(dir.path().join("task.sock")).unwrap();
        let mut server = serve::server(listener, &pod).unwrap();
        server.start().await.unwrap();
        let received = Received::default();
        let mut shim = Self { dir, launcher, pod, received, containerd: None, server };
        shim.start_containerd().await;
        shim
    }

    pub async fn start_containerd(&mut self) {
        let path = self.dir.path().join("events.sock");
        let _ = fs::remove_file(&path);
        let listener = Listener::try_from(nonblocking(&path)).unwrap();
        let service = create_events(Arc::new(EventSink(self.received.clone())));
        let mut server = Server::new().add_listener(listener).register_service(service);
        server.start().await.unwrap();
        self.containerd = Some(server);
    }

    pub async fn stop_containerd(&mut self) {
        self.containerd.take().unwrap().shutdown().await.unwrap();
        fs::remove_file(self.dir.path().join("events.sock")).unwrap();
    }

    pub async fn stop(mut self) {
        self.server.shutdown().await.unwrap();
    }

    /// A connection of its own.
    pub async fn connect(&self) -> Client {
        let path = self.dir.path().join("task.sock");
        Client::new(Socket::from(tokio::net::UnixStream::connect(path).await.unwrap()))
    }

    pub async fn client(&self) -> TaskClient {
        TaskClient::new(self.connect().await)
    }

    /// A bundle whose process is `sh -c script`.
    pub fn bundle(&self, id: &str, script: &str, annotations: Value) -> PathBuf {
        let path = self.dir.path().join(id);
        fs::create_dir_all(&path).unwrap();
        let spec = json!({
            "ociVersion": "1.1.0",
            "root": {"path": "rootfs"},
            "process": process(script),
            "annotations": annotations,
        });
        fs::write(path.join("config.json"), spec.to_string()).unwrap();
        path
    }

    /// What containerd asks for with that bundle, without streams.
    pub fn create(&self, id: &str, script: &str, annotations: Value) -> api::CreateTaskRequest {
        let bundle = self.bundle(id, script, annotations);
        api::CreateTaskRequest {
            id: id.into(),
            bundle: bundle.to_str().unwrap().into(),
            ..Default::default()
        }
    }

    /// A FIFO.
    pub fn fifo(&self, name: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        mkfifo(&path, Mode::S_IRWXU).unwrap();
        path
    }

    /// Create and start a container.
    pub async fn run(&self, client: &TaskClient, call: api::CreateTaskRequest) {
        let id = call.id.clone();
        client.create(limit(), &call).await.unwrap();
        client.start(limit(), &start(&id, "")).await.unwrap();
    }

    /// The topics that containerd was told of.
    pub fn topics(&self) -> Vec<String> {
        self.received.lock().iter().map(|(topic, _)| topic.clone()).collect()
    }

    pub async fn until_topic(&self, topic: &str, count: usize) {
        until(|| self.topics().iter().filter(|told| *told == topic).count() >= count).await;
    }
}

fn nonblocking(path: &Path) -> UnixListener {
    let listener = UnixListener::bind(path).unwrap();
    listener.set_nonblocking(true).unwrap();
    listener
}

/// The OCI process `sh -c script`.
pub fn process(script: &str) -> Value {
    json!({
        "user": {"uid": 0, "gid": 0},
        "cwd": "/",
        "args": ["/bin/sh", "-c", script],
        "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"],
    })
}

/// A reader of a FIFO, which must be opened before the writer.
pub fn reader(path: &Path) -> pipe::Receiver {
    pipe::OpenOptions::new().open_receiver(path).unwrap()
}

pub fn limit() -> context::Context {
    context::with_duration(LIMIT)
}

pub fn start(id: &str, exec: &str) -> api::StartRequest {
    api::StartRequest { id: id.into(), exec_id: exec.into(), ..Default::default() }
}

pub fn delete(id: &str, exec: &str) -> api::DeleteRequest {
    api::DeleteRequest { id: id.into(), exec_id: exec.into(), ..Default::default() }
}

pub fn state(id: &str, exec: &str) -> api::StateRequest {
    api::StateRequest { id: id.into(), exec_id: exec.into(), ..Default::default() }
}

pub fn wait(id: &str, exec: &str) -> api::WaitRequest {
    api::WaitRequest { id: id.into(), exec_id: exec.into(), ..Default::default() }
}

pub fn kill(id: &str, exec: &str, signal: u32) -> api::KillRequest {
    api::KillRequest { id: id.into(), exec_id: exec.into(), signal, ..Default::default() }
}

pub fn exec(id: &str, exec: &str, script: &str) -> api::ExecProcessRequest {
    let spec = Any {
        type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".into(),
        value: process(script).to_string().into_bytes(),
        ..Default::default()
    };
    api::ExecProcessRequest {
        id: id.into(),
        exec_id: exec.into(),
        spec: Some(spec).into(),
        ..Default::default()
    }
}

/// The code and text of a refusal.
#[track_caller]
pub fn refusal<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> (Code, String) {
    match result.unwrap_err() {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message().to_owned()),
        other => panic!("no status: {other}"),
    }
}

/// Wait until something is so.
pub async fn until(mut so: impl FnMut() -> bool) {
    let started = Instant::now();
    while !so() {
        assert!(started.elapsed() < LIMIT, "it does not come to be");
        sleep(Duration::from_millis(5)).await;
    }
}
