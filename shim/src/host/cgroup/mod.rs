// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! A sandbox's cgroups on the host.
//!
//! With `sandbox_cgroup_only` everything of a sandbox is in the *sandbox cgroup*, which lies where the orchestrator wants
//! the pod's. Without it only the vCPU threads are there, and the rest is in an *overhead cgroup* without limits. The
//! latter needs cgroups of threads: version 1 has them; in version 2 a cgroup of threads can have no memory controller
//! (kernel, admin-guide/cgroup-v2, "Threads"), so there the whole process goes into the sandbox cgroup either way.
//!
//! Limits of CPU and memory are those that the orchestrator has set further up. Set here are cpusets, and in version 1 the
//! list of devices.
//!
//! A path of systemd's (`slice:prefix:name`) becomes a scope when systemd runs and the whole process moves; otherwise the
//! cgroup is made directly at the path that systemd would give it, and systemd does not know of it.
//!
//! | module | subject |
//! |---|---|
//! | `path` | where cgroups are |
//! | `hierarchy` | versions 1 and 2 |
//! | `devices`, `cpuset` | what is set in them |
//! | `systemd` | scopes |

mod cpuset;
mod devices;
mod hierarchy;
mod path;
mod systemd;

use std::fs;
use std::path::{Path, PathBuf};
use std::process;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use hierarchy::Hierarchies;
use path::SandboxPath;

/// Cgroups to be made.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// The sandbox.
    pub sandbox_id: &'a str,
    /// `linux.cgroupsPath` of its specification; may be empty.
    pub cgroups_path: &'a Path,
    /// `sandbox_cgroup_only` of the configuration.
    pub sandbox_cgroup_only: bool,
}

/// The cgroups of a sandbox.
#[derive(Debug, Clone)]
pub struct SandboxCgroups {
    hierarchies: Hierarchies,
    record: Record,
}

/// What is needed to remove the cgroups when the process that made them is gone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The sandbox cgroup, in every hierarchy.
    pub sandbox: PathBuf,
    /// The topmost cgroup that was made for it; those between are removed with it when nobody else uses them.
    pub sandbox_made_from: Option<PathBuf>,
    /// The overhead cgroup.
    pub overhead: Option<PathBuf>,
    /// systemd's unit, when it made the sandbox cgroup.
    pub scope: Option<String>,
}

impl SandboxCgroups {
    /// Make the cgroups of a sandbox. Nothing is moved yet, unless systemd makes them: a scope starts with this process.
    /// When this fails, none is left.
    pub fn create(request: &Request<'_>) -> Result<Self> {
        Self::create_in(Hierarchies::detect()?, request, systemd::is_there())
    }

    fn create_in(hierarchies: Hierarchies, request: &Request<'_>, systemd: bool) -> Result<Self> {
        let path = SandboxPath::parse(request.cgroups_path, request.sandbox_id)?;
        let whole = request.sandbox_cgroup_only || hierarchies.is_v2();
        if whole && !request.sandbox_cgroup_only {
            log::warn!(
                "sandbox_cgroup_only=false needs cgroup v1: the whole sandbox goes into its cgroup"
            );
        }
        let record =
            Record { sandbox: path.path(), sandbox_made_from: None, overhead: None, scope: None };
        let mut cgroups = Self { hierarchies, record };
        if let Err(error) = cgroups.fill(&path, request.sandbox_id, whole, systemd) {
            if let Err(error) = cgroups.delete() {
                log::warn!("undo: {error:#}");
            }
            return Err(error.context("create the sandbox's cgroups"));
        }
        Ok(cgroups)
    }

    fn fill(&mut self, path: &SandboxPath, id: &str, whole: bool, systemd: bool) -> Result<()> {
        match path {
            SandboxPath::Systemd(scope) if whole && systemd => {
                systemd::start(scope, process::id())?;
                self.record.scope = Some(scope.unit.clone());
            }
            SandboxPath::Systemd(_) | SandboxPath::Cgroupfs(_) => {
                self.record.sandbox_made_from =
                    self.hierarchies.topmost_missing(&self.record.sandbox);
                self.hierarchies.create(&self.record.sandbox)?;
            }
        }
        if let Some(directory) = self.devices() {
            devices::restrict(&directory)?;
        }
        if !whole {
            let overhead = path::overhead(id);
            self.record.overhead = Some(overhead.clone());
            self.hierarchies.create(&overhead)?;
        }
        Ok(())
    }

    /// Those of a process that is gone.
    pub fn from_record(record: Record) -> Result<Self> {
        Ok(Self { hierarchies: Hierarchies::detect()?, record })
    }

    /// What to keep for [`Self::from_record`].
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// Whether vCPU threads are to be moved one by one.
    pub fn wants_threads(&self) -> bool {
        self.record.overhead.is_some()
    }

    /// Move a process of the sandbox to where it belongs; what it starts then is there as well.
    pub fn add_process(&self, pid: u32) -> Result<()> {
        self.hierarchies
            .add_process(self.record.overhead.as_ref().unwrap_or(&self.record.sandbox), pid)
    }

    /// Move vCPU threads into the sandbox cgroup, unless they are in it with everything else. A thread that has ended is
    /// no error.
    pub fn add_vcpu_threads(&self, tids: &[u32]) -> Result<()> {
        if !self.wants_threads() {
            return Ok(());
        }
        for &tid in tids {
            match self.hierarchies.add_thread(&self.record.sandbox, tid) {
                Err(_) if !Path::new("/proc").join(tid.to_string()).exists() => {}
                result => result?,
            }
        }
        Ok(())
    }

    /// Let the sandbox run on the CPUs and memory nodes that any of its containers may use: pairs of lists, as in
    /// `linux.resources.cpu`. No container that says something: wherever the orchestrator allows.
    pub fn update_cpuset<'a>(
        &self,
        containers: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) -> Result<()> {
        let (cpus, mems): (Vec<_>, Vec<_>) = containers.into_iter().unzip();
        let Some(directory) = self.hierarchies.directory("cpuset", &self.record.sandbox) else {
            return Ok(());
        };
        for (file, lists) in [("cpuset.cpus", cpus), ("cpuset.mems", mems)] {
            let path = directory.join(file);
            let mut value = cpuset::union(lists)?;
            if !path.exists() {
                // Version 2, and the controller is not on here.
                if !value.is_empty() {
                    log::warn!(
                        "{file} {value} is not set: {} has no cpuset controller",
                        directory.display()
                    );
                }
                continue;
            }
            if value.is_empty() && !self.hierarchies.is_v2() {
                let above = directory.parent().unwrap_or(&directory).join(file);
                value = fs::read_to_string(&above).with_context(|| above.display().to_string())?;
            }
            // A newline, because version 2 takes no empty write.
            hierarchy::write(&path, &format!("{}\n", value.trim()))
                .with_context(|| format!("set {} to {value:?}", path.display()))?;
        }
        Ok(())
    }

    /// Let the sandbox use one more device of the host. What is no device needs no leave.
    pub fn allow_device(&self, node: &Path) -> Result<()> {
        self.devices().map_or(Ok(()), |directory| devices::change(&directory, node, true))
    }

    /// Withhold it again.
    pub fn deny_device(&self, node: &Path) -> Result<()> {
        self.devices().map_or(Ok(()), |directory| devices::change(&directory, node, false))
    }

    fn devices(&self) -> Option<PathBuf> {
        match self.hierarchies {
            Hierarchies::V1(_) => self.hierarchies.directory("devices", &self.record.sandbox),
            Hierarchies::V2(_) => None,
        }
    }

    /// Remove the cgroups. What still runs in them, this process for one, goes to a cgroup above. Fine when they are gone.
    pub fn delete(&self) -> Result<()> {
        let mut result = Ok(());
        if let Some(overhead) = &self.record.overhead {
            result = self.hierarchies.remove(overhead, overhead.parent());
        }
        let removed = match &self.record.scope {
            // A scope ends with its last process, and that may be this one.
            Some(unit) => self
                .hierarchies
                .remove(&self.record.sandbox, None)
                .and_then(|()| systemd::stop(unit)),
            None => self
                .hierarchies
                .remove(&self.record.sandbox, self.record.sandbox_made_from.as_deref()),
        };
        result.and(removed).context("delete the sandbox's cgroups")
    }
}

#[cfg(test)]
mod tests;
