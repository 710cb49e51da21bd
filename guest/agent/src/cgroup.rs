// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Control groups: every controller that the kernel has is handed to the groups below the root, where containers will
//! be. The agent and its own programs are in a group beside those, so that what they use can be told from what the
//! kernel uses.

use std::fs;
use std::io;
use std::path::Path;

use anyhow::{Context, Result};

const ROOT: &str = "/sys/fs/cgroup";
/// The group of the agent and its own programs.
pub const AGENT: &str = "ecr-agent";

/// Prepare the hierarchy of control groups for containers.
pub fn prepare() -> Result<()> {
    prepare_below(Path::new(ROOT))
}

fn prepare_below(root: &Path) -> Result<()> {
    let leaf = root.join(AGENT);
    match fs::create_dir(&leaf) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(error).with_context(|| format!("create {}", leaf.display()));
        }
        _ => {}
    }
    // 0 is the writer.
    write(&leaf.join("cgroup.procs"), "0")?;
    let available = root.join("cgroup.controllers");
    let controllers =
        fs::read_to_string(&available).with_context(|| format!("read {}", available.display()))?;
    let enable = root.join("cgroup.subtree_control");
    let all: Vec<_> =
        controllers.split_ascii_whitespace().map(|controller| format!("+{controller}")).collect();
    if all.is_empty() || write(&enable, &all.join(" ")).is_ok() {
        return Ok(());
    }
    // One that cannot be had is no reason to do without the others.
    for controller in all {
        if let Err(error) = write(&enable, &controller) {
            log::warn!("{error:#}");
        }
    }
    Ok(())
}

fn write(file: &Path, text: &str) -> Result<()> {
    fs::write(file, text).with_context(|| format!("write {text:?} to {}", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_controllers_are_handed_down() {
        let root = tempfile::tempdir().unwrap();
        assert!(prepare_below(root.path()).is_err(), "no control groups here");
        fs::write(root.path().join("cgroup.controllers"), "cpuset cpu io memory\n").unwrap();
        prepare_below(root.path()).unwrap();
        let read = |file: &str| fs::read_to_string(root.path().join(file)).unwrap();
        assert_eq!(read("cgroup.subtree_control"), "+cpuset +cpu +io +memory");
        assert_eq!(read("ecr-agent/cgroup.procs"), "0");
    }
}
