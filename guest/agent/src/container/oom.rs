// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! "A container ran out of memory": the kernel counts in `memory.events` (cgroup-v2.rst, "Memory Interface Files"),
//! inotify(7) says when, and the runtime asks for one event after the other.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::net::unix::pipe::Receiver;
use tokio::sync::{Mutex, mpsc, watch};
use tokio::task::AbortHandle;

/// Events that nobody has asked for yet. When there are more, the runtime has stopped listening.
const BACKLOG: usize = 64;

/// The events of all containers.
#[derive(Debug)]
pub struct Events {
    sender: mpsc::Sender<String>,
    receiver: Mutex<mpsc::Receiver<String>>,
    closed: watch::Sender<bool>,
}

impl Default for Events {
    fn default() -> Self {
        let (sender, receiver) = mpsc::channel(BACKLOG);
        Events { sender, receiver: Mutex::new(receiver), closed: watch::channel(false).0 }
    }
}

impl Events {
    /// Wait for the next event: the id of a container. `None` when there will be no more.
    pub async fn next(&self) -> Option<String> {
        let mut closed = self.closed.subscribe();
        let next = async { self.receiver.lock().await.recv().await };
        tokio::select! {
            event = next => event,
            _ = closed.wait_for(|closed| *closed) => None,
        }
    }

    /// Tell everybody who waits that the sandbox ends.
    pub fn close(&self) {
        self.closed.send_replace(true);
    }

    /// Watch the cgroup of `container` until the handle is used. A kernel without memory controller has no events.
    pub fn watch(&self, container: &str, cgroup: &Path) -> Result<Option<AbortHandle>> {
        let file = cgroup.join("memory.events");
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)
            .context("watch for lack of memory")?;
        match inotify.add_watch(&file, AddWatchFlags::IN_MODIFY) {
            Err(Errno::ENOENT) => return Ok(None),
            outcome => outcome.with_context(|| format!("watch {}", file.display()))?,
        };
        // Only read; and an inotify is no pipe, but is read like one.
        let changes = inotify.as_fd().try_clone_to_owned().context("watch for lack of memory")?;
        let changes =
            Receiver::from_owned_fd_unchecked(changes).context("watch for lack of memory")?;
        let (sender, container) = (self.sender.clone(), container.to_string());
        let task = tokio::spawn(async move {
            if let Err(error) = follow(&changes, file, &container, &sender).await {
                log::warn!("container {container}: lack of memory will go unnoticed: {error}");
            }
        });
        Ok(Some(task.abort_handle()))
    }
}

async fn follow(
    changes: &Receiver,
    file: PathBuf,
    container: &str,
    sender: &mpsc::Sender<String>,
) -> io::Result<()> {
    let mut seen = 0;
    loop {
        changes.readable().await?;
        match changes.try_read(&mut [0; 4096]) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            read => read?,
        };
        // The cgroup has been removed.
        let Ok(text) = fs::read_to_string(&file) else { return Ok(()) };
        let killed = kills(&text);
        if killed > seen && sender.try_send(container.to_string()).is_err() {
            log::warn!("container {container}: nobody asks for events; one is lost");
        }
        seen = killed;
    }
}

/// How many processes were killed for lack of memory.
fn kills(text: &str) -> u64 {
    let value = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
    value.and_then(|value| value.trim().parse().ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn one_event_per_change_of_the_count_and_none_after_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("memory.events");
        let events = Events::default();
        assert!(events.watch("c1", dir.path()).unwrap().is_none(), "no memory controller");
        fs::write(&file, "low 0\noom_kill 0\noom_group_kill 0\n").unwrap();
        let watcher = events.watch("c1", dir.path()).unwrap().unwrap();
        for count in [0, 1] {
            // As the kernel does it: the file never is empty in between.
            let text = format!("low 1\noom_kill {count}\noom_group_kill 9\n");
            use std::os::unix::fs::FileExt;
            fs::OpenOptions::new()
                .write(true)
                .open(&file)
                .unwrap()
                .write_at(text.as_bytes(), 0)
                .unwrap();
            tokio::task::yield_now().await;
        }
        assert_eq!(events.next().await.as_deref(), Some("c1"));
        watcher.abort();
        let (end, ()) = tokio::join!(events.next(), async { events.close() });
        assert_eq!(end, None);
        assert_eq!(events.next().await, None);
    }
}
