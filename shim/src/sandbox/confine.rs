// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The sandbox's cgroups on the host follow its containers: the CPUs and memory nodes that these may use, and the
//! devices behind their disks.

use std::path::Path;

use oci_spec::runtime::{LinuxResources, Spec};
use tokio::sync::Mutex as AsyncMutex;

use super::hold::Hold;
use super::pod::blocking;
use crate::error::Result;
use crate::host::cgroup::SandboxCgroups;

/// Lists as in `linux.resources.cpu`; empty where nothing is said.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Cpuset {
    cpus: String,
    mems: String,
}

impl Cpuset {
    /// What a specification says.
    pub(super) fn of(spec: &Spec) -> Self {
        let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
        let mut cpuset = Self::default();
        if let Some(resources) = resources {
            cpuset.update(resources);
        }
        cpuset
    }

    /// An update changes what it names.
    pub(super) fn update(&mut self, resources: &LinuxResources) {
        let Some(cpu) = resources.cpu() else { return };
        for (own, given) in [(&mut self.cpus, cpu.cpus()), (&mut self.mems, cpu.mems())] {
            if let Some(given) = given.as_ref().filter(|given| !given.is_empty()) {
                own.clone_from(given);
            }
        }
    }
}

/// Let the sandbox run where any of its containers may. A host that refuses is no reason to fail a container: the
/// orchestrator's own limits hold all the same.
pub(super) async fn follow_cpusets(hold: &AsyncMutex<Option<Hold>>, containers: Vec<Cpuset>) {
    let Some(cgroups) = cgroups(hold).await else { return };
    let update = move || {
        cgroups.update_cpuset(containers.iter().map(|c| (c.cpus.as_str(), c.mems.as_str())))
    };
    if let Err(error) = blocking(update).await {
        log::warn!("set the CPUs of the sandbox: {error}");
    }
}

/// Let the sandbox use the device behind a disk, or withhold it again. A file needs no leave.
pub(super) async fn set_device(
    hold: &AsyncMutex<Option<Hold>>,
    node: &Path,
    allowed: bool,
) -> Result<()> {
    let Some(cgroups) = cgroups(hold).await else { return Ok(()) };
    let node = node.to_owned();
    blocking(move || if allowed { cgroups.allow_device(&node) } else { cgroups.deny_device(&node) })
        .await
}

async fn cgroups(hold: &AsyncMutex<Option<Hold>>) -> Option<SandboxCgroups> {
    hold.lock().await.as_ref().and_then(|hold| hold.cgroups.clone())
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci_spec::runtime::{LinuxBuilder, LinuxCpuBuilder, LinuxResourcesBuilder, SpecBuilder};

    #[test]
    fn an_update_changes_what_it_names() {
        let cpu = LinuxCpuBuilder::default().cpus("0-1").mems("0").build().unwrap();
        let resources = LinuxResourcesBuilder::default().cpu(cpu).build().unwrap();
        let linux = LinuxBuilder::default().resources(resources).build().unwrap();
        let mut cpuset = Cpuset::of(&SpecBuilder::default().linux(linux).build().unwrap());
        assert_eq!(cpuset, Cpuset { cpus: "0-1".into(), mems: "0".into() });
        let cpu = LinuxCpuBuilder::default().cpus("3").build().unwrap();
        cpuset.update(&LinuxResourcesBuilder::default().cpu(cpu).build().unwrap());
        cpuset.update(&LinuxResources::default());
        assert_eq!(cpuset, Cpuset { cpus: "3".into(), mems: "0".into() });
    }
}
