// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The mounted cgroup hierarchies (cgroups(7)) and what is done in all of them.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use crate::host::mountinfo;

/// Controllers that make sense for a single thread; the others belong to what a process owns.
const OF_THREADS: [&str; 3] = ["cpu", "cpuacct", "cpuset"];
/// Controllers that are switched on for a sandbox's cgroup in a version 2 hierarchy, where there are.
const WANTED: [&str; 7] = ["cpuset", "cpu", "io", "memory", "hugetlb", "pids", "rdma"];
/// A cgroup is busy for a moment after its last process has left.
const REMOVE_TRIES: u32 = 50;
const REMOVE_PAUSE: Duration = Duration::from_millis(10);
/// Somebody else may remove an empty parent while we make a child of it.
const CREATE_TRIES: u32 = 5;

/// What this host has. With version 1 controllers beside a version 2 hierarchy ("hybrid"), the latter has none and is
/// left alone, as are hierarchies with a name: they are systemd's.
#[derive(Debug, Clone)]
pub(super) enum Hierarchies {
    /// Several, with few controllers each.
    V1(Vec<V1>),
    /// One, with all controllers: where it is mounted.
    V2(PathBuf),
}

/// A version 1 hierarchy.
#[derive(Debug, Clone)]
pub(super) struct V1 {
    controllers: Vec<String>,
    mount: PathBuf,
}

impl V1 {
    fn has(&self, controller: &str) -> bool {
        self.controllers.iter().any(|own| own == controller)
    }
}

impl Hierarchies {
    /// What is mounted.
    pub(super) fn detect() -> Result<Self> {
        Self::of(&mountinfo::read()?)
    }

    fn of(mounts: &[mountinfo::Entry]) -> Result<Self> {
        let v1: Vec<_> = mounts
            .iter()
            .filter(|mount| mount.kind == "cgroup")
            .map(|mount| V1 {
                controllers: mount
                    .options
                    .split(',')
                    .filter(|word| is_controller(word))
                    .map(str::to_owned)
                    .collect(),
                mount: mount.point.clone(),
            })
            .filter(|hierarchy| !hierarchy.controllers.is_empty())
            .collect();
        if !v1.is_empty() {
            return Ok(Self::V1(v1));
        }
        let v2 = mounts.iter().find(|mount| mount.kind == "cgroup2");
        Ok(Self::V2(v2.context("no cgroup hierarchy is mounted on this host")?.point.clone()))
    }

    pub(super) fn is_v2(&self) -> bool {
        matches!(self, Self::V2(_))
    }

    fn mounts(&self) -> Vec<&Path> {
        match self {
            Self::V1(all) => all.iter().map(|one| one.mount.as_path()).collect(),
            Self::V2(mount) => vec![mount],
        }
    }

    /// The directory of cgroup `path` in the hierarchy that has `controller`.
    pub(super) fn directory(&self, controller: &str, path: &Path) -> Option<PathBuf> {
        let mount = match self {
            Self::V1(all) => &all.iter().find(|one| one.has(controller))?.mount,
            Self::V2(mount) => mount,
        };
        Some(below(mount, path))
    }

    /// The topmost of the cgroups that [`Self::create`] has to make for `path`.
    pub(super) fn topmost_missing(&self, path: &Path) -> Option<PathBuf> {
        let missing =
            |mount: &&Path| path.ancestors().take_while(|path| !below(mount, path).exists()).last();
        let topmost =
            self.mounts().iter().filter_map(missing).min_by_key(|path| path.components().count());
        topmost.map(Path::to_owned)
    }

    /// Make the cgroup `path`, ready for processes.
    pub(super) fn create(&self, path: &Path) -> Result<()> {
        for mount in self.mounts() {
            let directory = below(mount, path);
            create_directories(&directory)
                .with_context(|| format!("create cgroup {}", directory.display()))?;
        }
        match self {
            Self::V1(all) => {
                for one in all.iter().filter(|one| one.has("cpuset")) {
                    inherit_cpuset(&one.mount, path)?;
                }
            }
            Self::V2(mount) => enable_controllers(mount, path),
        }
        Ok(())
    }

    /// Move a process, with all its threads, into the cgroup `path`.
    pub(super) fn add_process(&self, path: &Path, pid: u32) -> Result<()> {
        for mount in self.mounts() {
            let directory = below(mount, path);
            write(&directory.join("cgroup.procs"), &pid.to_string()).with_context(|| {
                format!("move process {pid} into cgroup {}", directory.display())
            })?;
        }
        Ok(())
    }

    /// Move one thread into the cgroup `path` of the controllers that know threads. Version 1 only.
    pub(super) fn add_thread(&self, path: &Path, tid: u32) -> Result<()> {
        let Self::V1(all) = self else { return Ok(()) };
        for one in all.iter().filter(|one| OF_THREADS.iter().any(|controller| one.has(controller)))
        {
            let directory = below(&one.mount, path);
            write(&directory.join("tasks"), &tid.to_string()).with_context(|| {
                format!("move thread {tid} into cgroup {}", directory.display())
            })?;
        }
        Ok(())
    }

    /// Remove the cgroup `path` and those above it, up to `topmost`, that nobody else uses. What still runs in it goes to
    /// the nearest cgroup above that stays and takes it.
    pub(super) fn remove(&self, path: &Path, topmost: Option<&Path>) -> Result<()> {
        let mut result = Ok(());
        for mount in self.mounts() {
            // A hierarchy that fails keeps none of the others.
            result = result.and(self.remove_in(mount, path, topmost));
            let Some(topmost) = topmost else { continue };
            for parent in path.ancestors().skip(1).take_while(|parent| parent.starts_with(topmost))
            {
                // In use by somebody else: it stays.
                if fs::remove_dir(below(mount, parent)).is_err() {
                    break;
                }
            }
        }
        result
    }

    fn remove_in(&self, mount: &Path, path: &Path, topmost: Option<&Path>) -> Result<()> {
        let directory = below(mount, path);
        let mut tries = REMOVE_TRIES;
        loop {
            self.evacuate(mount, path, topmost);
            match fs::remove_dir(&directory) {
                Ok(()) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                Err(error) if tries == 0 => {
                    let left = members(&directory, self.members_file());
                    return Err(error).with_context(|| {
                        format!(
                            "remove cgroup {}, in which {left:?} still run",
                            directory.display()
                        )
                    });
                }
                Err(_) => {
                    tries -= 1;
                    thread::sleep(REMOVE_PAUSE);
                }
            }
        }
    }

    /// Threads in version 1, where those of one process may be in several cgroups; processes in version 2.
    fn members_file(&self) -> &'static str {
        if self.is_v2() { "cgroup.procs" } else { "tasks" }
    }

    /// Move whatever is in a cgroup to the nearest one above that takes it: in version 2 a cgroup whose controllers are
    /// on for its children takes no process, the root always does.
    fn evacuate(&self, mount: &Path, path: &Path, topmost: Option<&Path>) {
        let file = self.members_file();
        for member in members(&below(mount, path), file) {
            let moved = path
                .ancestors()
                .skip(1)
                .filter(|above| topmost.is_none_or(|topmost| !above.starts_with(topmost)))
                .any(|above| write(&below(mount, above).join(file), &member).is_ok());
            if !moved {
                log::debug!("{member} stays in cgroup {}: gone, or a zombie", path.display());
            }
        }
    }
}

/// Options of a hierarchy are its controllers, beside a few words of other meaning.
fn is_controller(word: &str) -> bool {
    let other =
        ["rw", "ro", "xattr", "noprefix", "clone_children", "cpuset_v2_mode", "none", "seclabel"];
    !other.contains(&word) && !word.contains('=')
}

/// `path`, absolute in its hierarchy, below the mount.
fn below(mount: &Path, path: &Path) -> PathBuf {
    mount.join(path.strip_prefix("/").unwrap_or(path))
}

fn members(directory: &Path, file: &str) -> Vec<String> {
    let text = fs::read_to_string(directory.join(file)).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

/// A control file takes a value by one write.
pub(super) fn write(path: &Path, value: &str) -> io::Result<()> {
    OpenOptions::new().write(true).open(path)?.write_all(value.as_bytes())
}

fn create_directories(directory: &Path) -> io::Result<()> {
    let mut tries = CREATE_TRIES;
    loop {
        match fs::create_dir_all(directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && tries > 0 => tries -= 1,
            result => return result,
        }
    }
}

/// A version 1 cpuset starts empty, and takes no process then.
fn inherit_cpuset(mount: &Path, path: &Path) -> Result<()> {
    let mut levels: Vec<_> = path.ancestors().collect();
    levels.reverse();
    for pair in levels.windows(2) {
        let (parent, child) = (below(mount, pair[0]), below(mount, pair[1]));
        for file in ["cpuset.cpus", "cpuset.mems"] {
            let what = || format!("set {} from its parent", child.join(file).display());
            let own = fs::read_to_string(child.join(file)).with_context(what)?;
            if own.trim().is_empty() {
                let inherited = fs::read_to_string(parent.join(file)).with_context(what)?;
                ensure!(!inherited.trim().is_empty(), "{}: it is empty", what());
                write(&child.join(file), inherited.trim()).with_context(what)?;
            }
        }
    }
    Ok(())
}

/// Switch controllers on in every cgroup above `path`. One that refuses (it has processes of its own, or a controller is
/// not to be had) is no failure: limits set by the orchestrator are further up and hold all the same.
fn enable_controllers(mount: &Path, path: &Path) {
    let mut above: Vec<_> = path.ancestors().skip(1).collect();
    above.reverse();
    for parent in above {
        let directory = below(mount, parent);
        let words = |file: &str| fs::read_to_string(directory.join(file)).unwrap_or_default();
        let (offered, on) = (words("cgroup.controllers"), words("cgroup.subtree_control"));
        for controller in WANTED {
            let has = |text: &str| text.split_whitespace().any(|word| word == controller);
            if !has(&offered) || has(&on) {
                continue;
            }
            if let Err(error) =
                write(&directory.join("cgroup.subtree_control"), &format!("+{controller}"))
            {
                log::debug!("controller {controller} below {}: {error}", directory.display());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(kind: &str, point: &str, options: &str) -> mountinfo::Entry {
        mountinfo::Entry {
            root: "/".into(),
            point: point.into(),
            kind: kind.into(),
            source: kind.into(),
            options: options.into(),
        }
    }

    #[test]
    fn hierarchies_are_told_apart() {
        let v1 = mount("cgroup", "/sys/fs/cgroup/cpu,cpuacct", "rw,cpu,cpuacct");
        let named = mount("cgroup", "/sys/fs/cgroup/systemd", "rw,xattr,name=systemd");
        let unified = mount("cgroup2", "/sys/fs/cgroup/unified", "rw,nsdelegate");
        let hybrid = [v1, named.clone(), unified];
        match Hierarchies::of(&hybrid).unwrap() {
            Hierarchies::V1(all) => {
                assert_eq!(all.len(), 1);
                assert_eq!(all[0].controllers, ["cpu", "cpuacct"]);
            }
            other => panic!("{other:?}"),
        }
        match Hierarchies::of(&[named, mount("cgroup2", "/sys/fs/cgroup", "rw")]).unwrap() {
            Hierarchies::V2(mount) => assert_eq!(mount, Path::new("/sys/fs/cgroup")),
            other => panic!("{other:?}"),
        }
        assert!(Hierarchies::of(&[mount("tmpfs", "/sys/fs/cgroup", "rw")]).is_err());
    }
}
