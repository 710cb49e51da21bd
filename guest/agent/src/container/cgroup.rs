// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! A container's cgroup (Linux, admin-guide/cgroup-v2.rst): making, limits, freezing, killing, removing. The guest has
//! version 2 only.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::resources;
use ecr_agent_protocol::oci::LinuxResources;

const ROOT: &str = "/sys/fs/cgroup";
const POLL: Duration = Duration::from_millis(5);
/// How long the kernel may take to freeze or thaw.
const FREEZE_PATIENCE: Duration = Duration::from_secs(10);
/// How long it may take until ended processes have left.
const REMOVE_PATIENCE: Duration = Duration::from_secs(5);

/// The cgroup of one container. Removed by [`remove`](Self::remove) only.
#[derive(Debug)]
pub struct Cgroup {
    root: PathBuf,
    path: PathBuf,
}

impl Cgroup {
    /// Make the cgroup that the specification names, or one named after the container.
    pub fn create(name: &str, container: &str) -> Result<Self> {
        Self::create_below(Path::new(ROOT), &relative(name, container)?)
    }

    fn create_below(root: &Path, relative: &Path) -> Result<Self> {
        let cgroup = Cgroup { root: root.into(), path: root.join(relative) };
        if cgroup.path.exists() {
            // Left by a container that could not be removed; or in use, which removal tells.
            remove_tree(&cgroup.path)
                .with_context(|| format!("cgroup {} is in use", cgroup.path.display()))?;
        }
        let mut level = root.to_path_buf();
        for name in relative {
            delegate(&level);
            level.push(name);
            match fs::create_dir(&level) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(error).with_context(|| format!("make cgroup {}", level.display()));
                }
                _ => {}
            }
        }
        Ok(cgroup)
    }

    /// A handle, for a process to be born in it.
    pub fn open(&self) -> Result<OwnedFd> {
        Ok(File::open(&self.path)
            .with_context(|| format!("open cgroup {}", self.path.display()))?
            .into())
    }

    /// A handle for another process beside `first`. A container that manages cgroups of its own has moved its processes
    /// further down, since none may be where controllers are handed on ("No Internal Process Constraint").
    pub fn open_for_another(&self, first: i32) -> Result<OwnedFd> {
        if self.read("cgroup.subtree_control").trim().is_empty() {
            return self.open();
        }
        let file = format!("/proc/{first}/cgroup");
        let text = fs::read_to_string(&file).with_context(|| format!("read {file}"))?;
        let below = text.lines().find_map(|line| line.strip_prefix("0::/"));
        let path = self.root.join(below.unwrap_or_default());
        if !path.starts_with(&self.path) {
            bail!("process {first} has left cgroup {}", self.path.display());
        }
        Ok(File::open(&path).with_context(|| format!("open cgroup {}", path.display()))?.into())
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Set limits. What is not said stays as it is.
    pub fn limit(&self, resources: &LinuxResources) -> Result<()> {
        for setting in resources::settings(resources, |file| self.path.join(file).exists())? {
            self.write(&setting.file, &setting.value)?;
        }
        Ok(())
    }

    fn write(&self, file: &str, value: &str) -> Result<()> {
        let path = self.path.join(file);
        fs::write(&path, value).with_context(|| format!("write {value:?} to {}", path.display()))
    }

    /// The content of one of its files; nothing where the kernel has no such file.
    pub fn read(&self, file: &str) -> String {
        fs::read_to_string(self.path.join(file)).unwrap_or_default()
    }

    /// Stop every process, or let them go on, and wait until that is done.
    pub async fn freeze(&self, freeze: bool) -> Result<()> {
        self.write("cgroup.freeze", if freeze { "1" } else { "0" })?;
        let wanted = if freeze { "frozen 1" } else { "frozen 0" };
        let deadline = Instant::now() + FREEZE_PATIENCE;
        while !self.read("cgroup.events").lines().any(|line| line == wanted) {
            if Instant::now() > deadline {
                // Half frozen is no state to stay in.
                let _ = self.write("cgroup.freeze", "0");
                bail!("the container's processes did not stop within {FREEZE_PATIENCE:?}");
            }
            tokio::time::sleep(POLL).await;
        }
        Ok(())
    }

    /// Kill every process.
    pub fn kill(&self) -> Result<()> {
        match fs::write(self.path.join("cgroup.kill"), "1") {
            // Nothing is left to kill.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            outcome => outcome
                .with_context(|| format!("kill the processes of cgroup {}", self.path.display())),
        }
    }

    /// Remove it with all below, when its processes have left; they must have been killed.
    pub async fn remove(&self) -> Result<()> {
        let deadline = Instant::now() + REMOVE_PATIENCE;
        loop {
            match remove_tree(&self.path) {
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                    if Instant::now() > deadline {
                        bail!("cgroup {} still has processes", self.path.display());
                    }
                    tokio::time::sleep(POLL).await;
                }
                outcome => {
                    outcome.with_context(|| format!("remove cgroup {}", self.path.display()))?;
                    break;
                }
            }
        }
        // The pod's own ones, if this was the last container in them.
        let mut level = self.path.as_path();
        while let Some(parent) = level.parent() {
            level = parent;
            if level == self.root || fs::remove_dir(level).is_err() {
                break;
            }
        }
        Ok(())
    }
}

/// Where a specification's `cgroupsPath` is below the root. systemd's way, `slice:prefix:name`, is read as a path.
fn relative(name: &str, container: &str) -> Result<PathBuf> {
    let name = if name.is_empty() { format!("ecr/{container}") } else { name.replace(':', "/") };
    let mut path = PathBuf::new();
    for part in name.split('/').filter(|part| !part.is_empty()) {
        if matches!(part, "." | "..") || part.contains('\n') || part.starts_with("cgroup.") {
            bail!("cgroupsPath {name:?} is no name of a cgroup");
        }
        path.push(part);
    }
    if path.as_os_str().is_empty() || path.starts_with(crate::cgroup::AGENT) {
        bail!("cgroupsPath {name:?} is not for containers");
    }
    Ok(path)
}

/// Offer every controller to the cgroups below `level`. One that cannot be offered is missed when it is to limit.
fn delegate(level: &Path) {
    let read = |file| fs::read_to_string(level.join(file)).unwrap_or_default();
    let (available, offered) = (read("cgroup.controllers"), read("cgroup.subtree_control"));
    for controller in available.split_ascii_whitespace() {
        if offered.split_ascii_whitespace().any(|one| one == controller) {
            continue;
        }
        if let Err(error) =
            fs::write(level.join("cgroup.subtree_control"), format!("+{controller}"))
        {
            log::debug!("offer {controller} below {}: {error}", level.display());
        }
    }
}

/// Remove a cgroup with those below it, which the container may have made.
fn remove_tree(path: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path())?;
        }
    }
    match fs::remove_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        outcome => outcome,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_cgroups() {
        let path = |name| relative(name, "c1").unwrap();
        assert_eq!(path(""), Path::new("ecr/c1"));
        assert_eq!(path("/kubepods/burstable/pod1/c1"), Path::new("kubepods/burstable/pod1/c1"));
        assert_eq!(path("system.slice:cri:c1"), Path::new("system.slice/cri/c1"));
        for name in ["/", "..", "/a/../b", "a/cgroup.kill", "::", "/ecr-agent/x"] {
            assert!(relative(name, "c1").is_err(), "{name}");
        }
    }

    /// A directory stands in for the hierarchy: what counts is what is made and removed.
    #[tokio::test(flavor = "current_thread")]
    async fn made_level_by_level_and_removed_with_all_below() {
        let root = tempfile::tempdir().unwrap();
        let relative = Path::new("pod/container");
        let cgroup = Cgroup::create_below(root.path(), relative).unwrap();
        fs::create_dir_all(cgroup.path().join("made/inside")).unwrap();
        let again = Cgroup::create_below(root.path(), relative).unwrap();
        assert!(!again.path().join("made").exists());
        again.remove().await.unwrap();
        assert!(root.path().exists());
        assert!(!root.path().join("pod").exists(), "parents go with the last one");
    }
}
