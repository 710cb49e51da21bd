// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Init waits for every process that has lost its parent, and for its own.
//!
//! Nobody else in the agent may wait for a child: whoever did might find that it has been collected already. A process
//! is known here by its id before it can end ([`Reaper::spawn`]), or by somebody who is told its id later, while ends
//! of strangers are kept ([`Reaper::expect`]). Numbers of processes are only used again after they have been collected,
//! and an end is told in the same step, so a process that [`Ended::status`] calls alive can be signalled by number as
//! long as the caller does not wait in between.

use std::collections::HashMap;
use std::io;
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use parking_lot::Mutex;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

/// The end of one process. Every clone hears of it, at any time.
#[derive(Clone, Debug)]
pub struct Ended {
    pid: Pid,
    status: watch::Receiver<Option<WaitStatus>>,
}

impl Ended {
    /// The number of the process; another one's once it has ended.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Send a signal by number, 0 being none, unless the process has ended. Who cannot be signalled ends anyway.
    pub fn signal(&self, signal: i32) {
        // Looking and sending are one step for this thread, which is the one that collects.
        if self.status().is_none() {
            // SAFETY: the call takes two numbers.
            let outcome = unsafe { libc::kill(self.pid.as_raw(), signal) };
            if let Err(error) = Errno::result(outcome) {
                log::debug!("signal {signal} to process {}: {error}", self.pid);
            }
        }
    }

    /// How the process ended; `None` as long as it has not.
    pub fn status(&self) -> Option<WaitStatus> {
        *self.status.borrow()
    }

    /// Wait for the end of the process; `None` only if the agent itself is about to end.
    pub async fn wait(&self) -> Option<WaitStatus> {
        self.status.clone().wait_for(Option::is_some).await.ok().and_then(|status| *status)
    }
}

#[derive(Debug, Default)]
struct Table {
    waiters: HashMap<Pid, watch::Sender<Option<WaitStatus>>>,
    /// Ends of processes that nobody has claimed, while there are [`Expectation`]s.
    strangers: HashMap<Pid, WaitStatus>,
    expectations: usize,
}

impl Table {
    fn tell(&mut self, pid: Pid, status: WaitStatus) {
        if let Some(waiter) = self.waiters.remove(&pid) {
            waiter.send_replace(Some(status));
        } else if self.expectations > 0 {
            self.strangers.insert(pid, status);
        }
    }

    fn claim(&mut self, pid: Pid) -> Ended {
        let (waiter, status) = watch::channel(self.strangers.remove(&pid));
        if status.borrow().is_none() {
            self.waiters.insert(pid, waiter);
        }
        Ended { pid, status }
    }
}

/// Collects every ended process, and tells those who asked.
#[derive(Debug)]
pub struct Reaper {
    table: Arc<Mutex<Table>>,
}

impl Reaper {
    /// Start collecting, in a task of the current runtime.
    pub fn start() -> Result<Self> {
        let ended = signal(SignalKind::child()).context("watch for ended processes")?;
        let table = Arc::default();
        tokio::spawn(collect(ended, Arc::clone(&table)));
        Ok(Reaper { table })
    }

    /// Tests of one binary share their children: all but the reaper's own test must not collect them.
    #[cfg(test)]
    pub fn that_never_collects() -> Self {
        Reaper { table: Arc::default() }
    }

    /// Start `command`. Everything it is to know of the guest must be set in it.
    pub fn spawn(&self, command: &mut Command) -> io::Result<Ended> {
        // Held over the start: a child that ends at once is not collected before its waiter is entered.
        let mut table = self.table.lock();
        let child = command.spawn()?;
        Ok(table.claim(Pid::from_raw(child.id().cast_signed())))
    }

    /// From now on until the expectation is dropped no end is lost, whosever it is: some process is about to give this
    /// one a child whose id is not known yet.
    pub fn expect(&self) -> Expectation {
        self.table.lock().expectations += 1;
        Expectation { table: Arc::clone(&self.table) }
    }
}

/// See [`Reaper::expect`].
#[derive(Debug)]
pub struct Expectation {
    table: Arc<Mutex<Table>>,
}

impl Expectation {
    /// The end of `pid`, which has become a child of this process since the expectation was made.
    pub fn claim(&self, pid: Pid) -> Ended {
        self.table.lock().claim(pid)
    }
}

impl Drop for Expectation {
    fn drop(&mut self) {
        let mut table = self.table.lock();
        table.expectations -= 1;
        if table.expectations == 0 {
            table.strangers.clear();
        }
    }
}

/// Become the parent of every orphan below this process, as init is of all.
pub fn adopt_orphans() -> Result<()> {
    nix::sys::prctl::set_child_subreaper(true).context("become the parent of orphans")
}

async fn collect(mut ended: Signal, table: Arc<Mutex<Table>>) {
    // One signal may stand for several ends.
    while ended.recv().await.is_some() {
        let mut table = table.lock();
        while let Ok(status) = waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            let Some(pid) = status.pid() else { break };
            table.tell(pid, status);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::signal::Signal::SIGKILL;

    /// One test: in a test binary, too, all children end up with one reaper.
    #[tokio::test(flavor = "current_thread")]
    async fn ends_are_told() {
        let reaper = Reaper::start().unwrap();
        let run =
            |script: &str| reaper.spawn(Command::new("/bin/sh").args(["-c", script])).unwrap();
        let (quick, killed) = (run("exit 3"), run("kill -9 $$"));
        let again = quick.clone();
        assert!(matches!(quick.wait().await, Some(WaitStatus::Exited(_, 3))));
        assert!(matches!(again.wait().await, Some(WaitStatus::Exited(_, 3))));
        assert!(matches!(again.status(), Some(WaitStatus::Exited(_, 3))));
        assert!(matches!(killed.wait().await, Some(WaitStatus::Signaled(_, SIGKILL, _))));
        assert!(reaper.spawn(&mut Command::new("/no/such/program")).is_err());
        assert!(reaper.table.lock().waiters.is_empty());
    }

    #[test]
    fn an_expected_stranger_is_told_before_and_after_its_end() {
        let reaper = Reaper::that_never_collects();
        let end = |pid, code| {
            let pid = Pid::from_raw(pid);
            reaper.table.lock().tell(pid, WaitStatus::Exited(pid, code));
        };
        end(1001, 1);
        let expectation = reaper.expect();
        end(1002, 2);
        let (unknown, early, late) = (
            expectation.claim(Pid::from_raw(1001)),
            expectation.claim(Pid::from_raw(1002)),
            expectation.claim(Pid::from_raw(1003)),
        );
        drop(expectation);
        end(1003, 3);
        assert_eq!(unknown.status(), None, "ended before it was expected");
        assert!(matches!(early.status(), Some(WaitStatus::Exited(_, 2))));
        assert!(matches!(late.status(), Some(WaitStatus::Exited(_, 3))));
        end(1004, 4);
        assert!(reaper.table.lock().strangers.is_empty());
    }
}
