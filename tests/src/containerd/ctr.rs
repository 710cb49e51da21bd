// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Containers by `ctr`.

use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::command::{self, Finished, OnTerminal, Running};
use super::{Containerd, LIMIT, Runtime, image};

impl Containerd {
    /// `ctr`, about to be run with these arguments.
    #[must_use]
    pub fn ctr_command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.place.file(self.version.name()).join("usr/bin/ctr"));
        command.arg("--address").arg(&self.paths.socket).args(arguments);
        command
    }

    /// Runs `ctr` to its end.
    ///
    /// # Errors
    /// It does not end in time; a failure is no error.
    pub fn ctr(&self, arguments: &[&str]) -> Result<Finished> {
        command::start(self.ctr_command(arguments), None)?.finish(LIMIT)
    }

    /// `ctr run`, with more options, of a shell script in a container named `id`.
    #[must_use]
    pub fn run_command(
        &self,
        runtime: Runtime,
        options: &[&str],
        id: &str,
        script: &str,
    ) -> Command {
        let mut arguments = vec!["run", "--runtime", runtime.kind()];
        let config = self.paths.ecr.display().to_string();
        if runtime == Runtime::Ecr && !options.contains(&"--runtime-config-path") {
            arguments.extend(["--runtime-config-path", &config]);
        }
        arguments.extend(options);
        arguments.extend([image::BUSYBOX, id]);
        arguments.extend(image::BUSYBOX_SHELL);
        arguments.push(script);
        self.ctr_command(&arguments)
    }

    /// Runs a shell script in a container that is removed when it ends.
    ///
    /// # Errors
    /// It does not end in time; a failure is no error.
    pub fn run(
        &self,
        runtime: Runtime,
        options: &[&str],
        id: &str,
        script: &str,
    ) -> Result<Finished> {
        let options = [&["--rm"], options].concat();
        command::start(self.run_command(runtime, &options, id, script), None)?.finish(LIMIT)
    }

    /// The same, its standard input a pipe; not waited for.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn run_with_input(
        &self,
        runtime: Runtime,
        options: &[&str],
        id: &str,
        script: &str,
    ) -> Result<Running> {
        let options = [&["--rm"], options].concat();
        let command = self.run_command(runtime, &options, id, script);
        command::start(command, Some(Stdio::piped()))
    }

    /// The same, on a terminal.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn run_on_terminal(&self, runtime: Runtime, id: &str, script: &str) -> Result<OnTerminal> {
        let command = self.run_command(runtime, &["--rm", "-t"], id, script);
        OnTerminal::start(command, 24, 80)
    }

    /// Starts a container that goes on without `ctr`.
    ///
    /// # Errors
    /// It does not start.
    pub fn run_detached(
        &self,
        runtime: Runtime,
        options: &[&str],
        id: &str,
        script: &str,
    ) -> Result<()> {
        let options = [&["-d"], options].concat();
        let command = self.run_command(runtime, &options, id, script);
        command::start(command, None)?.finish(LIMIT)?.expect(0).map(drop)
    }

    /// Runs a shell script in a running container.
    ///
    /// # Errors
    /// It does not end in time; a failure is no error.
    pub fn exec(&self, id: &str, script: &str) -> Result<Finished> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("exec-{}", COUNT.fetch_add(1, Ordering::Relaxed));
        let [shell, option] = image::BUSYBOX_SHELL;
        self.ctr(&["tasks", "exec", "--exec-id", &name, id, shell, option, script])
    }

    /// The state of a container's task, such as `RUNNING`; `None`: there is no task.
    ///
    /// # Errors
    /// `ctr` failed.
    pub fn task_state(&self, id: &str) -> Result<Option<String>> {
        let list = self.ctr(&["tasks", "ls"])?.expect(0)?.text();
        let line = list.lines().find(|line| line.split_whitespace().next() == Some(id));
        Ok(line.and_then(|line| line.split_whitespace().nth(2)).map(str::to_owned))
    }

    /// Waits until a container's task is in `state`.
    ///
    /// # Errors
    /// It is not, in time.
    pub fn wait_for_state(&self, id: &str, state: Option<&str>) -> Result<()> {
        let until = Instant::now() + LIMIT;
        loop {
            let now = self.task_state(id)?;
            if now.as_deref() == state {
                return Ok(());
            }
            ensure!(Instant::now() < until, "{id} is {now:?} after {LIMIT:?}, not {state:?}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Kills a container and removes it.
    ///
    /// # Errors
    /// It cannot be removed.
    pub fn remove(&self, id: &str) -> Result<()> {
        // It may have ended already.
        self.ctr(&["tasks", "kill", "-s", "SIGKILL", id])?;
        let until = Instant::now() + LIMIT;
        while self.task_state(id)?.is_some_and(|state| state != "STOPPED") {
            ensure!(Instant::now() < until, "{id} does not end");
            std::thread::sleep(Duration::from_millis(50));
        }
        if self.task_state(id)?.is_some() {
            self.ctr(&["tasks", "rm", id])?.expect(0)?;
        }
        self.ctr(&["containers", "rm", id])?.expect(0)?;
        Ok(())
    }

    /// Removes the task of a container that has ended, and tells its exit code. `ctr` ends with it, or says it and ends
    /// with 0, according to its version.
    ///
    /// # Errors
    /// The task cannot be removed.
    pub fn remove_task(&self, id: &str) -> Result<i32> {
        let removed = self.ctr(&["tasks", "rm", id])?;
        let said = removed.errors();
        match said.split_once("exit with non-zero exit code ") {
            Some((_, rest)) => {
                let digits = rest.split(|c: char| !c.is_ascii_digit()).next().unwrap_or_default();
                digits.parse().with_context(|| format!("an exit code in: {said}"))
            }
            None if said.is_empty() => Ok(removed.code),
            None => bail!("{removed}"),
        }
    }
}
