// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! OCI hooks (runtime-spec, config.md "POSIX-platform Hooks"), which run on the host, as Kata runs them.
//!
//! - `prestart` and `createRuntime` run before the virtual machine is made, in the pod's network namespace: what they put
//!   there the guest gets. One that fails ends the start. `poststart` and `poststop` only complain.
//! - The state on standard input names as process the thread of the shim that waits for the hook. It is in the pod's
//!   network namespace, so `/proc/<pid>/ns/net` is that namespace.
//! - Hooks of the other kinds belong into the guest and are not run here.

use std::ffi::OsString;
use std::fs::File;
use std::io::{Read as _, Seek as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::Signal;
use oci_spec::runtime::{Hook, Spec};

use crate::host::netns;
use crate::host::spawn::{Child, SpawnRequest, spawn};

/// For hooks that set no limit themselves: about what an orchestrator waits for a container.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(120);
/// How much of what a failing hook printed is told.
const MAX_OUTPUT: usize = 4096;

/// When hooks run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Before the container is created (the older name).
    Prestart,
    /// Before the container is created.
    CreateRuntime,
    /// After its process was started.
    Poststart,
    /// After it was deleted.
    Poststop,
}

impl Stage {
    fn name(self) -> &'static str {
        match self {
            Self::Prestart => "prestart",
            Self::CreateRuntime => "createRuntime",
            Self::Poststart => "poststart",
            Self::Poststop => "poststop",
        }
    }

    /// The container's status at that time, in the state's words.
    fn status(self) -> &'static str {
        match self {
            Self::Prestart | Self::CreateRuntime => "creating",
            Self::Poststart => "running",
            Self::Poststop => "stopped",
        }
    }

    /// Whether a failure is the container's.
    fn is_fatal(self) -> bool {
        matches!(self, Self::Prestart | Self::CreateRuntime)
    }

    #[allow(deprecated)]
    fn of(self, spec: &Spec) -> &[Hook] {
        let Some(hooks) = spec.hooks() else { return &[] };
        let hooks = match self {
            Self::Prestart => hooks.prestart(),
            Self::CreateRuntime => hooks.create_runtime(),
            Self::Poststart => hooks.poststart(),
            Self::Poststop => hooks.poststop(),
        };
        hooks.as_deref().unwrap_or_default()
    }
}

/// The container whose hooks are run.
#[derive(Debug, Clone, Copy)]
pub struct Container<'a> {
    /// Its id.
    pub id: &'a str,
    /// Its bundle.
    pub bundle: &'a Path,
    /// Its specification.
    pub spec: &'a Spec,
    /// The pod's network namespace. One that is gone does not matter.
    pub netns: Option<&'a Path>,
}

/// Run the hooks of a stage, one after the other. Blocks until all have ended, or the first has failed whose failure is the
/// container's.
pub fn run(container: &Container<'_>, stage: Stage) -> Result<()> {
    let hooks = stage.of(container.spec);
    if hooks.is_empty() {
        return Ok(());
    }
    let all = || {
        let state = state(container, stage)?;
        for hook in hooks {
            let result = run_one(hook, &state)
                .with_context(|| format!("{} hook {}", stage.name(), hook.path().display()));
            match result {
                Err(error) if stage.is_fatal() => return Err(error),
                Err(error) => log::warn!("container {}: {error:#}", container.id),
                Ok(()) => {}
            }
        }
        Ok(())
    };
    match container.netns {
        Some(path) if !netns::is_gone(path) => netns::inside(path, all),
        _ => all(),
    }
}

/// The container's state (runtime-spec, runtime.md "State"), with the calling thread as its process.
fn state(container: &Container<'_>, stage: Stage) -> Result<Vec<u8>> {
    let state = serde_json::json!({
        "ociVersion": container.spec.version(),
        "id": container.id,
        "status": stage.status(),
        "pid": nix::unistd::gettid().as_raw(),
        "bundle": container.bundle,
        "annotations": container.spec.annotations().clone().unwrap_or_default(),
    });
    serde_json::to_vec(&state).context("write the state for hooks")
}

fn run_one(hook: &Hook, state: &[u8]) -> Result<()> {
    ensure!(hook.path().is_absolute(), "the path is not absolute");
    let timeout = match hook.timeout() {
        None => DEFAULT_TIMEOUT,
        Some(seconds) => match u64::try_from(seconds) {
            Ok(seconds @ 1..) => Duration::from_secs(seconds),
            _ => bail!("timeout {seconds} is not above 0"),
        },
    };
    let mut words = hook.args().clone().unwrap_or_default().into_iter().map(OsString::from);
    let name = words.next();
    let (output, writer) = std::io::pipe().context("make a pipe")?;
    let output = OwnedFd::from(output);
    let child = spawn(SpawnRequest {
        program: hook.path().to_str().context("the path is no UTF-8")?,
        name,
        args: words.collect(),
        env: hook.env().clone().map(|env| env.into_iter().map(OsString::from).collect()),
        fds: vec![(input(state)?, 0), (writer.try_clone()?.into(), 1), (writer.into(), 2)],
        own_group: true,
        ..Default::default()
    })?;
    let (status, text) = watch(&child, output, timeout)?;
    let text = String::from_utf8_lossy(&text);
    match status {
        Some(status) if status.success() => Ok(()),
        Some(status) => bail!("{status}, and it said: {}", text.trim()),
        None => bail!("killed after its timeout of {timeout:?}, and it said: {}", text.trim()),
    }
}

/// A file to be read from its start: a hook that reads nothing keeps nobody waiting.
fn input(state: &[u8]) -> Result<OwnedFd> {
    let file = memfd_create("ecr-hook-state", MFdFlags::MFD_CLOEXEC).context("memfd_create")?;
    let mut file = File::from(file);
    file.write_all(state).and_then(|()| file.rewind()).context("write the state")?;
    Ok(file.into())
}

/// Read what a hook prints until it ends, and kill it when that takes too long. What it started may live on and keep the
/// pipe open: the hook's own end counts. Returns how it ended, and the first that it printed.
fn watch(
    child: &Child,
    output: OwnedFd,
    timeout: Duration,
) -> Result<(Option<ExitStatus>, Vec<u8>)> {
    let deadline = Instant::now() + timeout;
    let mut output = Some(File::from(output));
    let mut text = Vec::new();
    loop {
        let left = deadline.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
        let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        let mut fds = vec![PollFd::new(child.as_fd(), PollFlags::POLLIN)];
        fds.extend(output.as_ref().map(|file| PollFd::new(file.as_fd(), PollFlags::POLLIN)));
        match poll(&mut fds, left) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno).context("wait for the hook"),
        }
        let printed = fds.get(1).is_some_and(|fd| fd.any().unwrap_or_default());
        if printed && !read_some(&mut output, &mut text)? {
            output = None;
        }
        // Its last words come before its end.
        if printed && Instant::now() < deadline {
            continue;
        }
        if let Some(status) = child.try_wait()? {
            return Ok((Some(status), text));
        }
        if Instant::now() >= deadline {
            child.signal(Signal::SIGKILL)?;
            return Ok((None, text));
        }
    }
}

/// Read what is there; `false` at the end. More than is told is thrown away.
fn read_some(output: &mut Option<File>, text: &mut Vec<u8>) -> Result<bool> {
    let Some(file) = output else { return Ok(false) };
    let mut buffer = [0; 4096];
    let length = file.read(&mut buffer).context("read what the hook prints")?;
    let wanted = length.min(MAX_OUTPUT - text.len());
    text.extend_from_slice(&buffer[..wanted]);
    Ok(length > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci_spec::runtime::{HookBuilder, HooksBuilder, SpecBuilder};
    use std::fs;

    fn hook(script: &str) -> HookBuilder {
        let args = ["hook", "-c", script, "called"].map(str::to_owned);
        HookBuilder::default().path("/bin/sh").args(args)
    }

    fn spec(hooks: Vec<Hook>) -> Spec {
        let hooks =
            HooksBuilder::default().create_runtime(hooks.clone()).poststop(hooks).build().unwrap();
        let annotations = [("key".to_owned(), "value".to_owned())];
        SpecBuilder::default()
            .hooks(hooks)
            .annotations(annotations)
            .version("1.0.2")
            .build()
            .unwrap()
    }

    fn run_at(spec: &Spec, directory: &Path, stage: Stage) -> Result<()> {
        run(&Container { id: "c1", bundle: directory, spec, netns: None }, stage)
    }

    #[test]
    fn a_hook_gets_the_state_its_arguments_and_its_environment() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("out");
        let script = format!("{{ cat; echo; echo \"$0 $A $HOME\"; }} >{}", file.display());
        let hooks = vec![hook(&script).env(vec!["A=b".into()]).build().unwrap()];
        run_at(&spec(hooks), directory.path(), Stage::CreateRuntime).unwrap();
        let text = fs::read_to_string(file).unwrap();
        let (state, rest) = text.split_once('\n').unwrap();
        assert_eq!(rest, "called b \n");
        let state: serde_json::Value = serde_json::from_str(state).unwrap();
        assert_eq!(state["id"], "c1");
        assert_eq!(state["ociVersion"], "1.0.2");
        assert_eq!(state["status"], "creating");
        assert_eq!(state["bundle"], directory.path().to_str().unwrap());
        assert_eq!(state["annotations"]["key"], "value");
        assert_eq!(state["pid"], nix::unistd::gettid().as_raw());
    }

    #[test]
    fn the_process_of_the_state_is_in_the_pods_network() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("SKIPPED: a network namespace needs root");
            return;
        }
        let namespace = std::thread::spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            File::open("/proc/thread-self/ns/net").unwrap()
        });
        let namespace = namespace.join().unwrap();
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&namespace));
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("out");
        let script = format!(
            "pid=$(sed 's/.*\"pid\":\\([0-9]*\\).*/\\1/'); readlink /proc/$pid/ns/net /proc/$$/ns/net >{}",
            file.display()
        );
        let spec = spec(vec![hook(&script).build().unwrap()]);
        let netns = Some(Path::new(&path));
        run(
            &Container { id: "c1", bundle: directory.path(), spec: &spec, netns },
            Stage::CreateRuntime,
        )
        .unwrap();
        let expected = fs::read_link(&path).unwrap();
        let text = fs::read_to_string(file).unwrap();
        assert_eq!(text.lines().collect::<Vec<_>>(), [expected.to_str().unwrap(); 2]);
    }

    #[test]
    fn a_failing_hook_tells_why_and_ends_the_row() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("out");
        let after = format!("touch {}", file.display());
        let hooks =
            vec![hook("echo no good >&2; exit 3").build().unwrap(), hook(&after).build().unwrap()];
        let spec = spec(hooks);
        let error =
            format!("{:#}", run_at(&spec, directory.path(), Stage::CreateRuntime).unwrap_err());
        assert!(
            error.contains("createRuntime hook /bin/sh: exit status: 3, and it said: no good"),
            "{error}"
        );
        assert!(!file.exists());
        // After the container's end it ends nothing.
        run_at(&spec, directory.path(), Stage::Poststop).unwrap();
        assert!(file.exists());
        run_at(&spec, directory.path(), Stage::Poststart).unwrap();
    }

    #[test]
    fn a_hook_that_takes_too_long_is_killed_with_what_it_started() {
        let directory = tempfile::tempdir().unwrap();
        let pid = directory.path().join("pid");
        let script = format!("sleep 61 & echo $! >{}; echo waiting; wait", pid.display());
        let spec = spec(vec![hook(&script).timeout(1).build().unwrap()]);
        let error =
            format!("{:#}", run_at(&spec, directory.path(), Stage::CreateRuntime).unwrap_err());
        assert!(error.contains("killed after its timeout of 1s, and it said: waiting"), "{error}");
        let started = fs::read_to_string(pid).unwrap();
        let status = format!("/proc/{}/status", started.trim());
        let deadline = Instant::now() + Duration::from_secs(10);
        // Gone, or a zombie that the system's init has not reaped.
        while fs::read_to_string(&status).is_ok_and(|text| !text.contains("State:\tZ")) {
            assert!(Instant::now() < deadline, "it still runs");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn a_hook_that_leaves_something_running_or_prints_a_lot_is_not_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let hooks = vec![
            hook("sleep 2 & exit 0").build().unwrap(),
            hook("head -c 3000000 /dev/zero").build().unwrap(),
        ];
        run_at(&spec(hooks), directory.path(), Stage::CreateRuntime).unwrap();
    }

    #[test]
    fn what_cannot_be_a_hook() {
        let directory = tempfile::tempdir().unwrap();
        for (hook, text) in [
            (HookBuilder::default().path("relative"), "not absolute"),
            (HookBuilder::default().path("/no/such/hook"), "/no/such/hook"),
            (hook("exit 0").timeout(0), "timeout 0 is not above 0"),
        ] {
            let spec = spec(vec![hook.build().unwrap()]);
            let error =
                format!("{:#}", run_at(&spec, directory.path(), Stage::CreateRuntime).unwrap_err());
            assert!(error.contains(text), "{error}");
        }
        run_at(&SpecBuilder::default().build().unwrap(), directory.path(), Stage::Prestart)
            .unwrap();
    }
}
