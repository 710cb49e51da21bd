// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The agent as a program, in namespaces of its own: what its calls do to mounts, network, files and names. Needs root
//! and says so where it is not; devices and control groups need a guest.

// A helper of a test fails the test, too.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use ecr_agent_protocol::agent::{self as msg, Storage};
use ecr_agent_protocol::client::AgentClient;
use ecr_agent_protocol::types::{ARPNeighbor, IPAddress, Interface, Route};
use protobuf::MessageField;
use tokio::net::UnixStream;
use ttrpc::Code;
use ttrpc::context::{Context, with_duration};

const PATIENCE: Duration = Duration::from_secs(20);
/// The link that stands for a guest's, and its hardware address.
const LINK: &str = "guest0";
const MAC: &str = "02:00:00:00:00:07";
const SHM: &str = "/run/kata-containers/sandbox/shm";

/// An agent that lives as long as its test.
struct Agent {
    process: Child,
    client: AgentClient,
    dir: tempfile::TempDir,
}

impl Agent {
    /// None, and the reason on standard error, where it cannot be tested.
    async fn start() -> Option<Self> {
        if !is_root() {
            eprintln!("SKIPPED: namespaces need root");
            return None;
        }
        for tool in ["unshare", "nsenter", "ip"] {
            if tool_is_missing(tool) {
                eprintln!("SKIPPED: there is no {tool}");
                return None;
            }
        }
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("agent.sock");
        let script = format!(
            "mount -t tmpfs tmpfs /run && \
             ip link add {LINK} address {MAC} type veth peer name host0 && \
             ip link set host0 up && \
             exec \"$0\""
        );
        let process = Command::new("unshare")
            .args(["--mount", "--net", "--uts", "--ipc", "sh", "-c", &script])
            .arg(env!("CARGO_BIN_EXE_ecr-agent"))
            .env("KATA_AGENT_SERVER_ADDR", format!("unix://{}", socket.display()))
            .spawn()
            .unwrap();
        let deadline = Instant::now() + PATIENCE;
        let stream = loop {
            match UnixStream::connect(&socket).await {
                Ok(stream) => break stream,
                Err(error) if Instant::now() > deadline => panic!("no agent: {error}"),
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        };
        Some(Agent { process, client: AgentClient::over(stream), dir })
    }

    /// `path` as the agent sees it.
    fn path(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.process.id()))
    }

    /// The line of the mount on `path`, as the agent sees it.
    fn mount(&self, path: &str) -> Option<String> {
        let table = fs::read_to_string(format!("/proc/{}/mountinfo", self.process.id())).unwrap();
        let mut lines = table.lines().filter(|line| line.split(' ').nth(4) == Some(path));
        lines.next_back().map(String::from)
    }

    async fn create_sandbox(&self, request: msg::CreateSandboxRequest) {
        self.client.agent.create_sandbox(soon(), &request).await.unwrap();
    }

    /// Wait for its end.
    fn end(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.process.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "the agent does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn is_root() -> bool {
    fs::metadata("/proc/self").unwrap().uid() == 0
}

fn tool_is_missing(tool: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    !std::env::split_paths(&path).any(|directory| directory.join(tool).exists())
}

fn soon() -> Context {
    with_duration(PATIENCE)
}

fn code(error: ttrpc::Error) -> (Code, String) {
    match error {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message),
        other => panic!("{other}"),
    }
}

fn strings(words: &[&str]) -> Vec<String> {
    words.iter().map(|&word| word.into()).collect()
}

fn shm(options: &[&str]) -> Storage {
    Storage {
        driver: "ephemeral".into(),
        source: "shm".into(),
        fstype: "tmpfs".into(),
        options: strings(options),
        mount_point: SHM.into(),
        ..Default::default()
    }
}

#[tokio::test(flavor = "current_thread")]
async fn a_sandbox_from_its_creation_to_its_end() {
    let Some(mut agent) = Agent::start().await else { return };
    fs::create_dir_all(agent.path("/run/kata-containers/left-over/x")).unwrap();
    agent
        .create_sandbox(msg::CreateSandboxRequest {
            hostname: "pod-of-a-test".into(),
            dns: strings(&["search example.com", "nameserver 10.0.0.1"]),
            storages: vec![shm(&["noexec", "nosuid", "nodev", "mode=1777", "size=1048576"])],
            ..Default::default()
        })
        .await;
    assert!(!agent.path("/run/kata-containers/left-over").exists());
    let mount = agent.mount(SHM).unwrap();
    assert!(mount.contains("noexec") && mount.contains("size=1024k"), "{mount}");
    let resolv =
        fs::read_to_string(agent.path("/run/kata-containers/sandbox/resolv.conf")).unwrap();
    assert_eq!(resolv, "search example.com\nnameserver 10.0.0.1\n");
    for kind in ["ipc", "uts"] {
        assert!(agent.mount(&format!("/run/sandbox-ns/{kind}")).unwrap().contains("nsfs"));
        let kept = fs::metadata(agent.path(&format!("/run/sandbox-ns/{kind}"))).unwrap().ino();
        let own = fs::metadata(format!("/proc/{}/ns/{kind}", agent.process.id())).unwrap().ino();
        assert_ne!(kept, own, "{kind}");
    }

    let again = agent.client.agent.create_sandbox(soon(), &msg::CreateSandboxRequest::new()).await;
    assert!(code(again.unwrap_err()).1.contains("created already"));

    let destroy = msg::DestroySandboxRequest::new();
    agent.client.agent.destroy_sandbox(soon(), &destroy).await.unwrap();
    assert!(agent.end().success());
}

#[tokio::test(flavor = "current_thread")]
async fn a_failed_storage_leaves_nothing_and_can_be_tried_again() {
    let Some(agent) = Agent::start().await else { return };
    let nonsense =
        Storage { driver: "floppy".into(), mount_point: "/run/x".into(), ..Default::default() };
    let request = msg::CreateSandboxRequest {
        storages: vec![
            Storage {
                driver: "overlayfs".into(),
                source: "overlay".into(),
                options: strings(&["lowerdir=/etc:/usr"]),
                mount_point: "/run/kata-containers/overlay".into(),
                ..Default::default()
            },
            nonsense,
        ],
        ..Default::default()
    };
    let error = agent.client.agent.create_sandbox(soon(), &request).await.unwrap_err();
    let (code, message) = code(error);
    assert_eq!(code, Code::INTERNAL);
    assert!(message.contains("floppy") && message.contains("/run/x"), "{message}");
    assert_eq!(agent.mount("/run/kata-containers/overlay"), None);
    agent.create_sandbox(msg::CreateSandboxRequest::new()).await;
}

#[tokio::test(flavor = "current_thread")]
async fn a_tmpfs_changes_its_size() {
    let Some(agent) = Agent::start().await else { return };
    let storages = vec![shm(&["mode=1777", "size=1048576"])];
    agent.create_sandbox(msg::CreateSandboxRequest { storages, ..Default::default() }).await;
    let update = |storage| msg::UpdateEphemeralMountsRequest {
        storages: vec![storage],
        ..Default::default()
    };
    let grown = update(shm(&["remount", "size=8M"]));
    agent.client.agent.update_ephemeral_mounts(soon(), &grown).await.unwrap();
    assert!(agent.mount(SHM).unwrap().contains("size=8192k"));
    for wrong in [
        Storage { driver: "local".into(), ..shm(&["size=8M"]) },
        Storage { mount_point: "/run/other".into(), ..shm(&["size=8M"]) },
    ] {
        assert!(agent.client.agent.update_ephemeral_mounts(soon(), &update(wrong)).await.is_err());
    }
}

fn address(address: &str, mask: &str) -> IPAddress {
    IPAddress { address: address.into(), mask: mask.into(), ..Default::default() }
}

fn route(dest: &str, gateway: &str) -> Route {
    Route {
        dest: dest.into(),
        gateway: gateway.into(),
        device: "eth0".into(),
        ..Default::default()
    }
}

async fn set_up_eth0(agent: &Agent) {
    let interface = Interface {
        name: "eth0".into(),
        hw_addr: MAC.into(),
        mtu: 1400,
        ip_addresses: vec![address("10.9.0.2", "24"), address("fd09::2", "64")],
        ..Default::default()
    };
    let request = msg::UpdateInterfaceRequest {
        interface: MessageField::some(interface.clone()),
        ..Default::default()
    };
    // Twice: what was there before goes.
    for _ in 0..2 {
        let echoed = agent.client.agent.update_interface(soon(), &request).await.unwrap();
        assert_eq!(echoed, interface);
    }
}

#[tokio::test(flavor = "current_thread")]
async fn a_link_is_found_by_its_hardware_address_and_renamed() {
    let Some(agent) = Agent::start().await else { return };
    set_up_eth0(&agent).await;
    let all = agent.client.agent.list_interfaces(soon(), &msg::ListInterfacesRequest::new()).await;
    let all = all.unwrap().interfaces;
    let eth0 = all.iter().find(|link| link.name == "eth0").unwrap();
    assert_eq!((eth0.hw_addr.as_str(), eth0.mtu), (MAC, 1400));
    let addresses: Vec<_> = eth0.ip_addresses.iter().map(|ip| ip.address.as_str()).collect();
    assert!(addresses.contains(&"10.9.0.2") && addresses.contains(&"fd09::2"), "{addresses:?}");
    assert!(!all.iter().any(|link| link.name == LINK));

    let missing = Interface { hw_addr: "02:00:00:00:00:99".into(), ..Default::default() };
    let request = msg::UpdateInterfaceRequest {
        interface: MessageField::some(missing),
        ..Default::default()
    };
    let error = agent.client.agent.update_interface(soon(), &request).await.unwrap_err();
    assert!(code(error).1.contains("02:00:00:00:00:99"));
    let error =
        agent.client.agent.update_interface(soon(), &msg::UpdateInterfaceRequest::new()).await;
    assert_eq!(code(error.unwrap_err()).0, Code::INVALID_ARGUMENT);
}

#[tokio::test(flavor = "current_thread")]
async fn two_links_change_names() {
    let Some(agent) = Agent::start().await else { return };
    // The kernel found another one first: its name is wanted for ours. A link that is up keeps its name.
    let take = |name: &str| {
        let interface = Interface { name: name.into(), hw_addr: MAC.into(), ..Default::default() };
        msg::UpdateInterfaceRequest {
            interface: MessageField::some(interface),
            ..Default::default()
        }
    };
    let error = agent.client.agent.update_interface(soon(), &take("host0")).await.unwrap_err();
    assert!(code(error).1.contains("a link that is up"));
    let down = Command::new("nsenter")
        .args([
            "--net",
            "--target",
            &agent.process.id().to_string(),
            "ip",
            "link",
            "set",
            "host0",
            "down",
        ])
        .status();
    assert!(down.unwrap().success());
    agent.client.agent.update_interface(soon(), &take("host0")).await.unwrap();
    let all = agent.client.agent.list_interfaces(soon(), &msg::ListInterfacesRequest::new()).await;
    let all = all.unwrap().interfaces;
    let of = |name: &str| all.iter().find(|link| link.name == name).unwrap().hw_addr.clone();
    assert_eq!(of("host0"), MAC);
    assert_ne!(of(LINK), MAC);
}

#[tokio::test(flavor = "current_thread")]
async fn routes_are_replaced_and_those_of_the_kernel_stay() {
    let Some(agent) = Agent::start().await else { return };
    set_up_eth0(&agent).await;
    let update = |routes: Vec<Route>| {
        let routes = msg::Routes { routes, ..Default::default() };
        msg::UpdateRoutesRequest { routes: MessageField::some(routes), ..Default::default() }
    };
    // The gateway of the first is behind the second.
    let scoped = Route { scope: 253, ..route("10.20.0.0/24", "") };
    let wanted = vec![route("", "10.20.0.1"), scoped, route("fd20::/64", "fd09::1")];
    for _ in 0..2 {
        agent.client.agent.update_routes(soon(), &update(wanted.clone())).await.unwrap();
    }
    let list = async || {
        let routes = agent.client.agent.list_routes(soon(), &msg::ListRoutesRequest::new()).await;
        let mut routes: Vec<_> =
            routes.unwrap().routes.into_iter().map(|route| (route.dest, route.gateway)).collect();
        routes.sort();
        routes
    };
    let has = |routes: &[(String, String)], dest: &str, gateway: &str| {
        routes.iter().any(|route| route.0 == dest && route.1 == gateway)
    };
    let routes = list().await;
    assert!(has(&routes, "", "10.20.0.1"), "{routes:?}");
    assert!(has(&routes, "10.20.0.0/24", ""), "{routes:?}");
    assert!(has(&routes, "fd20::/64", "fd09::1"), "{routes:?}");
    assert!(has(&routes, "10.9.0.0/24", ""), "{routes:?}");

    agent.client.agent.update_routes(soon(), &update(Vec::new())).await.unwrap();
    let routes = list().await;
    assert!(!has(&routes, "", "10.20.0.1"), "{routes:?}");
    assert!(has(&routes, "10.9.0.0/24", ""), "{routes:?}");

    let unreachable = update(vec![route("", "192.0.2.1")]);
    let error = agent.client.agent.update_routes(soon(), &unreachable).await.unwrap_err();
    assert!(code(error).1.contains("192.0.2.1"));
}

#[tokio::test(flavor = "current_thread")]
async fn a_neighbour_is_known_for_good() {
    let Some(agent) = Agent::start().await else { return };
    set_up_eth0(&agent).await;
    let neighbour = ARPNeighbor {
        to_ip_address: MessageField::some(address("10.9.0.1", "")),
        device: "eth0".into(),
        lladdr: "02:00:00:00:00:08".into(),
        ..Default::default()
    };
    let neighbors = msg::ARPNeighbors { arp_neighbors: vec![neighbour], ..Default::default() };
    let request = msg::AddARPNeighborsRequest {
        neighbors: MessageField::some(neighbors),
        ..Default::default()
    };
    for _ in 0..2 {
        agent.client.agent.add_arp_neighbors(soon(), &request).await.unwrap();
    }
    let arp = fs::read_to_string(format!("/proc/{}/net/arp", agent.process.id())).unwrap();
    assert!(arp.contains("10.9.0.1") && arp.contains("02:00:00:00:00:08"), "{arp}");
}

#[tokio::test(flavor = "current_thread")]
async fn copied_files_stay_below_the_agents_directory() {
    let Some(agent) = Agent::start().await else { return };
    agent.create_sandbox(msg::CreateSandboxRequest::new()).await;
    let request = msg::CopyFileRequest {
        path: "/run/kata-containers/shared/containers/a/file".into(),
        file_size: 5,
        file_mode: 0o604,
        dir_mode: 0o755,
        uid: 1234,
        gid: 5678,
        data: b"hello".to_vec(),
        ..Default::default()
    };
    agent.client.agent.copy_file(soon(), &request).await.unwrap();
    let file = agent.path(&request.path);
    assert_eq!(fs::read_to_string(&file).unwrap(), "hello");
    let metadata = fs::metadata(&file).unwrap();
    assert_eq!((metadata.uid(), metadata.gid(), metadata.mode() & 0o7777), (1234, 5678, 0o604));

    symlink(agent.dir.path(), agent.path("/run/kata-containers/out")).unwrap();
    for path in ["/run/kata-containers/out/file", "/run/kata-containers/../file", "/etc/file"] {
        let wrong = msg::CopyFileRequest { path: path.into(), ..request.clone() };
        assert!(agent.client.agent.copy_file(soon(), &wrong).await.is_err(), "{path}");
    }
    assert!(!agent.dir.path().join("file").exists());
}

#[tokio::test(flavor = "current_thread")]
async fn what_the_guest_tells_of_itself() {
    let Some(agent) = Agent::start().await else { return };
    let request = msg::GuestDetailsRequest {
        mem_block_size: true,
        mem_hotplug_probe: true,
        ..Default::default()
    };
    let details = agent.client.agent.get_guest_details(soon(), &request).await.unwrap();
    assert!(details.agent_details.storage_handlers.contains(&"virtio-fs".to_string()));
    assert!(details.agent_details.device_handlers.contains(&"blk".to_string()));
    assert!(details.agent_details.supports_seccomp);
    let metrics = agent.client.agent.get_metrics(soon(), &msg::GetMetricsRequest::new()).await;
    assert!(metrics.unwrap().metrics.contains("kata_guest_load{item=\"load1\"}"));
    let volume = msg::VolumeStatsRequest { volume_guest_path: "/run".into(), ..Default::default() };
    let stats = agent.client.agent.get_volume_stats(soon(), &volume).await.unwrap();
    assert!(stats.usage[0].total > 0);
    let missing = msg::ReseedRandomDevRequest::new();
    assert!(agent.client.agent.reseed_random_dev(soon(), &missing).await.is_err());
}
