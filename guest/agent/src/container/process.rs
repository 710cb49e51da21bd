// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! One process of a container that the runtime knows by name.

use std::cmp::Reverse;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context, anyhow};
use ecr_agent_protocol::oci::{self, Spec};
use nix::sys::wait::WaitStatus;

use super::cgroup::Cgroup;
use super::launch::{Waiting, launch};
use super::stdio::Streams;
use super::wire::Order;
use super::{Container, Containers, Error, Result};
use crate::reaper::{Ended, Reaper};

/// Ended processes that are remembered per container after their end has been asked for: their output may still be
/// read. And how many whose end nobody has asked for.
const REMEMBER: usize = 32;
const REMEMBER_UNASKED: usize = 1024;
/// What shells add to the number of the signal that has ended a program.
const SIGNALLED: i32 = 128;
/// The highest number of a signal (signal(7)).
const MAX_SIGNAL: u32 = 64;

/// One process of a container.
#[derive(Debug)]
pub struct Process {
    pub(super) ended: Ended,
    pub(super) streams: Streams,
    /// Until it is started.
    pub(super) waiting: tokio::sync::Mutex<Option<Waiting>>,
    asked: AtomicBool,
    made: Instant,
}

impl Process {
    /// Make a process that waits for its start.
    pub(super) async fn launch(
        reaper: &Reaper,
        order: Order,
        spec: &Spec,
        cgroup: &Cgroup,
        pipe_size: u32,
    ) -> anyhow::Result<Self> {
        let cgroup = match order {
            Order::Create => cgroup.open()?,
            Order::Exec(first) => cgroup.open_for_another(first)?,
        };
        let (waiting, streams) = if spec.process.terminal {
            let mut waiting = launch(reaper, order, spec, &cgroup, &[]).await?;
            let master = waiting.master.take().context("the process has no terminal")?;
            (waiting, Streams::terminal(master)?)
        } else {
            let (streams, theirs) = Streams::pipes(pipe_size)?;
            (launch(reaper, order, spec, &cgroup, &theirs).await?, streams)
        };
        Ok(Process {
            ended: waiting.ended.clone(),
            streams,
            waiting: tokio::sync::Mutex::new(Some(waiting)),
            asked: AtomicBool::new(false),
            made: Instant::now(),
        })
    }

    /// The agent's ends of its standard streams.
    pub fn streams(&self) -> &Streams {
        &self.streams
    }

    /// Set the size of its terminal.
    pub fn resize(&self, rows: u32, columns: u32) -> Result<()> {
        match self.streams.resize(rows, columns) {
            Some(outcome) => Ok(outcome?),
            None => Err(Error::NoTerminal("the process has no terminal to resize".into())),
        }
    }

    /// Wait for the end: the exit status, or 128 and the number of the signal.
    pub async fn wait(&self) -> Result<i32> {
        let status = self.ended.wait().await;
        self.asked.store(true, Ordering::Relaxed);
        match status {
            Some(WaitStatus::Exited(_, code)) => Ok(code),
            Some(WaitStatus::Signaled(_, signal, _)) => Ok(SIGNALLED + signal as i32),
            other => Err(anyhow!("the end of the process is not known: {other:?}").into()),
        }
    }

    pub(super) fn is_alive(&self) -> bool {
        self.ended.status().is_none()
    }

    /// The first process of a PID namespace does not feel a SIGTERM that it does not handle.
    fn minds_sigterm(&self) -> bool {
        let path = format!("/proc/{}/status", self.ended.pid());
        minds(&fs::read_to_string(path).unwrap_or_default(), libc::SIGTERM)
    }
}

/// Whether a process blocks, ignores or handles `signal`, by its `status` (proc_pid_status(5)).
fn minds(status: &str, signal: i32) -> bool {
    let masks = ["SigBlk:", "SigIgn:", "SigCgt:"];
    status
        .lines()
        .filter_map(|line| masks.iter().find_map(|mask| line.strip_prefix(mask)))
        .filter_map(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .any(|mask| mask >> (signal - 1) & 1 == 1)
}

impl Containers {
    /// Run another process in a container.
    pub async fn exec(
        &self,
        reaper: &Reaper,
        id: &str,
        exec_id: &str,
        process: oci::Process,
    ) -> Result<()> {
        let container = self.get(id)?;
        if exec_id.is_empty() || exec_id == container.exec_id {
            return Err(Error::Invalid(format!("exec in container {id}: the exec id is missing")));
        }
        container.check_can_exec().await?;
        container.forget_ended(exec_id);
        let reservation = container
            .execs
            .reserve(exec_id)
            .ok_or_else(|| Error::Exists(format!("process {exec_id:?} of container {id}")))?;
        let mut spec = Spec { process: Some(process).into(), ..Default::default() };
        spec.linux.mut_or_insert_default().seccomp = container.seccomp.clone().into();
        let order = Order::Exec(container.first.ended.pid().as_raw());
        let size = self.pipe_size.load(Ordering::Relaxed);
        let run = async {
            let process = Process::launch(reaper, order, &spec, &container.cgroup, size).await?;
            let waiting = process.waiting.lock().await.take();
            if let Some(waiting) = waiting {
                waiting.start().await?;
            }
            Ok(process)
        };
        let process = match run.await {
            Ok(process) => process,
            // Whatever it failed with, this is why.
            Err(_) if !container.is_running() => return container.check_can_exec().await,
            Err(error) => return Err(Error::Other(error)),
        };
        reservation.fill(Arc::new(process));
        Ok(())
    }

    /// Send a signal. To the first process SIGKILL means the whole container.
    pub fn signal(&self, id: &str, exec_id: &str, signal: u32) -> Result<()> {
        let (container, process) = self.process(id, exec_id)?;
        if signal > MAX_SIGNAL {
            return Err(Error::Invalid(format!("{signal} is no signal")));
        }
        let mut signal = signal.cast_signed();
        let first = container.is_first(&process);
        if first && signal == libc::SIGTERM && process.is_alive() && !process.minds_sigterm() {
            signal = libc::SIGKILL;
        }
        if first && signal == libc::SIGKILL {
            container.kill()?;
        }
        process.ended.signal(signal);
        Ok(())
    }
}

impl Container {
    /// Whether its first process lives and is to live on.
    fn is_running(&self) -> bool {
        self.first.is_alive() && !self.killed.load(Ordering::Relaxed)
    }

    /// Kill all its processes.
    pub(super) fn kill(&self) -> anyhow::Result<()> {
        self.killed.store(true, Ordering::Relaxed);
        self.cgroup.kill()
    }

    async fn check_can_exec(&self) -> Result<()> {
        let problem = if !self.is_running() {
            "is not running: its process has ended"
        } else if self.first.waiting.lock().await.is_some() {
            "is not started yet"
        } else if self.paused.load(Ordering::Relaxed) {
            "is paused"
        } else {
            return Ok(());
        };
        Err(Error::State(format!("cannot exec in container {}, which {problem}", self.id)))
    }

    /// Forget the process of this name if it has ended, and of all the ended ones the oldest that are too many.
    fn forget_ended(&self, exec_id: &str) {
        let mut asked = 0;
        let mut unasked = 0;
        let mut all = self.execs.all();
        all.sort_by_key(|(_, process)| Reverse(process.made));
        for (name, process) in all {
            if process.is_alive() {
                continue;
            }
            let (count, most) = if process.asked.load(Ordering::Relaxed) {
                (&mut asked, REMEMBER)
            } else {
                (&mut unasked, REMEMBER_UNASKED)
            };
            *count += 1;
            if name == exec_id || *count > most {
                self.execs.remove(&name, &process);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_minds_a_signal() {
        let status = |blocked: u64, ignored: u64, caught: u64| {
            format!(
                "Name:\tx\nSigBlk:\t{blocked:016x}\nSigIgn:\t{ignored:016x}\nSigCgt:\t{caught:016x}\n"
            )
        };
        let term = 1 << (libc::SIGTERM - 1);
        assert!(!minds(&status(0, 0, 0), libc::SIGTERM));
        assert!(!minds(&status(!term, !term, !term), libc::SIGTERM));
        for status in [status(term, 0, 0), status(0, term, 0), status(0, 0, term)] {
            assert!(minds(&status, libc::SIGTERM));
        }
        assert!(!minds("", libc::SIGTERM));
    }
}
