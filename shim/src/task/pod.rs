// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What this shim serves: one sandbox, and the containers in it.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;
use std::fs;
use std::process;
use std::sync::Arc;
use std::time::Duration;

use containerd_shim_protos::protobuf::MessageDyn;
use containerd_shim_protos::{events::task::TaskOOM, topics};
use parking_lot::Mutex;
use tokio::sync::{self, mpsc, watch};
use tokio::time::timeout;

use super::callers::Callers;
use super::container::Container;
use super::events::Publisher;
use crate::error::{Error, Kind, Result};
use crate::sandbox::{Launched, Launcher, Sandbox, SandboxEvent};

/// How long a sandbox may take to stop.
const STOP: Duration = Duration::from_secs(60);

/// How long the word of a sandbox's death may be on its way, once the sandbox does not answer.
const VERDICT: Duration = Duration::from_secs(3);

/// How long the end may be put off by containers that are being created, or undone.
const UNDO: Duration = Duration::from_secs(60);

/// One sandbox and its containers.
pub struct Pod {
    /// containerd's namespace.
    pub namespace: String,
    /// The sandbox's id.
    pub id: String,
    /// Who is connected.
    pub callers: Callers,
    pub(super) launcher: Arc<dyn Launcher>,
    events: Publisher,
    containers: Mutex<HashMap<String, Slot>>,
    /// Told whenever `containers` changed.
    changed: watch::Sender<()>,
    vm: Mutex<Vm>,
    /// Why the sandbox died.
    died: watch::Sender<Option<Arc<str>>>,
    /// Held by who stops the sandbox.
    stopping: sync::Mutex<()>,
    terminating: watch::Sender<bool>,
    finished: watch::Sender<bool>,
}

enum Slot {
    /// Being created, or undone again.
    Reserved,
    Filled(Arc<Container>),
}

enum Vm {
    /// Not started, or started in vain.
    Absent,
    Launching,
    Running(Arc<dyn Sandbox>),
    Stopping,
    Stopped,
}

impl fmt::Debug for Pod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pod").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Pod {
    /// A pod without a sandbox yet.
    pub fn new(
        namespace: &str,
        id: &str,
        launcher: Arc<dyn Launcher>,
        events: Publisher,
    ) -> Arc<Self> {
        Arc::new(Self {
            namespace: namespace.to_owned(),
            id: id.to_owned(),
            callers: Callers::default(),
            launcher,
            events,
            containers: Mutex::default(),
            changed: watch::Sender::new(()),
            vm: Mutex::new(Vm::Absent),
            died: watch::Sender::new(None),
            stopping: sync::Mutex::default(),
            terminating: watch::Sender::new(false),
            finished: watch::Sender::new(false),
        })
    }

    /// What containerd takes for the pid of every process: that of the VM, which is ours.
    pub fn pid(&self) -> u32 {
        process::id()
    }

    /// Tell containerd.
    pub(super) fn publish(&self, topic: &str, event: &dyn MessageDyn) {
        self.events.publish(topic, event);
    }

    // --- containers ---

    /// A container that has been created.
    pub fn container(&self, id: &str) -> Result<Arc<Container>> {
        match self.containers.lock().get(id) {
            Some(Slot::Filled(container)) => Ok(container.clone()),
            Some(Slot::Reserved) => Err(Error::new(
                Kind::NotFound,
                format!("container {id} not found: it is still being created"),
            )),
            None => Err(Error::new(Kind::NotFound, format!("container {id} not found"))),
        }
    }

    /// Keep others from creating a container of this name.
    pub(super) fn reserve(&self, id: &str) -> Result<()> {
        match self.containers.lock().entry(id.to_owned()) {
            Entry::Occupied(_) => {
                Err(Error::new(Kind::AlreadyExists, format!("container {id} already exists")))
            }
            Entry::Vacant(vacant) => {
                vacant.insert(Slot::Reserved);
                Ok(())
            }
        }
    }

    /// It has been created.
    pub(super) fn add(&self, container: Container) {
        self.containers.lock().insert(container.id.clone(), Slot::Filled(Arc::new(container)));
        self.changed.send_replace(());
    }

    /// It is gone, or never came to be.
    pub(super) fn remove(&self, id: &str) {
        self.containers.lock().remove(id);
        self.changed.send_replace(());
    }

    // --- the sandbox ---

    /// The running sandbox.
    pub(super) fn sandbox(&self) -> Result<Arc<dyn Sandbox>> {
        if let Some(reason) = self.death() {
            return Err(Error::new(
                Kind::Unavailable,
                format!("sandbox {} has died: {reason}", self.id),
            ));
        }
        match &*self.vm.lock() {
            Vm::Running(sandbox) => Ok(sandbox.clone()),
            Vm::Absent | Vm::Launching => Err(Error::new(
                Kind::FailedPrecondition,
                "BUG: Cannot start the container, since the sandbox hasn't been created",
            )),
            Vm::Stopping | Vm::Stopped => {
                Err(Error::new(Kind::FailedPrecondition, format!("sandbox {} is stopped", self.id)))
            }
        }
    }

    /// Only one may launch, once.
    pub(super) fn begin_launch(&self) -> Result<()> {
        let mut vm = self.vm.lock();
        match *vm {
            Vm::Absent => {
                *vm = Vm::Launching;
                Ok(())
            }
            Vm::Launching | Vm::Running(_) | Vm::Stopping | Vm::Stopped => Err(Error::new(
                Kind::FailedPrecondition,
                format!("cannot create another sandbox in sandbox: {}", self.id),
            )),
        }
    }

    /// The sandbox is there.
    pub(super) fn launched(self: &Arc<Self>, launched: Launched) -> Arc<dyn Sandbox> {
        *self.vm.lock() = Vm::Running(launched.sandbox.clone());
        tokio::spawn(follow(self.clone(), launched.sandbox.clone(), launched.events));
        launched.sandbox
    }

    /// The launch was in vain, and what it made is gone.
    pub(super) fn not_launched(&self) {
        *self.vm.lock() = Vm::Absent;
        self.died.send_replace(None);
    }

    /// Why the sandbox died, if it did.
    pub(super) fn death(&self) -> Option<Arc<str>> {
        self.died.borrow().clone()
    }

    /// Wait until the sandbox has died.
    pub(super) async fn died(&self) -> Arc<str> {
        let mut died = self.died.subscribe();
        let reason = died.wait_for(Option::is_some).await.ok().and_then(|reason| reason.clone());
        // The sender is ours.
        reason.unwrap_or_default()
    }

    /// The sandbox does not answer: let it be known whether it has died before anybody acts on that.
    pub(super) async fn hear_of_death(&self) {
        // One that is being stopped does not answer either.
        if matches!(&*self.vm.lock(), Vm::Running(_)) {
            let _ = timeout(VERDICT, self.died()).await;
        }
    }

    /// An error of a sandbox that has died says why.
    pub(super) fn explain(&self, error: Error) -> Error {
        match self.death() {
            Some(reason) if !error.to_string().contains(&*reason) => Error::new(
                Kind::Unavailable,
                format!("{error}: sandbox {} has died: {reason}", self.id),
            ),
            _ => error,
        }
    }

    /// Stop the sandbox, with all that runs in it. Goes on even if the caller does not wait. Who calls while it is being
    /// stopped waits until it is.
    pub(super) async fn stop_sandbox(self: &Arc<Self>) {
        let pod = self.clone();
        // A task that panicked has said so.
        let _ = tokio::spawn(async move { pod.stop_now().await }).await;
    }

    async fn stop_now(&self) {
        let _one = self.stopping.lock().await;
        let sandbox = {
            let mut vm = self.vm.lock();
            let Vm::Running(sandbox) = &*vm else { return };
            let sandbox = sandbox.clone();
            // From now on, nobody is to ask it anything.
            *vm = Vm::Stopping;
            sandbox
        };
        match timeout(STOP, sandbox.stop()).await {
            Ok(Ok(())) => log::info!("sandbox {} is stopped", self.id),
            Ok(Err(error)) => log::error!("stop sandbox {}: {error}", self.id),
            Err(_) => log::error!("stop sandbox {}: not done within {STOP:?}", self.id),
        }
        *self.vm.lock() = Vm::Stopped;
    }

    // --- the end ---

    /// End this shim if nothing is left to serve.
    pub(super) async fn shutdown(self: &Arc<Self>) {
        let pod = self.clone();
        let end = async move {
            if pod.settled().await && pod.containers.lock().is_empty() {
                pod.stop_sandbox().await;
                log::info!("sandbox {} is shut down", pod.id);
                pod.finished.send_replace(true);
            }
        };
        // A task that panicked has said so.
        let _ = tokio::spawn(end).await;
    }

    /// Wait until no container is being created or undone; false if that takes too long.
    async fn settled(&self) -> bool {
        let mut changed = self.changed.subscribe();
        let settled = changed.wait_for(|()| {
            let containers = self.containers.lock();
            let mut slots = containers.values();
            slots.all(|slot| matches!(slot, Slot::Filled(_)))
        });
        matches!(timeout(UNDO, settled).await, Ok(Ok(_)))
    }

    /// End this shim with all that runs in it.
    pub async fn terminate(self: &Arc<Self>) {
        self.terminating.send_replace(true);
        self.settled().await;
        self.stop_sandbox().await;
        self.finished.send_replace(true);
    }

    /// Wait until this shim is to end, whatever is in it.
    pub(super) async fn terminating(&self) {
        // The sender is ours.
        let _ = self.terminating.subscribe().wait_for(|&terminating| terminating).await;
    }

    /// Wait until this shim is to end.
    pub async fn finished(&self) {
        // The sender is ours.
        let _ = self.finished.subscribe().wait_for(|&finished| finished).await;
    }
}

/// Act on what happens in the sandbox on its own.
async fn follow(
    pod: Arc<Pod>,
    sandbox: Arc<dyn Sandbox>,
    mut events: mpsc::UnboundedReceiver<SandboxEvent>,
) {
    while let Some(event) = events.recv().await {
        match event {
            SandboxEvent::OutOfMemory(id) => out_of_memory(&pod, id),
            SandboxEvent::Died(reason) => {
                // What has been stopped, or undone, may be dead.
                if !matches!(&*pod.vm.lock(), Vm::Running(ours) if Arc::ptr_eq(ours, &sandbox)) {
                    continue;
                }
                log::error!("sandbox {} has died: {reason}", pod.id);
                pod.died.send_replace(Some(reason.into()));
                // What the sandbox took of the host is given back.
                pod.stop_sandbox().await;
            }
        }
    }
}

fn out_of_memory(pod: &Pod, id: String) {
    log::warn!("out of memory in container {id}");
    if let Ok(container) = pod.container(&id)
        && container.is_crio_s
        && let Err(error) = fs::write(container.bundle.join("oom"), "")
    {
        log::warn!("write {}/oom: {error}", container.bundle.display());
    }
    let event = TaskOOM { container_id: id, ..Default::default() };
    pod.publish(topics::TASK_OOM_EVENT_TOPIC, &event);
}
