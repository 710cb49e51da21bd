// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! One process of a container, its first or an exec: which state it is in, how it ended, and who waits for that.

use std::time::SystemTime;

use oci_spec::runtime;
use parking_lot::Mutex;
use tokio::sync::watch;

use super::io::{Copying, Stdio, Streams};
use crate::error::{Error, Kind, Result};
use crate::sandbox::ProcessId;

/// The exit status of a process of which nobody knows how it ended.
pub(crate) const UNKNOWN_STATUS: u32 = 255;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// Its status; 128 + signal if a signal ended it.
    pub status: u32,
    /// When.
    pub at: SystemTime,
}

/// The states of a process, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Not started.
    Created,
    /// About to be.
    Starting,
    /// Running.
    Running,
    /// Frozen, with its container.
    Paused,
    /// Ended.
    Exited(Exit),
}

impl Phase {
    fn name(self) -> &'static str {
        match self {
            Phase::Created => "created",
            Phase::Starting => "starting",
            Phase::Running => "running",
            Phase::Paused => "paused",
            Phase::Exited(_) => "stopped",
        }
    }
}

/// A process.
#[derive(Debug)]
pub struct Process {
    /// The container's id.
    pub container: String,
    /// The exec's id; empty for the container's first process.
    pub exec: String,
    /// Its streams, as containerd named them.
    pub stdio: Stdio,
    /// What to run, for an exec.
    pub spec: Option<runtime::Process>,
    state: Mutex<State>,
    exit: watch::Sender<Option<Exit>>,
}

#[derive(Debug)]
struct State {
    phase: Phase,
    /// Open, and waiting for the start.
    streams: Option<Streams>,
    /// The streams of a started process.
    copying: Option<Copying>,
    /// CloseIO came before the start.
    close_input: bool,
    /// A terminal's rows and columns, if they were set before there was one.
    size: Option<(u32, u32)>,
}

impl Process {
    /// A container's first process; `streams` are open already.
    pub(crate) fn first(container: &str, stdio: Stdio, streams: Streams) -> Self {
        Self::new(container, "", stdio, None, Some(streams))
    }

    /// An exec.
    pub(crate) fn exec(container: &str, exec: &str, stdio: Stdio, spec: runtime::Process) -> Self {
        Self::new(container, exec, stdio, Some(spec), None)
    }

    fn new(
        container: &str,
        exec: &str,
        stdio: Stdio,
        spec: Option<runtime::Process>,
        streams: Option<Streams>,
    ) -> Self {
        let state =
            State { phase: Phase::Created, streams, copying: None, close_input: false, size: None };
        Self {
            container: container.to_owned(),
            exec: exec.to_owned(),
            stdio,
            spec,
            state: Mutex::new(state),
            exit: watch::Sender::new(None),
        }
    }

    /// How the sandbox names it.
    pub fn id(&self) -> ProcessId<'_> {
        ProcessId { container: &self.container, exec: &self.exec }
    }

    /// Is it its container's first?
    pub fn is_first(&self) -> bool {
        self.exec.is_empty()
    }

    /// As errors and the log call it.
    pub fn name(&self) -> String {
        if self.is_first() {
            format!("container {}", self.container)
        } else {
            format!("exec {} of container {}", self.exec, self.container)
        }
    }

    /// Its state now.
    pub fn phase(&self) -> Phase {
        self.state.lock().phase
    }

    /// Wait until it has ended.
    pub async fn exited(&self) -> Exit {
        let mut exit = self.exit.subscribe();
        let ended = exit.wait_for(Option::is_some).await.ok().and_then(|exit| *exit);
        // The sender lives as long as we do.
        ended.unwrap_or(Exit { status: UNKNOWN_STATUS, at: SystemTime::now() })
    }

    /// From created to starting. Only one caller succeeds, and gets the streams if they are open.
    pub(crate) fn begin_start(&self) -> Result<Option<Streams>> {
        let mut state = self.state.lock();
        if state.phase != Phase::Created {
            return Err(self.wrong_phase(state.phase, "start"));
        }
        state.phase = Phase::Starting;
        Ok(state.streams.take())
    }

    /// From starting to running, unless it has been declared ended in between.
    pub(crate) fn set_running(&self, copying: Copying) -> Result<()> {
        let mut state = self.state.lock();
        if state.phase != Phase::Starting {
            return Err(self.wrong_phase(state.phase, "start"));
        }
        state.phase = Phase::Running;
        if state.close_input {
            copying.close_input();
        }
        state.copying = Some(copying);
        Ok(())
    }

    /// Freeze or thaw. An ended process stays ended.
    pub(crate) fn set_paused(&self, paused: bool) {
        let mut state = self.state.lock();
        if let Phase::Running | Phase::Paused = state.phase {
            state.phase = if paused { Phase::Paused } else { Phase::Running };
        }
    }

    /// It has ended; only the first to say so is heard. `tell` is called before anybody can see it.
    pub(crate) fn set_exited(&self, exit: Exit, tell: impl FnOnce()) {
        {
            let mut state = self.state.lock();
            if let Phase::Exited(_) = state.phase {
                return;
            }
            tell();
            state.phase = Phase::Exited(exit);
            state.streams = None;
        }
        self.exit.send_replace(Some(exit));
    }

    /// Let go of the streams.
    pub(crate) fn close_streams(&self) {
        let (streams, copying) = {
            let mut state = self.state.lock();
            (state.streams.take(), state.copying.take())
        };
        drop(streams);
        if let Some(copying) = copying {
            copying.stop();
        }
    }

    /// Close standard input when all that is in it has been copied; returns the streams to wait for, unless the process
    /// has none yet.
    pub(crate) fn close_input(&self) -> Option<Copying> {
        let mut state = self.state.lock();
        state.close_input = true;
        let copying = state.copying.clone();
        if let Some(copying) = &copying {
            copying.close_input();
        }
        copying
    }

    /// Remember a terminal's size for the start. False if there is a terminal that can be told.
    pub(crate) fn keep_size(&self, rows: u32, columns: u32) -> Result<bool> {
        let mut state = self.state.lock();
        match state.phase {
            Phase::Created | Phase::Starting => {
                state.size = Some((rows, columns));
                Ok(true)
            }
            Phase::Running | Phase::Paused => Ok(false),
            Phase::Exited(_) => Err(self.wrong_phase(state.phase, "resize the terminal of")),
        }
    }

    /// The size that was set before the start.
    pub(crate) fn kept_size(&self) -> Option<(u32, u32)> {
        self.state.lock().size
    }

    /// What was asked does not fit the state.
    pub(crate) fn wrong_phase(&self, phase: Phase, asked: &str) -> Error {
        let text = format!("{asked} {}: it is {}", self.name(), phase.name());
        Error::new(Kind::FailedPrecondition, text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::UNIX_EPOCH;

    fn process() -> Process {
        Process::first("c1", Stdio::default(), Streams::default())
    }

    #[test]
    fn a_process_starts_once() {
        let process = process();
        assert!(process.begin_start().unwrap().is_some());
        let error = process.begin_start().unwrap_err();
        assert_eq!(error.kind(), Kind::FailedPrecondition);
        assert_eq!(error.to_string(), "start container c1: it is starting");
    }

    #[tokio::test]
    async fn the_first_word_about_an_end_counts() {
        let process = process();
        let exit = Exit { status: 3, at: UNIX_EPOCH };
        let mut told = 0;
        process.set_exited(exit, || told += 1);
        process.set_exited(Exit { status: 4, at: UNIX_EPOCH }, || told += 1);
        process.set_paused(true);
        assert_eq!(told, 1);
        assert_eq!(process.phase(), Phase::Exited(exit));
        assert_eq!(process.exited().await, exit);
        assert!(process.begin_start().is_err());
        assert!(process.keep_size(1, 1).is_err());
    }
}
