// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The agent in a real guest: what needs its devices, its control groups, or a root that is a guest's. Everything
//! else about the agent is tested beside it (`guest/agent/tests/`).

#![allow(clippy::unwrap_used)] // A failed step is a failed test.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use ecr_agent_protocol::AGENT_PORT;
use ecr_agent_protocol::agent::{self as msg, Storage};
use ecr_agent_protocol::client::{AgentClient, connect_multiplexed};
use ecr_agent_protocol::oci;
use ecr_tests::guest::{Boot, Guest};
use ecr_tests::place::{KERNEL, Place};
use ecr_tests::skip::same_everywhere;
use protobuf::MessageField;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;
use ttrpc::context::{Context, with_duration};

const PATIENCE: Duration = Duration::from_secs(30);
const DEBUG_PORT: u32 = 1026;
const LOG_PORT: u32 = 1025;
const POWERED_OFF: i32 = 0;
/// Where the disk's file system goes, as the runtime does it for a root file system on a disk.
const MOUNT_POINT: &str = "/run/kata-containers/shared/containers/c1";

fn soon() -> Context {
    with_duration(PATIENCE)
}

/// A disk with a root file system on it: a busybox in `rootfs/bin`.
fn disk(directory: &Path) -> Result<PathBuf> {
    let (tree, image) = (directory.join("tree"), directory.join("disk.img"));
    std::fs::create_dir_all(tree.join("rootfs/bin"))?;
    std::fs::create_dir_all(tree.join("rootfs/proc"))?;
    std::fs::copy("/bin/busybox", tree.join("rootfs/bin/busybox"))?;
    let made = Command::new("mkfs.ext4").arg("-qd").arg(&tree).arg(&image).arg("64M").status()?;
    ensure!(made.success(), "mkfs.ext4: {made}");
    Ok(image)
}

/// A guest with that disk, and the way to its agent.
struct Running {
    guest: Guest,
    vsock: PathBuf,
    client: AgentClient,
}

impl Running {
    async fn start(boot: Boot, directory: &Path) -> Result<Self> {
        let (vsock, disk) = (directory.join("vsock.sock"), disk(directory)?);
        let arguments = [
            "--vsock".to_string(),
            format!("cid=3,socket={}", vsock.display()),
            "--disk".to_string(),
            disk.display().to_string(),
        ];
        let options = format!(
            "agent.log=debug agent.log_vport={LOG_PORT} agent.debug_console_vport={DEBUG_PORT}"
        );
        let mut guest =
            boot.with(&arguments.each_ref().map(String::as_str)).cmdline(&options).start()?;
        guest.wait_ready()?;
        let client = AgentClient::connect(&vsock, AGENT_PORT).await?;
        Ok(Running { guest, vsock, client })
    }

    /// What a debug console says to `command`, up to and without the word `END`.
    async fn console(&self, command: &str) -> Result<String> {
        let mut console = connect_multiplexed(&self.vsock, DEBUG_PORT).await?;
        // The terminal echoes what is typed, so the word is not typed as it is said.
        console.write_all(format!("stty -echo; {command}; echo E\"\"ND\n").as_bytes()).await?;
        read_until(&mut console, "END\r\n").await
    }

    async fn create_sandbox(&self, source: &str) -> Result<()> {
        let request = msg::CreateSandboxRequest {
            hostname: "pod".into(),
            dns: vec!["nameserver 10.0.0.1".into()],
            storages: vec![Storage {
                driver: "blk".into(),
                source: source.into(),
                fstype: "ext4".into(),
                mount_point: MOUNT_POINT.into(),
                ..Default::default()
            }],
            ..Default::default()
        };
        self.client.agent.create_sandbox(soon(), &request).await?;
        let volume =
            msg::VolumeStatsRequest { volume_guest_path: MOUNT_POINT.into(), ..Default::default() };
        let stats = self.client.agent.get_volume_stats(soon(), &volume).await?;
        ensure!(stats.usage[0].total > 32 << 20, "{stats:?}");
        Ok(())
    }

    /// Run a script in a container that has the disk as its root: its exit status and output.
    async fn run(&self, script: &str) -> Result<(i32, String)> {
        let id = "c1";
        let agent = &self.client.agent;
        let request = msg::CreateContainerRequest {
            container_id: id.into(),
            exec_id: id.into(),
            oci: MessageField::some(specification(script)),
            ..Default::default()
        };
        agent.create_container(soon(), &request).await?;
        let start = msg::StartContainerRequest { container_id: id.into(), ..Default::default() };
        agent.start_container(soon(), &start).await?;
        let mut output = Vec::new();
        let read = msg::ReadStreamRequest {
            container_id: id.into(),
            exec_id: id.into(),
            len: 4096,
            ..Default::default()
        };
        loop {
            let data = agent.read_stdout(soon(), &read).await?.data;
            if data.is_empty() {
                break;
            }
            output.extend(data);
        }
        let wait = msg::WaitProcessRequest { container_id: id.into(), ..Default::default() };
        let status = agent.wait_process(soon(), &wait).await?.status;
        let remove = msg::RemoveContainerRequest { container_id: id.into(), ..Default::default() };
        agent.remove_container(soon(), &remove).await?;
        Ok((status, String::from_utf8(output)?))
    }

    async fn destroy_sandbox(self) -> Result<()> {
        let request = msg::DestroySandboxRequest::new();
        self.client.agent.destroy_sandbox(soon(), &request).await?;
        let (status, said) = self.guest.wait_end()?;
        ensure!(status == POWERED_OFF, "exit status {status}:\n{said}");
        Ok(())
    }
}

async fn read_until(stream: &mut UnixStream, end: &str) -> Result<String> {
    let mut said = Vec::new();
    let mut piece = [0; 4096];
    loop {
        let length = timeout(PATIENCE, stream.read(&mut piece)).await.with_context(|| {
            format!("{end:?} did not come; seen: {}", String::from_utf8_lossy(&said))
        })??;
        ensure!(length > 0, "the end came before {end:?}: {}", String::from_utf8_lossy(&said));
        said.extend(&piece[..length]);
        let text = String::from_utf8_lossy(&said);
        if let Some(at) = text.find(end) {
            return Ok(text[..at].to_string());
        }
    }
}

fn specification(script: &str) -> oci::Spec {
    let mut spec = oci::Spec::new();
    let process = spec.process.mut_or_insert_default();
    process.args = ["/bin/busybox", "sh", "-c", script].map(String::from).into();
    process.cwd = "/".into();
    process.env = vec!["PATH=/bin".into()];
    process.capabilities.mut_or_insert_default();
    process.user.mut_or_insert_default();
    spec.root.mut_or_insert_default().path = format!("{MOUNT_POINT}/rootfs");
    spec.mounts = vec![oci::Mount {
        destination: "/proc".into(),
        source: "proc".into(),
        type_: "proc".into(),
        ..Default::default()
    }];
    let linux = spec.linux.mut_or_insert_default();
    linux.cgroups_path = "/ecr/c1".into();
    linux.resources.mut_or_insert_default().memory.mut_or_insert_default().limit = 64 << 20;
    linux.namespaces = ["ipc", "uts", "mount"]
        .map(|kind| oci::LinuxNamespace { type_: kind.into(), ..Default::default() })
        .into();
    spec
}

const SCRIPT: &str = "/bin/busybox hostname; /bin/busybox cat /proc/self/cgroup; exit 7";

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

#[test]
#[ignore = "boots a guest"]
fn a_sandbox_on_the_root_image() -> Result<()> {
    let (scratch, place) = (tempfile::tempdir()?, Place::from_environment()?);
    let boot = Boot::kernel(&place, KERNEL).image(&place, "pmem");
    runtime().block_on(async {
        let running = Running::start(boot, scratch.path()).await?;
        let cgroups = running
            .console("cat /sys/fs/cgroup/cgroup.subtree_control /proc/1/cgroup; tty")
            .await?;
        for word in ["cpuset", "cpu", "io", "memory", "pids", "0::/ecr-agent", "/dev/pts/"] {
            ensure!(cgroups.contains(word), "no {word} in {cgroups}");
        }
        let slot = running.console("basename $(dirname $(dirname $(dirname /sys/devices/pci0000:00/*/virtio*/block/vda)))").await?;
        let slot = slot.lines().find_map(|line| line.trim().strip_prefix("0000:00:")?.get(..2));
        let slot = slot.context("the slot of the disk")?.to_string();
        // Nothing is plugged there: the error comes within the limit for devices.
        let error = running.create_sandbox("1f").await.unwrap_err();
        ensure!(format!("{error:#}").contains("1f did not show up"), "{error:#}");
        running.create_sandbox(&slot).await?;
        let resolv = running.console("cat /etc/resolv.conf").await?;
        ensure!(resolv.contains("nameserver 10.0.0.1"), "{resolv}");
        let (status, output) = running.run(SCRIPT).await?;
        ensure!(status == 7 && output.starts_with("pod\n"), "{status} {output}");

        let mut log = connect_multiplexed(&running.vsock, LOG_PORT).await?;
        let log = read_until(&mut log, "us of CPU time until then").await?;
        println!("agent: {} us of CPU time until ready", log.rsplit(' ').nth(1).unwrap_or("?"));
        running.destroy_sandbox().await
    })
}

/// A guest without any other root: a container gets its own all the same.
#[test]
#[ignore = "boots a guest"]
fn a_sandbox_on_the_initial_ram_disk() -> Result<()> {
    same_everywhere();
    let (scratch, place) = (tempfile::tempdir()?, Place::from_environment()?);
    let boot = Boot::kernel(&place, KERNEL).initrd(&place, "initrd.img");
    runtime().block_on(async {
        let running = Running::start(boot, scratch.path()).await?;
        running.create_sandbox("/dev/vda").await?;
        let (status, output) = running.run(SCRIPT).await?;
        ensure!(status == 7 && output.starts_with("pod\n"), "{status} {output}");
        let mut console = connect_multiplexed(&running.vsock, DEBUG_PORT).await?;
        read_until(&mut console, "no shell").await?;
        running.destroy_sandbox().await
    })
}
