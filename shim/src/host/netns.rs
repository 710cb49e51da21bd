// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Network namespaces. A namespace belongs to a thread, and a thread that has changed it can never be given back to a
//! pool: every visit is a thread of its own, which ends with the visit.

use std::fs::File;
use std::path::Path;
use std::thread;

use anyhow::{Context as _, Result, anyhow};
use nix::sched::{CloneFlags, setns};

/// Run `work` in the network namespace at `path` and wait for it.
pub fn inside<T: Send>(path: &Path, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let namespace =
        File::open(path).with_context(|| format!("open network namespace {}", path.display()))?;
    let visit = || {
        setns(&namespace, CloneFlags::CLONE_NEWNET)
            .with_context(|| format!("enter network namespace {}", path.display()))?;
        work()
    };
    thread::scope(|scope| {
        thread::Builder::new()
            .name("ecr-netns".into())
            .spawn_scoped(scope, visit)
            .context("start a thread")?
            .join()
            .unwrap_or_else(|_| {
                Err(anyhow!("the thread in network namespace {} panicked", path.display()))
            })
    })
}
