// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Init waits for every process that has lost its parent, and for its own.

use std::collections::HashMap;
use std::io;
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, Result};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use parking_lot::Mutex;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

type Waiters = HashMap<Pid, oneshot::Sender<WaitStatus>>;

/// Collects every ended process, and tells those who asked. All children of init are started here: whoever else
/// waited for one might find that it has been collected already.
#[derive(Debug)]
pub struct Reaper {
    waiters: Arc<Mutex<Waiters>>,
}

impl Reaper {
    /// Start collecting, in a task of the current runtime.
    pub fn start() -> Result<Self> {
        let ended = signal(SignalKind::child()).context("watch for ended processes")?;
        let waiters = Arc::default();
        tokio::spawn(collect(ended, Arc::clone(&waiters)));
        Ok(Reaper { waiters })
    }

    /// Start `command`; the receiver gets its end.
    pub fn spawn(&self, command: &mut Command) -> io::Result<oneshot::Receiver<WaitStatus>> {
        // Held over the start: a child that ends at once is not collected before its waiter is entered.
        let mut waiters = self.waiters.lock();
        let child = command.spawn()?;
        let (end, ended) = oneshot::channel();
        waiters.insert(Pid::from_raw(child.id().cast_signed()), end);
        Ok(ended)
    }
}

async fn collect(mut ended: Signal, waiters: Arc<Mutex<Waiters>>) {
    // One signal may stand for several ends.
    while ended.recv().await.is_some() {
        let mut waiters = waiters.lock();
        while let Ok(status) = waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            let Some(pid) = status.pid() else { break };
            if let Some(waiter) = waiters.remove(&pid) {
                // Nobody may be interested any more.
                let _ = waiter.send(status);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One test: in a test binary, too, all children end up with one reaper.
    #[tokio::test(flavor = "current_thread")]
    async fn ends_are_told() {
        let reaper = Reaper::start().unwrap();
        let run =
            |script: &str| reaper.spawn(Command::new("/bin/sh").args(["-c", script])).unwrap();
        let (quick, killed) = (run("exit 3"), run("kill -9 $$"));
        assert!(matches!(quick.await, Ok(WaitStatus::Exited(_, 3))));
        assert!(matches!(killed.await, Ok(WaitStatus::Signaled(_, nix::sys::signal::SIGKILL, _))));
        assert!(reaper.spawn(&mut Command::new("/no/such/program")).is_err());
        assert!(reaper.waiters.lock().is_empty());
    }
}
