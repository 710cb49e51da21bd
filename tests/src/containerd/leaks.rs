// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What a host holds that a sandbox may leave behind: two looks at it, and what the second has more than the first.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use super::config::Paths;

/// What ends by itself after its container has: sockets that linger, processes not reaped yet.
const PATIENCE: Duration = Duration::from_secs(20);
/// Descriptors that containerd may have more: connections of its own that come and go.
const SLACK: usize = 4;

/// Directories in which sandboxes have something as long as they live: Kata's, containerd's, and the system's.
const DIRECTORIES: &[&str] = &[
    "/run/kata-containers/shared/sandboxes",
    "/run/vc/sbs",
    "/run/vc/vm",
    "/run/ecr",
    "/run/containerd/s",
    "/run/containerd/fifo",
    "/run/netns",
    "/var/run/netns",
    "/dev/shm",
];

/// Groups that are made once, for all that will come to be in them.
const LASTING_GROUPS: &[&str] = &["default", "k8s.io", "ecr-tests", "kata_overhead"];

/// Made once, for all that will come to be in it: network namespaces have names below it, as ip-netns(8) does it.
const LASTING_MOUNT: &str = "/run/netns";

/// What was found, one line for each thing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Holdings {
    things: BTreeSet<String>,
    descriptors: usize,
}

impl Holdings {
    /// What the host holds now, of all that a containerd with these paths and this process id may have caused.
    ///
    /// # Errors
    /// The system does not say.
    pub fn now(paths: &Paths, containerd: u32) -> Result<Self> {
        let mut things = BTreeSet::new();
        processes(&mut things);
        for line in fs::read_to_string("/proc/self/mountinfo")?.lines() {
            let at = line.split(' ').nth(4).unwrap_or_default();
            if at != LASTING_MOUNT {
                things.insert(format!("mount {at}"));
            }
        }
        for line in output("ip", &["-o", "link", "show"]).lines() {
            let name = line.split(": ").nth(1).unwrap_or_default();
            things.insert(format!("link {name}"));
        }
        for line in output("tc", &["qdisc", "show"]).lines() {
            things.insert(format!("qdisc {line}"));
        }
        for line in output("losetup", &["-n", "-O", "NAME,BACK-FILE"]).lines() {
            things.insert(format!("loop {line}"));
        }
        groups(Path::new("/sys/fs/cgroup"), 4, &mut things);
        let bundles = paths.state.join("io.containerd.runtime.v2.task");
        let below = ["default", "k8s.io"].map(|namespace| bundles.join(namespace));
        let cni = paths.state.join("io.containerd.grpc.v1.cri/netns");
        let directories = DIRECTORIES.iter().map(|path| Path::new(*path).to_owned());
        for directory in directories.chain(below).chain([cni]) {
            for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
                things.insert(format!("file {}", entry.path().display()));
            }
        }
        let descriptors = fs::read_dir(format!("/proc/{containerd}/fd"))?.count();
        Ok(Self { things, descriptors })
    }

    /// Waits until the host holds no more than this.
    ///
    /// # Errors
    /// It still does after a while; the error lists what.
    pub fn wait_for_no_more(&self, paths: &Paths, containerd: u32) -> Result<()> {
        let until = Instant::now() + PATIENCE;
        loop {
            let now = Self::now(paths, containerd)?;
            let left = now.more_than(self);
            if left.is_empty() {
                return Ok(());
            }
            if Instant::now() > until {
                bail!("left behind:\n{left}");
            }
            thread::sleep(Duration::from_millis(100));
        }
    }

    fn more_than(&self, before: &Self) -> String {
        let mut text = String::new();
        for thing in self.things.difference(&before.things) {
            let _ = writeln!(text, "  {thing}");
        }
        if self.descriptors > before.descriptors + SLACK {
            let _ = writeln!(
                text,
                "  containerd's descriptors: {}, before {}",
                self.descriptors, before.descriptors
            );
        }
        text
    }
}

/// The processes that a sandbox may consist of: shims and what they start, and what does not live in the host's own
/// namespaces. Whatever else this machine does is none of our business.
fn processes(things: &mut BTreeSet<String>) {
    let own = |name: &str| fs::read_link(format!("/proc/self/ns/{name}")).ok();
    let (mount, net) = (own("mnt"), own("net"));
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let pid = entry.file_name().to_string_lossy().into_owned();
        if pid.parse::<u32>().is_err() {
            continue;
        }
        let words = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let words = String::from_utf8_lossy(&words).replace('\0', " ");
        let namespace = |name: &str| fs::read_link(entry.path().join("ns").join(name)).ok();
        let elsewhere = |theirs: Option<_>, ours: &Option<_>| theirs.is_some() && theirs != *ours;
        let of_sandbox = words.contains("containerd-shim")
            || words.contains("virtiofsd")
            || elsewhere(namespace("mnt"), &mount)
            || elsewhere(namespace("net"), &net);
        if of_sandbox {
            things.insert(format!("process {pid} {}", words.trim()));
        }
    }
}

fn groups(directory: &Path, depth: u32, things: &mut BTreeSet<String>) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        if !LASTING_GROUPS.contains(&&*name) {
            things.insert(format!("cgroup {}", entry.path().display()));
        }
        if depth > 0 {
            groups(&entry.path(), depth - 1, things);
        }
    }
}

/// What a tool prints; nothing, where there is no such tool.
fn output(program: &str, arguments: &[&str]) -> String {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    Command::new(program)
        .args(arguments)
        .env("PATH", path)
        .output()
        .map(|output| String::from_utf8_lossy(&output.stdout).into_owned())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_new_is_found() {
        let work = tempfile::tempdir().unwrap();
        let paths = Paths::below(work.path());
        let me = std::process::id();
        let before = Holdings::now(&paths, me).unwrap();
        let bundle = paths.state.join("io.containerd.runtime.v2.task/default/t1");
        fs::create_dir_all(&bundle).unwrap();
        let left = Holdings::now(&paths, me).unwrap().more_than(&before);
        assert!(left.contains("io.containerd.runtime.v2.task/default/t1"), "{left}");
        fs::remove_dir_all(&bundle).unwrap();
        before.wait_for_no_more(&paths, me).unwrap();
    }
}
