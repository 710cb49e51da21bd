// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The start of a sandbox, in order:
//!
//! 1. its configuration and size;
//! 2. what it takes of the host, recorded in [`Hold`] as it is taken;
//! 3. its machine;
//! 4. its agent: it answers, and is told the time, the network and the sandbox;
//! 5. those who watch over it.
//!
//! A failure gives back all that was taken, and says in which phase it came and what the guest said last.

use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context as _;
use async_trait::async_trait;
use ecr_agent_protocol::agent as rpc;
use ecr_agent_protocol::client::AgentClient;
use ecr_vmm::config::{NetConfig, VsockBackend, VsockConfig};
use ecr_vmm::control::{Command, Reply};
use tokio::net::UnixListener;
use tokio::sync::{mpsc, oneshot, watch};

use super::agent::{Agent, AgentAddress, call};
use super::hold::Hold;
use super::machine::{Machine, MachineRequest, vm_config, with_last_output};
use super::paths::Paths;
use super::pod::{BootDisk, Pod, blocking, disk_id, run_hooks};
use super::request::create_sandbox;
use super::{ContainerRequest, Launched, Launcher, Sandbox, monitor};
use crate::config::{
    Config, ContainerType, SharedFs, Sizing, Sources, container_type, requested_by_annotations,
    requested_by_resources,
};
use crate::container::rootfs::BlockRootfs;
use crate::error::{Error, Kind, Result};
use crate::host::cgroup::{self, SandboxCgroups};
use crate::host::hooks::Stage;
use crate::host::management::{self, ManagementState};
use crate::host::netns::{self, PodNetns};
use crate::host::network::{self, Network, NetworkRequest};
use crate::host::share::Share;
use crate::host::virtiofsd::{Virtiofsd, VirtiofsdRequest};
use crate::host::vsock::{self, GuestCid};

/// The guest's context id where nobody but its own VMM sees it.
const PRIVATE_CID: u32 = 3;

/// Bytes of randomness that a guest gets at its start.
const SEED: usize = 512;

/// Starts sandboxes on this host.
#[derive(Debug, Default)]
pub struct HostLauncher;

#[async_trait]
impl Launcher for HostLauncher {
    async fn launch(&self, request: &ContainerRequest) -> Result<Launched> {
        let request = request.clone();
        let (mut answer, answered) = oneshot::channel();
        // A task of its own, so that what was taken is given back even when the caller no longer waits.
        tokio::spawn(async move {
            let launched = start(request, &mut answer).await;
            if let Err(Ok(launched)) = answer.send(launched)
                && let Err(error) = launched.sandbox.stop().await
            {
                log::warn!("end a sandbox that nobody waits for: {error}");
            }
        });
        answered.await.unwrap_or_else(|_| {
            Err(Error::new(Kind::Internal, "the start of the sandbox panicked"))
        })
    }
}

async fn start(
    request: ContainerRequest,
    caller: &mut oneshot::Sender<Result<Launched>>,
) -> Result<Launched> {
    let mut launch = Launch::new(request).await?;
    let booting = match launch.take_from_host().await {
        Ok(()) => launch.start_machine().await,
        Err(error) => Err(error),
    };
    let agent = match booting {
        Ok(()) => tokio::select! {
            agent = launch.meet_agent() => agent,
            () = caller.closed() => Err(Error::new(Kind::DeadlineExceeded, "the caller gave up")),
        },
        Err(error) => Err(error),
    };
    match agent {
        Ok(agent) => launch.conclude(agent).await,
        Err(error) => Err(launch.give_up(error).await),
    }
}

/// A sandbox on its way.
struct Launch {
    request: ContainerRequest,
    config: Config,
    size: Sizing,
    paths: Paths,
    hold: Hold,
    cid: Option<GuestCid>,
    machine: Option<Machine>,
    boot_disk: Option<BootDisk>,
    phase_began: Instant,
}

impl Launch {
    async fn new(request: ContainerRequest) -> Result<Self> {
        let phase_began = Instant::now();
        let (config, size) = configuration(&request).await?;
        let paths = Paths::new(&request.id)?;
        let hold = Hold::new(paths.clone())?;
        let mut launch = Self {
            request,
            config,
            size,
            paths,
            hold,
            cid: None,
            machine: None,
            boot_disk: None,
            phase_began,
        };
        launch.phase_done("configuration");
        Ok(launch)
    }

    /// Say how long the phase that ends here took. `tools/dev bench pod` reads these lines.
    fn phase_done(&mut self, phase: &str) {
        log::info!("phase={phase} ms={}", self.phase_began.elapsed().as_millis());
        self.phase_began = Instant::now();
    }

    /// Everything that the sandbox takes of the host. The parts do not wait for each other.
    async fn take_from_host(&mut self) -> Result<()> {
        let netns = self.find_netns().await;
        self.hold.netns = netns.map_err(|error| error.context("find the pod's network"))?;
        self.hold.record("")?;
        self.run_hooks().await?;
        let cgroups = self.make_cgroups().await;
        self.hold.cgroups = Some(cgroups.map_err(|error| error.context("set up the cgroups"))?);
        self.hold.record("")?;
        let (share, network, cid) =
            tokio::join!(self.share_files(), self.attach_network(), blocking(vsock::allocate));
        // Each is recorded before the first failure ends this.
        let share = share.map(|share| (self.hold.share, self.hold.virtiofsd) = share.unzip());
        let network = network.map(|network| self.hold.network = network);
        let cid = cid.map(|cid| self.cid = cid);
        share.map_err(|error| error.context("share files with the guest"))?;
        network?;
        cid.map_err(|error| error.context("find an address for the guest's vsock"))?;
        let url = self.address().to_string();
        self.hold.record(&url)?;
        self.phase_done("host");
        Ok(())
    }

    async fn find_netns(&self) -> Result<Option<PodNetns>> {
        if self.config.runtime.disable_new_netns {
            return Ok(None);
        }
        let request = self.request.clone();
        blocking(move || netns::for_pod(&request.spec, &request.id)).await.map(Some)
    }

    /// Before the network is looked at: hooks may fill it.
    async fn run_hooks(&self) -> Result<()> {
        let request = self.request.clone();
        let netns = self.hold.netns.as_ref().map(|netns| netns.path.clone());
        let run = move || {
            run_hooks(&request, netns.as_deref(), Stage::Prestart)?;
            run_hooks(&request, netns.as_deref(), Stage::CreateRuntime)
        };
        blocking(run).await.map_err(|error| error.context("run the hooks of the sandbox"))
    }

    /// Made, and entered by this process, before anything that shall live in them.
    async fn make_cgroups(&self) -> Result<SandboxCgroups> {
        let request = self.request.clone();
        let sandbox_cgroup_only = self.config.runtime.sandbox_cgroup_only;
        blocking(move || {
            let linux = request.spec.linux().as_ref();
            let path = linux.and_then(|linux| linux.cgroups_path().as_deref());
            let cgroups = SandboxCgroups::create(&cgroup::Request {
                sandbox_id: &request.id,
                cgroups_path: path.unwrap_or(Path::new("")),
                sandbox_cgroup_only,
            })?;
            match cgroups.add_process(std::process::id()) {
                Ok(()) => Ok(cgroups),
                Err(error) => {
                    cgroups.delete()?;
                    Err(error)
                }
            }
        })
        .await
    }

    async fn attach_network(&self) -> Result<Option<Network>> {
        let Some(netns) = self.hold.netns.clone() else { return Ok(None) };
        let model = self.config.runtime.internetworking_model;
        let queues = u16::try_from(self.size.vcpus).unwrap_or(u16::MAX);
        let vhost = !self.config.hypervisor.disable_vhost_net;
        let attach = move || {
            let netns = &netns.path;
            network::attach(NetworkRequest { netns, model, queues, vhost })
        };
        blocking(attach).await.map(Some)
    }

    async fn share_files(&self) -> Result<Option<(Arc<Share>, Arc<Virtiofsd>)>> {
        let machine = &self.config.hypervisor;
        if machine.shared_fs != SharedFs::VirtioFs {
            return Ok(None);
        }
        let program = machine.virtio_fs_daemon.as_deref().context(
            "cannot enable virtio-fs without daemon path in configuration file (virtio_fs_daemon)",
        )?;
        let id = self.request.id.clone();
        let mounts = self.config.runtime.sandbox_bind_mounts.clone();
        let create = move || {
            let share = Share::create(&id)?;
            match share.add_sandbox_mounts(&mounts) {
                Ok(()) => Ok(Arc::new(share)),
                Err(error) => {
                    if let Err(left) = share.remove() {
                        log::warn!("{left:#}");
                    }
                    Err(error.context("show sandbox_bind_mounts to the guest"))
                }
            }
        };
        let share = blocking(create).await?;
        let virtiofsd = Virtiofsd::start(&VirtiofsdRequest {
            program,
            directory: &share.exported(),
            socket: &self.paths.share_socket(),
            cache: machine.virtio_fs_cache.as_str(),
            extra_args: &machine.virtio_fs_extra_args,
            debug: machine.enable_debug,
            netns: None,
        });
        match virtiofsd {
            Ok(virtiofsd) => Ok(Some((share, Arc::new(virtiofsd)))),
            Err(error) => {
                blocking(move || share.remove()).await?;
                Err(error.into())
            }
        }
    }

    async fn start_machine(&mut self) -> Result<()> {
        let attempted = "start the virtual machine";
        let block = BlockRootfs::find(&self.request.rootfs, &self.config.hypervisor)?;
        if let (Some(block), Some(cgroups)) = (&block, &self.hold.cgroups) {
            cgroups.allow_device(&block.source).context(attempted)?;
        }
        let disk_id = disk_id(&self.request.id);
        let request = MachineRequest {
            config: &self.config,
            id: &self.request.id,
            paths: &self.paths,
            size: self.size,
            vsock: self.vsock(),
            nets: self.nets(),
            disks: block.iter().map(|b| b.disk(&disk_id, &self.config.hypervisor)).collect(),
        };
        let config = vm_config(request).context(attempted)?;
        let started = Machine::start(config, self.paths.qmp_socket());
        let machine = self.machine.insert(started.await.context(attempted)?);
        if let Some(cgroups) = self.hold.cgroups.as_ref().filter(|c| c.wants_threads()) {
            cgroups.add_vcpu_threads(&vcpu_threads(machine).await?).context(attempted)?;
        }
        if block.is_some() {
            let pci_path = root_bus_path(machine, &disk_id).await?;
            let container = self.request.id.clone();
            self.boot_disk = Some(BootDisk { container, pci_path });
        }
        if self.config.hypervisor.enable_debug {
            self.hold.tasks.spawn(monitor::log_console(self.paths.console_socket()));
        }
        self.phase_done("machine");
        Ok(())
    }

    fn nets(&self) -> Vec<NetConfig> {
        let endpoints = self.hold.network.iter().flat_map(|network| &network.endpoints);
        endpoints.enumerate().map(|(n, e)| e.device(format!("network-{n}"))).collect()
    }

    fn vsock(&self) -> VsockConfig {
        match &self.cid {
            Some(GuestCid { device, cid }) => VsockConfig {
                cid: *cid,
                backend: VsockBackend::Vhost { fd: Some(device.as_raw_fd()) },
            },
            None => VsockConfig {
                cid: PRIVATE_CID,
                backend: VsockBackend::Unix { path: self.paths.vsock_socket() },
            },
        }
    }

    fn address(&self) -> AgentAddress {
        match &self.cid {
            Some(GuestCid { cid, .. }) => AgentAddress::Vsock { cid: *cid },
            None => AgentAddress::Hybrid { path: self.paths.vsock_socket() },
        }
    }

    /// Wait until the agent is ready for containers, or the sandbox has died.
    async fn meet_agent(&mut self) -> Result<Agent> {
        let machine = self.machine.clone();
        let virtiofsd = self.hold.virtiofsd.clone();
        let died = async move {
            match &machine {
                Some(machine) => monitor::end(machine, virtiofsd.as_deref()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            how = died => Err(Error::new(Kind::Unavailable, how).context("boot the guest")),
            agent = self.introduce() => agent,
        }
    }

    async fn introduce(&mut self) -> Result<Agent> {
        let patience = Duration::from_secs(self.config.agent.dial_timeout.into());
        let agent = Agent::connect(&self.address(), patience).await;
        let agent = agent.map_err(|error| error.context("boot the guest"))?;
        self.phase_done("guest");
        self.tell(&agent)
            .await
            .map_err(|error| error.context("set up the sandbox in the guest"))?;
        self.phase_done("sandbox");
        Ok(agent)
    }

    /// What the agent has to know before the first container.
    async fn tell(&self, agent: &Agent) -> Result<()> {
        let (time, seed) = tokio::join!(set_time(agent), reseed(agent));
        time.and(seed)?;
        if let Some(network) = &self.hold.network {
            tell_network(agent, network).await?;
        }
        let request = create_sandbox(&self.request.id, &self.request.spec, &self.config);
        call!(agent, "CreateSandbox", create_sandbox, request).map(drop)
    }

    /// The sandbox is there: let it be watched over.
    async fn conclude(mut self, agent: Agent) -> Result<Launched> {
        let Some(machine) = self.machine.take() else {
            let error = Error::new(Kind::Internal, "the agent answers, but there is no machine");
            return Err(self.give_up(error).await);
        };
        let virtiofsd = self.hold.virtiofsd.clone();
        let listener = match UnixListener::bind(self.paths.management_socket()) {
            Ok(listener) => listener,
            Err(error) => {
                let error =
                    Error::new(Kind::Internal, format!("serve the management socket: {error}"));
                self.machine = Some(machine);
                return Err(self.give_up(error).await);
            }
        };
        let management = Arc::new(Management {
            url: self.address().to_string(),
            agent: agent.clone(),
            virtiofsd: virtiofsd.as_ref().map(|virtiofsd| virtiofsd.id()),
            netns: self.hold.netns.as_ref().map(|netns| netns.path.clone()),
        });
        let (events, received) = mpsc::unbounded_channel();
        let (verdict, death) = watch::channel(None);
        let pod = Arc::new(Pod::new(
            self.request.id,
            self.config,
            agent.clone(),
            machine.clone(),
            self.hold,
            self.boot_disk,
            death,
        ));
        let sandbox: Arc<dyn Sandbox> = pod.clone();
        if let Some(hold) = pod.hold().lock().await.as_mut() {
            let this: Weak<dyn Sandbox> = Arc::downgrade(&sandbox);
            hold.tasks.spawn(management::serve(listener, management));
            hold.tasks.spawn(monitor::watch_memory(agent.clone(), events.clone()));
            hold.tasks.spawn(monitor::watch(machine, agent, virtiofsd, events, verdict, this));
        }
        Ok(Launched { sandbox, events: received })
    }

    /// Give everything back; returns `error` with what the guest said last.
    async fn give_up(self, error: Error) -> Error {
        let mut error = error;
        if let Some(machine) = self.machine {
            let text = with_last_output(&error.to_string(), &machine.last_output().await);
            error = Error::new(error.kind(), text);
            if let Err(error) = machine.stop().await {
                log::warn!("{error:#}");
            }
        }
        // What is left is in the log.
        let _ = self.hold.release().await;
        error
    }
}

/// What the management socket tells of a sandbox.
struct Management {
    url: String,
    agent: Agent,
    virtiofsd: Option<u32>,
    netns: Option<PathBuf>,
}

impl ManagementState for Management {
    fn agent_url(&self) -> String {
        self.url.clone()
    }

    fn agent(&self) -> Option<AgentClient> {
        Some(self.agent.client().clone())
    }

    fn virtiofsd(&self) -> Option<u32> {
        self.virtiofsd
    }

    fn netns(&self) -> Option<PathBuf> {
        self.netns.clone()
    }
}

/// The configuration of the sandbox that is made for `request`'s container, and its machine's size.
async fn configuration(request: &ContainerRequest) -> Result<(Config, Sizing)> {
    let annotations = request.spec.annotations().clone().unwrap_or_default();
    let requested = match container_type(&annotations)? {
        ContainerType::Single => {
            let linux = request.spec.linux().as_ref();
            let resources = linux.and_then(|linux| linux.resources().as_ref());
            resources.map(requested_by_resources).unwrap_or_default()
        }
        _ => requested_by_annotations(&annotations),
    };
    let task_option = request.config_path.clone();
    let load = move || {
        let sources = Sources::of_sandbox(&annotations, task_option.as_deref())?;
        Ok(Config::for_sandbox(&sources, &annotations)?)
    };
    let config = blocking(load).await?;
    if config.runtime.enable_debug {
        // Besides containerd's own wish, which the shim was started with.
        log::set_max_level(log::LevelFilter::Debug);
    }
    let size = config.boot_size(requested);
    Ok((config, size))
}

async fn set_time(agent: &Agent) -> Result<()> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let request = rpc::SetGuestDateTimeRequest {
        sec: i64::try_from(now.as_secs()).unwrap_or(i64::MAX),
        usec: now.subsec_micros().into(),
        ..Default::default()
    };
    call!(agent, "SetGuestDateTime", set_guest_date_time, request).map(drop)
}

async fn reseed(agent: &Agent) -> Result<()> {
    let data = blocking(|| {
        let mut data = vec![0; SEED];
        let mut source = std::fs::File::open("/dev/urandom").context("open /dev/urandom")?;
        std::io::Read::read_exact(&mut source, &mut data).context("read /dev/urandom")?;
        Ok(data)
    });
    let request = rpc::ReseedRandomDevRequest { data: data.await?, ..Default::default() };
    call!(agent, "ReseedRandomDev", reseed_random_dev, request).map(drop)
}

async fn tell_network(agent: &Agent, network: &Network) -> Result<()> {
    for interface in network.interfaces() {
        let request =
            rpc::UpdateInterfaceRequest { interface: Some(interface).into(), ..Default::default() };
        call!(agent, "UpdateInterface", update_interface, request)?;
    }
    let routes = rpc::Routes { routes: network.routes(), ..Default::default() };
    if !routes.routes.is_empty() {
        let request =
            rpc::UpdateRoutesRequest { routes: Some(routes).into(), ..Default::default() };
        call!(agent, "UpdateRoutes", update_routes, request)?;
    }
    let neighbors = rpc::ARPNeighbors { arp_neighbors: network.neighbors(), ..Default::default() };
    if !neighbors.arp_neighbors.is_empty() {
        let request =
            rpc::AddARPNeighborsRequest { neighbors: Some(neighbors).into(), ..Default::default() };
        match call!(agent, "AddARPNeighbors", add_arp_neighbors, request) {
            // Older agents cannot, and live without.
            Err(error) if error.kind() == Kind::Unimplemented => log::info!("{error}"),
            answer => drop(answer?),
        }
    }
    Ok(())
}

/// The host's threads that are the machine's vCPUs.
async fn vcpu_threads(machine: &Machine) -> Result<Vec<u32>> {
    match machine.send(Command::QueryCpus).await? {
        Reply::Cpus(cpus) => Ok(cpus.iter().map(|cpu| cpu.thread_id.unsigned_abs()).collect()),
        other => Err(Error::new(Kind::Internal, format!("the machine answered {other:?}"))),
    }
}

/// Where the guest finds the device `id` that was there at boot: its slot on the root bus.
async fn root_bus_path(machine: &Machine, id: &str) -> Result<String> {
    let functions = match machine.send(Command::QueryPci).await? {
        Reply::Pci(functions) => functions,
        other => return Err(Error::new(Kind::Internal, format!("the machine answered {other:?}"))),
    };
    let function = functions.iter().find(|function| function.id == id);
    let function = function
        .ok_or_else(|| Error::new(Kind::Internal, format!("the machine has no device {id}")))?;
    Ok(format!("{:02x}", function.slot))
}
