// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The shim as a process: started, asked and cleaned up after with the command lines and environments of containerd
//! 1.6, 1.7 and 2.1, as recorded.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use containerd_shim_protos::api::{ConnectRequest, DeleteResponse, ShutdownRequest};
use containerd_shim_protos::shim_async::{Client, TaskClient};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};
use protobuf::Message;
use tempfile::TempDir;
use ttrpc::r#async::transport::Socket;
use ttrpc::context;

const LIMIT: Duration = Duration::from_secs(20);

/// The shim itself: no container is created here, so none needs a virtual machine.
const PROGRAM: &str = env!("CARGO_BIN_EXE_containerd-shim-ecr-v2");

/// A containerd's view: its address, and bundles.
struct Containerd {
    dir: TempDir,
}

impl Containerd {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn bundle(&self, id: &str, annotations: &str) -> PathBuf {
        let bundle = self.dir.path().join(id);
        fs::create_dir(&bundle).unwrap();
        fs::write(bundle.join("config.json"), format!("{{\"annotations\": {annotations}}}"))
            .unwrap();
        mkfifo(&bundle.join("log"), Mode::S_IRWXU).unwrap();
        bundle
    }

    fn command(&self, id: &str) -> Command {
        let mut command = Command::new(PROGRAM);
        command
            .args(["-namespace", "default", "-address"])
            .arg(self.dir.path().join("containerd.sock"))
            .args(["-publish-binary", "/usr/bin/containerd", "-id", id])
            .env_remove("MAX_SHIM_VERSION")
            .env("TTRPC_ADDRESS", self.dir.path().join("containerd.sock.ttrpc"))
            .stdin(Stdio::null());
        command
    }

    fn start(&self, id: &str) -> Command {
        let mut command = self.command(id);
        command.args(["-debug", "start"]).current_dir(self.dir.path().join(id));
        command
    }

    fn delete(&self, id: &str) -> Output {
        let bundle = self.dir.path().join(id);
        let mut command = self.command(id);
        command.arg("-bundle").arg(&bundle).arg("delete").current_dir(bundle);
        command.output().unwrap()
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        for bundle in fs::read_dir(self.dir.path()).unwrap() {
            if let Ok(pid) = fs::read_to_string(bundle.unwrap().path().join("shim.pid")) {
                let _ = kill(Pid::from_raw(pid.parse().unwrap()), Signal::SIGKILL);
            }
        }
    }
}

#[track_caller]
fn good(output: &Output) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && stderr.is_empty(), "{}: {stderr}", output.status);
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[track_caller]
fn bad(output: &Output, part: &str) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(output.stdout.is_empty());
    assert!(stderr.contains(part), "{stderr}");
}

fn socket(address: &str) -> PathBuf {
    address.strip_prefix("unix://").unwrap().into()
}

fn shim_pid(bundle: &Path) -> Pid {
    Pid::from_raw(fs::read_to_string(bundle.join("shim.pid")).unwrap().parse().unwrap())
}

async fn client(address: &str) -> TaskClient {
    let stream = tokio::net::UnixStream::connect(socket(address)).await.unwrap();
    TaskClient::new(Client::new(Socket::from(stream)))
}

fn until(mut so: impl FnMut() -> bool) {
    let began = Instant::now();
    while !so() {
        assert!(began.elapsed() < LIMIT, "it does not come to be");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Gone, or only waiting for its parent, which is not us.
fn has_ended(pid: Pid) -> bool {
    fs::read(format!("/proc/{pid}/cmdline")).map_or(true, |line| line.is_empty())
}

#[tokio::test(flavor = "multi_thread")]
async fn from_start_to_delete_as_containerd_1_6_does_it() {
    let containerd = Containerd::new();
    let bundle = containerd.bundle("c1", "null");
    let began = Instant::now();
    let address = good(&containerd.start("c1").output().unwrap());
    assert!(began.elapsed() < LIMIT);
    assert!(address.starts_with("unix:///run/containerd/s/") && !address.ends_with('\n'));
    assert_eq!(fs::read_to_string(bundle.join("address")).unwrap(), address);
    let pid = shim_pid(&bundle);

    // It holds nothing of ours: a log, the socket, what a runtime needs.
    for fd in fs::read_dir(format!("/proc/{pid}/fd")).unwrap() {
        // It opens and closes others meanwhile.
        let Ok(target) = fs::read_link(fd.unwrap().path()) else { continue };
        assert!(!target.to_string_lossy().starts_with("pipe:"), "{}", target.display());
    }
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let group = stat.rsplit(')').next().unwrap().split_whitespace().nth(2).unwrap().to_owned();
    assert_eq!(group, pid.to_string());

    let task = client(&address).await;
    let call = ConnectRequest { id: "c1".into(), ..Default::default() };
    let connected = task.connect(context::with_duration(LIMIT), &call).await.unwrap();
    assert_eq!(connected.shim_pid.cast_signed(), pid.as_raw());

    // Asked again, it finds the shim that is there.
    assert_eq!(good(&containerd.start("c1").output().unwrap()), address);
    assert_eq!(shim_pid(&bundle), pid);

    task.shutdown(context::with_duration(LIMIT), &ShutdownRequest::new()).await.unwrap();
    until(|| has_ended(pid));
    until(|| !socket(&address).exists());
    for _ in 0..2 {
        let response = DeleteResponse::parse_from_bytes(&containerd.delete("c1").stdout).unwrap();
        assert_eq!(response.exit_status, 137);
        assert!(response.exited_at.seconds > 1_700_000_000);
    }
}

#[test]
fn later_containerds_are_told_what_they_can_understand() {
    for (asked, version) in [("2", 2), ("3", 3), ("4", 3)] {
        let containerd = Containerd::new();
        let bundle = containerd.bundle("c1", "{}");
        let output = containerd.start("c1").env("MAX_SHIM_VERSION", asked).output().unwrap();
        let answer: serde_json::Value = serde_json::from_str(&good(&output)).unwrap();
        assert_eq!(answer["version"], version);
        assert_eq!(answer["protocol"], "ttrpc");
        assert_eq!(answer["address"], fs::read_to_string(bundle.join("address")).unwrap());
    }
}

#[test]
fn containers_of_a_pod_share_a_shim() {
    let containerd = Containerd::new();
    let member = r#"{"io.kubernetes.cri.container-type": "container",
                     "io.kubernetes.cri.sandbox-id": "pod"}"#;
    let bundle = containerd.bundle("c1", member);
    bad(&containerd.start("c1").output().unwrap(), "sandbox pod, whose shim does not serve");
    containerd.bundle("pod", r#"{"io.kubernetes.cri.container-type": "sandbox"}"#);
    let address = good(&containerd.start("pod").output().unwrap());
    assert_eq!(good(&containerd.start("c1").output().unwrap()), address);
    assert_eq!(fs::read_to_string(bundle.join("address")).unwrap(), address);
    assert!(!bundle.join("shim.pid").exists());
    // Cleaning up after one of them leaves the pod alone.
    containerd.delete("c1");
    assert!(std::os::unix::net::UnixStream::connect(socket(&address)).is_ok());
}

#[test]
fn a_killed_shim_is_cleaned_up_after_and_its_socket_taken_over() {
    let containerd = Containerd::new();
    let bundle = containerd.bundle("c1", "{}");
    let address = good(&containerd.start("c1").output().unwrap());
    let first = shim_pid(&bundle);
    kill(first, Signal::SIGKILL).unwrap();
    until(|| has_ended(first));
    assert_eq!(good(&containerd.start("c1").output().unwrap()), address);
    let second = shim_pid(&bundle);
    assert_ne!(first, second);
    kill(second, Signal::SIGKILL).unwrap();
    until(|| has_ended(second));
    assert!(socket(&address).exists());
    let began = Instant::now();
    containerd.delete("c1");
    assert!(began.elapsed() < Duration::from_secs(5));
    assert!(!socket(&address).exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shim_that_still_runs_is_ended_by_delete_and_by_sigterm() {
    let containerd = Containerd::new();
    for ended_by_delete in [true, false] {
        let id = format!("c{ended_by_delete}");
        let bundle = containerd.bundle(&id, "{}");
        let address = good(&containerd.start(&id).output().unwrap());
        let pid = shim_pid(&bundle);
        if ended_by_delete {
            containerd.delete(&id);
        } else {
            // Once it answers, it listens to signals, too.
            let call = ConnectRequest::new();
            client(&address).await.connect(context::with_duration(LIMIT), &call).await.unwrap();
            kill(pid, Signal::SIGTERM).unwrap();
        }
        until(|| has_ended(pid));
        assert!(!socket(&address).exists());
    }
}

#[test]
fn the_log_goes_to_the_bundle_s_fifo() {
    let containerd = Containerd::new();
    let bundle = containerd.bundle("c1", "{}");
    let mut log = fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(bundle.join("log"))
        .unwrap();
    good(&containerd.start("c1").output().unwrap());
    let mut text = String::new();
    until(|| {
        let mut part = [0; 4096];
        if let Ok(read) = log.read(&mut part) {
            text.push_str(&String::from_utf8_lossy(&part[..read]));
        }
        text.contains("serves sandbox c1")
    });
    assert!(text.starts_with("time=\"") && text.contains("level=info msg=\""), "{text}");
}

#[test]
fn runtime_options_are_read_and_broken_ones_refused() {
    let containerd = Containerd::new();
    containerd.bundle("c1", "{}");
    let run = |options: &[u8]| {
        let mut child = containerd
            .start("c1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(options).unwrap();
        child.wait_with_output().unwrap()
    };
    bad(&run(b"\x0a\xff\xff"), "runtime options");
    good(&run(b"\x0a\x19runtimeoptions.v1.Options\x12\x15\x0a\x09type-name\x12\x08ecr.toml"));
}

#[test]
fn mistakes_end_with_a_text_and_start_nothing() {
    let containerd = Containerd::new();
    let bundle = containerd.bundle("c1", "{}");
    fs::create_dir(containerd.dir.path().join("empty")).unwrap();
    bad(&containerd.start("empty").output().unwrap(), "config.json");
    bad(&containerd.start("c1").env("MAX_SHIM_VERSION", "x").output().unwrap(), "MAX_SHIM_VERSION");
    bad(&containerd.command("c1").arg("restart").current_dir(&bundle).output().unwrap(), "restart");
    bad(
        &containerd.command("../c").arg("start").current_dir(&bundle).output().unwrap(),
        "not allowed",
    );
    bad(&containerd.command("c1").current_dir(&bundle).output().unwrap(), "file descriptor 3");
    let version = Command::new(PROGRAM).arg("--version").output().unwrap();
    assert!(
        good(&version)
            .starts_with("containerd-shim-ecr-v2: id: \"io.containerd.ecr.v2\", version: ")
    );
    assert!(!bundle.join("shim.pid").exists() && !bundle.join("address").exists());
}
