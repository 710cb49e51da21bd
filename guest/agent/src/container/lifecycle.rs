// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The life of a container: made, started, paused and resumed, removed.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context;
use ecr_agent_protocol::agent::{CreateContainerRequest, StatsContainerResponse};
use ecr_agent_protocol::oci::{LinuxResources, Spec};
use protobuf::MessageField;

use super::cgroup::Cgroup;
use super::hooks::{self, Moment};
use super::process::Process;
use super::registry::Registry;
use super::wire::Order;
use super::{Container, Containers, Error, Result, bundle, stats};
use crate::sandbox::Sandbox;
use crate::{device, storage};

/// How long the processes of a container may take to end after they were killed, if the runtime does not say.
const END_PATIENCE: Duration = Duration::from_secs(30);

/// What a container that is being made has left in the guest so far; dropped, it is taken back.
#[derive(Debug, Default)]
struct Leftovers {
    bundle: Option<PathBuf>,
    cgroup: Option<Cgroup>,
}

impl Leftovers {
    async fn take_back(self) {
        if let Some(cgroup) = self.cgroup {
            let outcome = match cgroup.kill() {
                Ok(()) => cgroup.remove().await,
                error => error,
            };
            report(outcome);
        }
        if let Some(bundle) = self.bundle {
            report(bundle::remove(&bundle));
        }
    }
}

/// The error that has led here is the one that counts.
fn report(outcome: anyhow::Result<()>) {
    if let Err(error) = outcome {
        log::warn!("{error:#}");
    }
}

/// Make a container whose first process waits for [`start`]. A failure leaves nothing behind.
pub async fn create(sandbox: &Arc<Sandbox>, mut request: CreateContainerRequest) -> Result<()> {
    let id = request.container_id.clone();
    bundle::check_id(&id).map_err(|error| Error::Invalid(error.to_string()))?;
    let reservation = sandbox
        .containers
        .registry
        .reserve(&id)
        .ok_or_else(|| Error::Exists(format!("container {id}")))?;
    let Some(mut spec) = request.oci.take() else {
        return Err(Error::Invalid(format!("container {id} comes without specification")));
    };
    if spec.process.is_none() {
        return Err(Error::Invalid(format!("container {id} comes without process")));
    }
    device::devices_into_spec(sandbox, &request.devices, &mut spec)
        .await
        .context("prepare the devices")?;
    let storages = storage::add_storages(sandbox, &request.storages, &id)
        .await
        .context("prepare the storages")?;
    let container = match make(sandbox, &request, spec, &storages).await {
        Ok(container) => Arc::new(container),
        Err(error) => {
            report(storage::remove_storages(sandbox, &storages).await);
            return Err(error.into());
        }
    };
    reservation.fill(Arc::clone(&container));
    if let Err(error) = hooks::run(sandbox, &container, Moment::Prestart).await {
        if let Err(error) = remove(sandbox, &id, None).await {
            log::warn!("{error}");
        }
        return Err(error.into());
    }
    Ok(())
}

async fn make(
    sandbox: &Arc<Sandbox>,
    request: &CreateContainerRequest,
    mut spec: Spec,
    storages: &[String],
) -> anyhow::Result<Container> {
    let id = &request.container_id;
    let directory = bundle::directory(id);
    let mut leftovers = Leftovers::default();
    let made = async {
        let shared_pid = request.sandbox_pidns.then(|| sandbox.containers.shared_pid()).flatten();
        let namespaces = sandbox.namespaces.read().clone();
        bundle::amend_namespaces(&mut spec, &namespaces, shared_pid);
        leftovers.bundle = Some(directory.clone());
        let spec = make_bundle(directory.clone(), spec).await?;
        let linux = spec.linux.get_or_default();
        let cgroup = leftovers.cgroup.insert(Cgroup::create(&linux.cgroups_path, id)?);
        if let Some(resources) = linux.resources.as_ref() {
            cgroup.limit(resources)?;
        }
        let size = sandbox.containers.pipe_size.load(Ordering::Relaxed);
        let first = Process::launch(&sandbox.reaper, Order::Create, &spec, cgroup, size).await?;
        anyhow::Ok((first, spec))
    };
    let (first, mut spec) = match made.await {
        Ok(made) => made,
        Err(error) => {
            leftovers.take_back().await;
            return Err(error);
        }
    };
    let cgroup = leftovers.cgroup.take().context("a container has a cgroup")?;
    // The sandbox's own container comes first and does not know yet that others will share its namespace.
    sandbox.containers.first.lock().get_or_insert_with(|| first.ended.clone());
    follow(sandbox, id, &first);
    Ok(Container {
        id: id.clone(),
        exec_id: request.exec_id.clone(),
        cgroup,
        bundle: directory,
        storages: storages.to_vec(),
        annotations: spec.annotations,
        seccomp: spec.linux.take().and_then(|mut linux| linux.seccomp.take()),
        first: Arc::new(first),
        execs: Registry::default(),
        changing: tokio::sync::Mutex::default(),
        paused: AtomicBool::new(false),
        killed: AtomicBool::new(false),
        oom_watch: parking_lot::Mutex::default(),
    })
}

/// The root may lie on the host's share, which may be slow, or gone.
async fn make_bundle(directory: PathBuf, mut spec: Spec) -> anyhow::Result<Spec> {
    let make = move || bundle::make(&directory, &mut spec).map(|()| spec);
    tokio::task::spawn_blocking(make).await.context("make the bundle")?
}

/// With the first process the container ends. In a PID namespace of its own the kernel sees to that.
fn follow(sandbox: &Arc<Sandbox>, id: &str, first: &Process) {
    let (sandbox, id, ended) = (Arc::downgrade(sandbox), id.to_string(), first.ended.clone());
    tokio::spawn(async move {
        ended.wait().await;
        if let Some(sandbox) = sandbox.upgrade()
            && let Ok(container) = sandbox.containers.get(&id)
            && container.first.ended.pid() == ended.pid()
        {
            report(container.kill());
        }
    });
}

/// Let the first process of a container execute its program.
pub async fn start(sandbox: &Arc<Sandbox>, id: &str) -> Result<()> {
    let container = sandbox.containers.get(id)?;
    sandbox.containers.start_first(&container).await?;
    report(hooks::run(sandbox, &container, Moment::Poststart).await);
    Ok(())
}

impl Containers {
    /// The PID namespace that containers share. The first container's is it, and when that has gone, the next one's.
    fn shared_pid(&self) -> Option<String> {
        let mut first = self.first.lock();
        if first.as_ref().is_some_and(|first| first.status().is_some()) {
            *first = None;
        }
        first.as_ref().map(|first| format!("/proc/{}/ns/pid", first.pid()))
    }

    async fn start_first(&self, container: &Container) -> Result<()> {
        let id = &container.id;
        let _changing = container.changing.lock().await;
        let Some(waiting) = container.first.waiting.lock().await.take() else {
            return Err(Error::State(format!("container {id} was started already")));
        };
        match self.oom.watch(id, container.cgroup.path()) {
            Ok(watch) => *container.oom_watch.lock() = watch,
            Err(error) => log::warn!("container {id}: {error:#}"),
        }
        if let Err(error) = waiting.start().await {
            report(container.kill());
            return Err(error.into());
        }
        Ok(())
    }

    /// Stop all processes of a container, until [`resume`](Self::resume).
    pub async fn pause(&self, id: &str) -> Result<()> {
        self.freeze(id, true).await
    }

    pub async fn resume(&self, id: &str) -> Result<()> {
        self.freeze(id, false).await
    }

    async fn freeze(&self, id: &str, freeze: bool) -> Result<()> {
        let container = self.get(id)?;
        let _changing = container.changing.lock().await;
        if !container.first.is_alive() {
            return Err(Error::State(format!("container {id} is not running")));
        }
        if container.paused.load(Ordering::Relaxed) == freeze {
            let state = if freeze { "paused already" } else { "not paused" };
            return Err(Error::State(format!("container {id} is {state}")));
        }
        container.cgroup.freeze(freeze).await?;
        container.paused.store(freeze, Ordering::Relaxed);
        Ok(())
    }

    /// Change the limits of a container.
    pub async fn update(&self, id: &str, resources: &LinuxResources) -> Result<()> {
        let container = self.get(id)?;
        let _changing = container.changing.lock().await;
        Ok(container.cgroup.limit(resources)?)
    }

    /// What a container has used.
    pub fn stats(&self, id: &str) -> Result<StatsContainerResponse> {
        let container = self.get(id)?;
        Ok(StatsContainerResponse {
            cgroup_stats: MessageField::some(stats::of(&container.cgroup)),
            network_stats: stats::network(),
            ..Default::default()
        })
    }
}

/// Kill what is left of a container and remove it. `patience` is how long its processes may take to end; only if they
/// take longer is the container still there after an error.
pub async fn remove(sandbox: &Arc<Sandbox>, id: &str, patience: Option<Duration>) -> Result<()> {
    let container = sandbox.containers.get(id)?;
    let patience = patience.unwrap_or(END_PATIENCE);
    let ended = async {
        let _changing = container.changing.lock().await;
        // It is of no use to start it any more.
        container.first.waiting.lock().await.take();
        container.kill()?;
        container.first.ended.signal(libc::SIGKILL);
        container.first.ended.wait().await;
        anyhow::Ok(())
    };
    tokio::time::timeout(patience, ended).await.map_err(|_| {
        Error::Timeout(format!("container {id} has not ended within {} s", patience.as_secs()))
    })??;
    if let Some(watch) = container.oom_watch.lock().take() {
        watch.abort();
    }
    // Whatever fails, the rest is removed all the same, and the first error is told.
    let outcomes = [
        container.cgroup.remove().await,
        bundle::remove(&container.bundle),
        storage::remove_storages(sandbox, &container.storages).await,
    ];
    sandbox.containers.registry.remove(id, &container);
    report(hooks::run(sandbox, &container, Moment::Poststop).await);
    for outcome in outcomes {
        outcome.with_context(|| format!("remove container {id}"))?;
    }
    Ok(())
}

/// Remove all containers, and tell those who wait for events that there will be none.
pub async fn remove_all(sandbox: &Arc<Sandbox>) {
    sandbox.containers.oom.close();
    for id in sandbox.containers.ids() {
        match remove(sandbox, &id, None).await {
            // Somebody else was quicker.
            Ok(()) | Err(Error::UnknownContainer(_)) => {}
            Err(error) => log::warn!("{error}"),
        }
    }
}
