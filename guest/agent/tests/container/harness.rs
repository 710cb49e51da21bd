// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! An agent that is not init, in a mount namespace of its own, and a client to drive it.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use ecr_agent_protocol::agent as msg;
use ecr_agent_protocol::client::AgentClient;
use ecr_agent_protocol::oci;
use protobuf::MessageField;
use tokio::net::UnixStream;
use ttrpc::Code;
use ttrpc::context::{Context, with_duration};

const BUSYBOX: &str = "/bin/busybox";
/// Private to each agent: where it keeps containers, and the version of cgroups that guests have.
const MOUNTS: &str = "mount -t tmpfs tmpfs /run && \
    { [ -e /sys/fs/cgroup/cgroup.procs ] || mount -t cgroup2 cgroup2 /sys/fs/cgroup; } && exec \"$0\"";

static NEXT: AtomicU32 = AtomicU32::new(0);

/// A running agent; killed with all containers at the end.
pub struct Agent {
    pub client: AgentClient,
    pub rootfs: PathBuf,
    pub dir: tempfile::TempDir,
    child: Child,
    cgroup: String,
}

impl Agent {
    /// Start one; `None`, and the reason on standard error, where that cannot be done.
    pub async fn start() -> Option<Self> {
        if let Some(reason) = obstacle() {
            eprintln!("SKIPPED: {reason}");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let rootfs = dir.path().join("rootfs");
        make_rootfs(&rootfs);
        let socket = dir.path().join("agent.sock");
        let child = Command::new("unshare")
            .args(["--mount", "--propagation", "private", "sh", "-c", MOUNTS])
            .arg(env!("CARGO_BIN_EXE_ecr-agent"))
            .env("KATA_AGENT_SERVER_ADDR", format!("unix://{}", socket.display()))
            .spawn()
            .unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        let stream = loop {
            match UnixStream::connect(&socket).await {
                Ok(stream) => break stream,
                Err(error) => assert!(Instant::now() < deadline, "no agent: {error}"),
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        };
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let cgroup = format!("/ecr-test-{}-{number}", std::process::id());
        Some(Agent { client: AgentClient::over(stream), rootfs, dir, child, cgroup })
    }

    /// A path as the agent sees it.
    pub fn inside(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.child.id()))
    }

    pub fn cgroup_of(&self, id: &str) -> PathBuf {
        self.inside(&format!("/sys/fs/cgroup{}/{id}", self.cgroup))
    }

    /// A specification like containerd's for `sh -c script`.
    pub fn spec(&self, id: &str, script: &str) -> oci::Spec {
        let mut spec = oci::Spec::new();
        spec.process = Some(process(&["sh", "-c", script])).into();
        spec.root = MessageField::some(oci::Root {
            path: self.rootfs.display().to_string(),
            ..Default::default()
        });
        spec.mounts = vec![
            mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
            mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            mount(
                "/dev/pts",
                "devpts",
                "devpts",
                &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
            ),
            mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
            mount("/dev/shm", "tmpfs", "shm", &["nosuid", "mode=1777", "size=65536k"]),
            mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
            mount("/sys/fs/cgroup", "cgroup", "cgroup", &["nosuid", "noexec", "nodev", "ro"]),
        ];
        let linux = spec.linux.mut_or_insert_default();
        linux.cgroups_path = format!("{}/{id}", self.cgroup);
        linux.namespaces = ["ipc", "uts", "mount"]
            .map(|kind| oci::LinuxNamespace { type_: kind.into(), ..Default::default() })
            .into();
        linux.masked_paths = vec!["/proc/kcore".into(), "/proc/acpi".into(), "/no/such".into()];
        linux.readonly_paths = vec!["/proc/sys".into(), "/proc/sysrq-trigger".into()];
        spec
    }

    pub async fn create(&self, id: &str, spec: oci::Spec) -> Result<(), (Code, String)> {
        self.create_with(msg::CreateContainerRequest {
            container_id: id.into(),
            oci: MessageField::some(spec),
            ..Default::default()
        })
        .await
    }

    pub async fn create_with(
        &self,
        request: msg::CreateContainerRequest,
    ) -> Result<(), (Code, String)> {
        self.client.agent.create_container(soon(), &request).await.map(drop).map_err(reason)
    }

    pub async fn start_container(&self, id: &str) -> Result<(), (Code, String)> {
        let request = msg::StartContainerRequest { container_id: id.into(), ..Default::default() };
        self.client.agent.start_container(soon(), &request).await.map(drop).map_err(reason)
    }

    pub async fn exec(
        &self,
        id: &str,
        exec_id: &str,
        process: oci::Process,
    ) -> Result<(), (Code, String)> {
        let request = msg::ExecProcessRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            process: MessageField::some(process),
            ..Default::default()
        };
        self.client.agent.exec_process(soon(), &request).await.map(drop).map_err(reason)
    }

    pub async fn wait(&self, id: &str, exec_id: &str) -> i32 {
        let request = msg::WaitProcessRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            ..Default::default()
        };
        self.client.agent.wait_process(soon(), &request).await.unwrap().status
    }

    pub async fn signal(&self, id: &str, exec_id: &str, signal: i32) -> Result<(), (Code, String)> {
        let request = msg::SignalProcessRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            signal: signal.cast_unsigned(),
            ..Default::default()
        };
        self.client.agent.signal_process(soon(), &request).await.map(drop).map_err(reason)
    }

    pub async fn remove(&self, id: &str) -> Result<(), (Code, String)> {
        let request = msg::RemoveContainerRequest { container_id: id.into(), ..Default::default() };
        self.client.agent.remove_container(soon(), &request).await.map(drop).map_err(reason)
    }

    /// All that a process writes to standard output until the end.
    pub async fn stdout(&self, id: &str, exec_id: &str) -> Vec<u8> {
        let request = self.read_request(id, exec_id);
        let mut all = Vec::new();
        loop {
            let part = self.client.agent.read_stdout(soon(), &request).await.unwrap().data;
            if part.is_empty() {
                return all;
            }
            all.extend(part);
        }
    }

    pub async fn stderr(&self, id: &str, exec_id: &str) -> Vec<u8> {
        let request = self.read_request(id, exec_id);
        let mut all = Vec::new();
        loop {
            let part = self.client.agent.read_stderr(soon(), &request).await.unwrap().data;
            if part.is_empty() {
                return all;
            }
            all.extend(part);
        }
    }

    fn read_request(&self, id: &str, exec_id: &str) -> msg::ReadStreamRequest {
        msg::ReadStreamRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            len: 64 << 10,
            ..Default::default()
        }
    }

    pub async fn write(&self, id: &str, exec_id: &str, data: &[u8]) {
        let request = msg::WriteStreamRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            data: data.into(),
            ..Default::default()
        };
        let response = self.client.agent.write_stdin(soon(), &request).await.unwrap();
        assert_eq!(response.len as usize, data.len());
    }

    pub async fn close_stdin(&self, id: &str, exec_id: &str) {
        let request = msg::CloseStdinRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            ..Default::default()
        };
        self.client.agent.close_stdin(soon(), &request).await.unwrap();
    }

    /// Run a container to its end: exit status and both outputs.
    pub async fn run(&self, id: &str, spec: oci::Spec) -> (i32, String, String) {
        self.create(id, spec).await.unwrap();
        self.start_container(id).await.unwrap();
        let (stdout, stderr) = tokio::join!(self.stdout(id, ""), self.stderr(id, ""));
        let status = self.wait(id, "").await;
        self.remove(id).await.unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (status, text(stdout), text(stderr))
    }

    /// A started container that lives until it is removed.
    pub async fn sleeper(&self, id: &str) {
        let spec = self.spec(id, "trap 'exit 5' TERM; echo ready; while :; do sleep 0.05; done");
        self.create(id, spec).await.unwrap();
        self.start_container(id).await.unwrap();
        let request = self.read_request(id, "");
        let ready = self.client.agent.read_stdout(soon(), &request).await.unwrap();
        assert_eq!(ready.data, b"ready\n");
    }

    /// Nothing of `id` is left in the guest.
    pub fn assert_gone(&self, id: &str) {
        assert!(!self.inside(&format!("/run/kata-containers/{id}")).exists());
        assert!(!self.cgroup_of(id).exists());
        let mounts = fs::read_to_string(format!("/proc/{}/mounts", self.child.id())).unwrap();
        assert!(!mounts.contains(&format!("kata-containers/{id}")), "{mounts}");
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // Containers first: they are not the agent's children's children only.
        let base = self.inside(&format!("/sys/fs/cgroup{}", self.cgroup));
        let _ = fs::write(base.join("cgroup.kill"), "1");
        for _ in 0..100 {
            let entries = fs::read_dir(&base).into_iter().flatten().flatten();
            entries.for_each(|entry| drop(fs::remove_dir(entry.path())));
            if fs::remove_dir(&base).is_ok() || !base.exists() {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn soon() -> Context {
    with_duration(Duration::from_secs(60))
}

pub fn reason(error: ttrpc::Error) -> (Code, String) {
    match error {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message().into()),
        other => panic!("{other}"),
    }
}

pub fn mount(destination: &str, kind: &str, source: &str, options: &[&str]) -> oci::Mount {
    oci::Mount {
        destination: destination.into(),
        type_: kind.into(),
        source: source.into(),
        options: options.iter().map(ToString::to_string).collect(),
        ..Default::default()
    }
}

/// A process of root with a few capabilities.
pub fn process(args: &[&str]) -> oci::Process {
    let capabilities =
        ["CAP_CHOWN", "CAP_KILL", "CAP_SETUID", "CAP_SETGID", "CAP_MKNOD"].map(String::from);
    oci::Process {
        args: args.iter().map(ToString::to_string).collect(),
        env: vec!["PATH=/bin".into(), "TERM=linux".into()],
        cwd: "/".into(),
        capabilities: MessageField::some(oci::LinuxCapabilities {
            bounding: capabilities.to_vec(),
            effective: capabilities.to_vec(),
            permitted: capabilities.to_vec(),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn obstacle() -> Option<String> {
    if !nix::unistd::Uid::effective().is_root() {
        return Some("containers need root".into());
    }
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if !known.contains("cgroup2") {
        return Some("this kernel has no cgroup2".into());
    }
    match fs::read(BUSYBOX) {
        Err(error) => Some(format!("{BUSYBOX}: {error}; install busybox-static")),
        Ok(program) if program.windows(8).take(4096).any(|bytes| bytes == b"ld-linux") => {
            Some(format!("{BUSYBOX} is not static; install busybox-static"))
        }
        Ok(_) => None,
    }
}

fn make_rootfs(rootfs: &Path) {
    for name in ["bin", "etc", "tmp", "data"] {
        fs::create_dir_all(rootfs.join(name)).unwrap();
    }
    fs::copy(BUSYBOX, rootfs.join("bin/busybox")).unwrap();
    let list = Command::new(BUSYBOX).arg("--list").output().unwrap().stdout;
    for name in String::from_utf8(list).unwrap().lines().filter(|name| *name != "busybox") {
        symlink("busybox", rootfs.join("bin").join(name)).unwrap();
    }
    let passwd = "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n";
    fs::write(rootfs.join("etc/passwd"), passwd).unwrap();
    fs::write(rootfs.join("data/text"), "text\n").unwrap();
}
