// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What is left on the host when a shim was killed, and taking it away. The virtual machine died with the shim, so what
//! is left is mounts, virtiofsd, changes in a network namespace, and directories.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use oci_spec::runtime::Spec;

use super::paths::Paths;
use super::persist::State;
use crate::config::{ContainerType, container_type, sandbox_id};
use crate::host::cgroup::SandboxCgroups;
use crate::host::share::Share;
use crate::host::{mount, netns, network};

/// How long a killed process may take to end.
const END: Duration = Duration::from_secs(5);

/// Take away what container `id` with this bundle, and its sandbox if it is the first of one, left on the host. Nothing
/// left is no error. All is tried; the first failure is told, the others are logged.
///
/// # Errors
/// Something is left.
pub fn clean_up(id: &str, bundle: &Path) -> Result<()> {
    let mut results = vec![mount::unmount(&bundle.join("rootfs"))];
    let annotations = annotations(bundle);
    match container_type(&annotations) {
        Ok(ContainerType::PodContainer) => {
            let sandbox = sandbox_id(&annotations)?;
            results.push(Share::existing(sandbox).remove_container(id));
        }
        // A bundle that says nothing was a sandbox's, if anything.
        _ => clean_up_sandbox(id, &mut results)?,
    }
    let mut first = Ok(());
    for error in results.into_iter().filter_map(Result::err) {
        log::warn!("clean up after {id}: {error:#}");
        first = first.and(Err(error));
    }
    first
}

fn annotations(bundle: &Path) -> HashMap<String, String> {
    let spec = fs::read(bundle.join("config.json")).ok();
    let spec: Option<Spec> = spec.and_then(|text| serde_json::from_slice(&text).ok());
    spec.and_then(|spec| spec.annotations().clone()).unwrap_or_default()
}

fn clean_up_sandbox(id: &str, results: &mut Vec<Result<()>>) -> Result<()> {
    let paths = Paths::new(id)?;
    let share = Share::existing(id);
    match State::load(&paths.state_file()) {
        Ok(Some(state)) => give_back(&state, id, &share, results),
        Ok(None) => {}
        Err(error) => results.push(Err(error)),
    }
    results.push(share.remove());
    results.push(paths.remove());
    Ok(())
}

fn give_back(state: &State, id: &str, share: &Share, results: &mut Vec<Result<()>>) {
    // A shim that still runs holds the machine. It is ours only if it says so: process ids are used again.
    results.push(end(state.hypervisor_state.pid, &["-id", id]));
    let exported = share.exported();
    results.push(end(state.hypervisor_state.virtiofs_daemon_pid, &[&exported.to_string_lossy()]));
    if let Some(record) = &state.network.endpoints {
        results.push(network::cleanup(record));
    }
    if let Some(record) = &state.cgroups {
        let cgroups = SandboxCgroups::from_record(record.clone());
        results.push(cgroups.and_then(|cgroups| cgroups.delete()));
    }
    if state.network.network_created {
        results.push(netns::delete(&state.network.network_id));
    }
}

/// Kill process `pid` if `words` stand one behind the other among its arguments, and wait for its end.
fn end(pid: u32, words: &[&str]) -> Result<()> {
    let Ok(raw) = i32::try_from(pid) else { return Ok(()) };
    if pid == 0 || pid == std::process::id() || !has_arguments(pid, words) {
        return Ok(());
    }
    match kill(Pid::from_raw(raw), Signal::SIGKILL) {
        Ok(()) => {}
        Err(Errno::ESRCH) => return Ok(()),
        Err(errno) => return Err(errno).with_context(|| format!("kill process {pid}")),
    }
    let deadline = Instant::now() + END;
    while has_arguments(pid, words) {
        if Instant::now() >= deadline {
            bail!("process {pid} does not end");
        }
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn has_arguments(pid: u32, words: &[&str]) -> bool {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let line = String::from_utf8_lossy(&line).into_owned();
    let arguments: Vec<&str> = line.split('\0').collect();
    arguments.windows(words.len()).any(|window| window == words)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Command, Stdio};

    #[test]
    fn only_a_process_with_the_right_arguments_is_ended() {
        // It reads to the end of its input, which comes with this test's end at the latest.
        let mut child = Command::new("sh")
            .args(["-c", "echo started; read -r word", "sh", "1000.25"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // `spawn` can return before the new process shows its own arguments.
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut String::new()).unwrap();
        end(child.id(), &["-id", "s1"]).unwrap();
        assert!(child.try_wait().unwrap().is_none(), "somebody else's process was killed");
        end(child.id(), &["1000.25"]).unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(Signal::SIGKILL as i32));
    }

    #[test]
    fn nothing_left_is_no_error() {
        let bundle = tempfile::tempdir().unwrap();
        clean_up("no-such-container", bundle.path()).unwrap();
        clean_up("no-such-container", Path::new("/no/such/bundle")).unwrap();
    }

    #[test]
    fn a_pods_container_needs_its_sandbox() {
        let bundle = tempfile::tempdir().unwrap();
        let config = r#"{"ociVersion":"1.0.2","annotations":{"io.kubernetes.cri.container-type":"container"}}"#;
        fs::write(bundle.path().join("config.json"), config).unwrap();
        let error = clean_up("c1", bundle.path()).unwrap_err().to_string();
        assert!(error.contains("Could not find sandbox ID"), "{error}");
    }
}
