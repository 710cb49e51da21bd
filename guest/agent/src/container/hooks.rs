// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Programs of the guest image that run beside containers: every executable file in `prestart`, `poststart` and
//! `poststop` below the directory that the runtime names (`guest_hook_path`), in the order of their names. Each gets the
//! container's state on standard input, as the OCI defines it (runtime.md, "State"). Only a failing `prestart` counts.
//!
//! Hooks of the container's own specification are the host's business.

use std::fs;
use std::io::{Seek, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::wait::WaitStatus;
use serde_json::json;

use super::Container;
use crate::sandbox::Sandbox;

/// How long one program may take.
const PATIENCE: Duration = Duration::from_secs(10);
const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";

/// When in the life of a container a program runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    Prestart,
    Poststart,
    Poststop,
}

impl Moment {
    fn name(self) -> &'static str {
        match self {
            Moment::Prestart => "prestart",
            Moment::Poststart => "poststart",
            Moment::Poststop => "poststop",
        }
    }

    /// What the container is then.
    fn status(self) -> &'static str {
        match self {
            Moment::Prestart => "created",
            Moment::Poststart => "running",
            Moment::Poststop => "stopped",
        }
    }
}

/// Run the programs of this moment, one after the other.
pub async fn run(sandbox: &Sandbox, container: &Container, moment: Moment) -> Result<()> {
    let Some(directory) = sandbox.guest_hooks.read().clone() else { return Ok(()) };
    for program in programs(&directory.join(moment.name())) {
        run_one(sandbox, container, moment, &program)
            .await
            .with_context(|| format!("{} hook {}", moment.name(), program.display()))?;
    }
    Ok(())
}

fn programs(directory: &Path) -> Vec<PathBuf> {
    // A moment without programs has no directory.
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    let mut programs: Vec<PathBuf> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| {
            let found = fs::metadata(path);
            found.is_ok_and(|one| one.is_file() && one.permissions().mode() & 0o111 != 0)
        })
        .collect();
    programs.sort();
    programs
}

async fn run_one(
    sandbox: &Sandbox,
    container: &Container,
    moment: Moment,
    program: &Path,
) -> Result<()> {
    let pid = container.first.ended.pid().as_raw();
    let state = json!({
        "ociVersion": "1.0.2",
        "id": container.id,
        "status": moment.status(),
        "pid": if moment == Moment::Poststop { 0 } else { pid },
        "bundle": container.bundle,
        "annotations": container.annotations,
    });
    let mut input: fs::File = memfd_create("state", MFdFlags::MFD_CLOEXEC)?.into();
    input.write_all(state.to_string().as_bytes())?;
    input.rewind()?;
    let mut command = Command::new(program);
    command.arg(moment.name()).env_clear().env("PATH", PATH).current_dir("/");
    command.stdin(Stdio::from(input)).stdout(Stdio::null());
    let ended = sandbox.reaper.spawn(&mut command).context("start it")?;
    match tokio::time::timeout(PATIENCE, ended.wait()).await {
        Ok(Some(WaitStatus::Exited(_, 0))) => Ok(()),
        Ok(Some(WaitStatus::Exited(_, code))) => bail!("exit status {code}"),
        Ok(other) => bail!("ended by {other:?}"),
        Err(_) => {
            ended.signal(libc::SIGKILL);
            bail!("not done after {} s", PATIENCE.as_secs())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn executable_files_by_name() {
        let dir = tempfile::tempdir().unwrap();
        for (name, mode) in [("20-b", 0o755), ("10-a", 0o755), ("readme", 0o644)] {
            let path = dir.path().join(name);
            fs::write(&path, "").unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        }
        fs::create_dir(dir.path().join("30-directory")).unwrap();
        let expected = [dir.path().join("10-a"), dir.path().join("20-b")];
        assert_eq!(programs(dir.path()), expected);
        assert!(programs(&dir.path().join("none")).is_empty());
    }
}
