// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Scopes of systemd. It is asked over D-Bus by its own tool, busctl(1): two calls in the life of a sandbox are not worth
//! a D-Bus stack in the process.

use std::ffi::OsString;
use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use super::path::Scope;
use crate::host::spawn::{SpawnRequest, spawn};

const BUSCTL: &str = "/usr/bin/busctl";
/// There while systemd is the system's init (sd_booted(3)).
const BOOTED: &str = "/run/systemd/system";
/// Where busctl speaks to it.
const BUS: &str = "/run/dbus/system_bus_socket";
const TIMEOUT: Duration = Duration::from_secs(10);

/// Whether systemd can be asked.
pub(super) fn is_there() -> bool {
    Path::new(BOOTED).is_dir() && [BUSCTL, BUS].iter().all(|path| Path::new(path).exists())
}

/// Start `scope` with process `pid` in it, and wait until the process is.
pub(super) fn start(scope: &Scope, pid: u32) -> Result<()> {
    let what = || format!("start {} in {}", scope.unit, scope.slice);
    call("StartTransientUnit", "ssa(sv)a(sa(sv))", &start_arguments(scope, pid))
        .with_context(what)?;
    // The call only queues a job.
    let deadline = Instant::now() + TIMEOUT;
    while !is_inside(pid, &scope.unit)? {
        ensure!(
            Instant::now() < deadline,
            "{}: process {pid} is not in it after {TIMEOUT:?}",
            what()
        );
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn start_arguments(scope: &Scope, pid: u32) -> Vec<String> {
    let pid = pid.to_string();
    [
        &scope.unit,
        "fail",
        "5",
        "Description",
        "s",
        "ecr sandbox",
        "Slice",
        "s",
        &scope.slice,
        "Delegate",
        "b",
        "true",
        "DefaultDependencies",
        "b",
        "false",
        "PIDs",
        "au",
        "1",
        &pid,
        "0",
    ]
    .map(str::to_owned)
    .into()
}

/// Stop the unit and whatever runs in it. One that is gone is no error.
pub(super) fn stop(unit: &str) -> Result<()> {
    match call("StopUnit", "ss", &[unit.to_owned(), "replace".to_owned()]) {
        Err(error) if format!("{error:#}").contains("not loaded") => Ok(()),
        result => result.with_context(|| format!("stop {unit}")),
    }
}

/// Whether a cgroup of the process is called `unit`.
fn is_inside(pid: u32, unit: &str) -> Result<bool> {
    let path = format!("/proc/{pid}/cgroup");
    let text = fs::read_to_string(&path).context(path)?;
    Ok(cgroups(&text).any(|path| path.ends_with(unit)))
}

/// The paths in `/proc/<pid>/cgroup`: `number:controllers:path`.
fn cgroups(text: &str) -> impl Iterator<Item = PathBuf> {
    text.lines().filter_map(|line| line.splitn(3, ':').nth(2)).map(PathBuf::from)
}

/// Call a method of systemd's manager.
fn call(method: &str, signature: &str, arguments: &[String]) -> Result<()> {
    let (mut reader, writer) = std::io::pipe().context("make a pipe")?;
    let fixed = [
        "--system",
        "call",
        "org.freedesktop.systemd1",
        "/org/freedesktop/systemd1",
        "org.freedesktop.systemd1.Manager",
        method,
        signature,
    ];
    let args =
        fixed.iter().map(OsString::from).chain(arguments.iter().map(OsString::from)).collect();
    let fds = vec![(writer.into(), 2)];
    let child = spawn(SpawnRequest { program: BUSCTL, args, fds, ..Default::default() })?;
    let status = child
        .wait_timeout(TIMEOUT)?
        .with_context(|| format!("{method}: no answer for {TIMEOUT:?}"))?;
    if !status.success() {
        let mut text = String::new();
        reader.read_to_string(&mut text).context("read busctl's message")?;
        bail!("{method}: {}", text.trim());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_as_many_as_busctl_is_told() {
        let scope = Scope { slice: "a.slice".into(), unit: "b.scope".into() };
        let arguments = start_arguments(&scope, 7);
        assert_eq!(arguments[..3], ["b.scope", "fail", "5"]);
        assert_eq!(
            arguments.iter().filter(|word| ["s", "b", "au"].contains(&word.as_str())).count(),
            5
        );
        assert_eq!(arguments[arguments.len() - 4..], ["au", "1", "7", "0"]);
    }

    #[test]
    fn the_cgroups_of_a_process() {
        let text = "2:cpu,cpuacct:/a:b/c.scope\n0::/user.slice\n";
        assert_eq!(
            cgroups(text).collect::<Vec<_>>(),
            ["/a:b/c.scope", "/user.slice"].map(PathBuf::from)
        );
        assert!(!is_inside(std::process::id(), "no-such.scope").unwrap());
    }
}
