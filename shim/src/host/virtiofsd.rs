// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! virtiofsd: the process that serves a sandbox's shared directory to its guest over a vhost-user socket.
//!
//! The socket is made and listened on here and handed to virtiofsd, so that whoever connects need not wait for it to
//! start. What it says goes to the log, and its last words into the error of a sandbox that lost it.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::Signal;
use parking_lot::Mutex;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::unix::pipe;
use tokio::sync::watch;
use tokio::time::timeout;

use crate::host::spawn::{self, Child, SpawnRequest};

/// The number at which virtiofsd finds its listening socket.
const SOCKET_FD: i32 = 3;

/// Lines of its output that a failure report shows.
const REPORTED_LINES: usize = 10;

/// How long its output is waited for after its end.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// Longer lines are cut.
const MAX_LINE: usize = 1024;

/// How to run virtiofsd.
#[derive(Debug)]
pub struct VirtiofsdRequest<'a> {
    /// Its program.
    pub program: &'a Path,
    /// The directory to serve.
    pub directory: &'a Path,
    /// Where to make the socket.
    pub socket: &'a Path,
    /// Its cache mode: `never`, `metadata`, `auto` or `always`.
    pub cache: &'a str,
    /// More arguments.
    pub extra_args: &'a [String],
    /// Let it say more.
    pub debug: bool,
    /// The network namespace to run in.
    pub netns: Option<&'a Path>,
}

/// A running virtiofsd. Dropping it kills it.
pub struct Virtiofsd {
    child: Child,
    socket: PathBuf,
    said: Arc<Mutex<VecDeque<String>>>,
    /// Closed when everything it said has been read.
    read: watch::Receiver<()>,
}

impl fmt::Debug for Virtiofsd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Virtiofsd").field("child", &self.child).finish_non_exhaustive()
    }
}

impl Virtiofsd {
    /// Start it. Needs a tokio runtime, which reads what it says.
    ///
    /// # Errors
    /// The socket cannot be made, or the program cannot be started.
    pub fn start(request: &VirtiofsdRequest<'_>) -> Result<Self> {
        let listener = listen(request.socket)?;
        let (said_there, said_here) = output_pipe()?;
        let child = spawn::spawn(SpawnRequest {
            program: request.program.to_str().context("the path of virtiofsd is no text")?,
            args: arguments(request),
            fds: vec![(listener.into(), SOCKET_FD), (said_there.try_clone()?, 1), (said_there, 2)],
            netns: request.netns,
            ..SpawnRequest::default()
        });
        let child = child.inspect_err(|_| {
            let _ = fs::remove_file(request.socket);
        })?;
        let said = Arc::new(Mutex::new(VecDeque::new()));
        let (reading, read) = watch::channel(());
        let reader = listen_to(said_here, Arc::clone(&said));
        tokio::spawn(async move {
            reader.await;
            drop(reading);
        });
        Ok(Self { child, socket: request.socket.to_owned(), said, read })
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Returns when it has ended, with how, and its last words.
    pub async fn ended(&self) -> String {
        let how = match self.child.wait().await {
            Ok(status) => status.to_string(),
            Err(error) => format!("{error:#}"),
        };
        // A child of its own may hold the pipe open.
        let _ = timeout(LAST_WORDS, self.read.clone().changed()).await;
        let said: Vec<String> = self.said.lock().iter().cloned().collect();
        if said.is_empty() { how } else { format!("{how}; it said last: {}", said.join(" | ")) }
    }

    /// Kill it, wait for it, and remove its socket.
    pub async fn stop(&self) -> Result<()> {
        self.child.signal(Signal::SIGKILL)?;
        self.child.wait().await?;
        match fs::remove_file(&self.socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("remove {}", self.socket.display()))
            }
            _ => Ok(()),
        }
    }
}

fn listen(path: &Path) -> Result<UnixListener> {
    if let Err(error) = fs::remove_file(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        return Err(error).with_context(|| format!("remove the old socket {}", path.display()));
    }
    UnixListener::bind(path).with_context(|| format!("listen on {}", path.display()))
}

/// virtiofsd's end of a pipe, and ours.
fn output_pipe() -> Result<(OwnedFd, pipe::Receiver)> {
    let (ours, theirs) = io::pipe().context("create a pipe")?;
    let ours = pipe::Receiver::from_owned_fd(ours.into()).context("read from a pipe")?;
    Ok((theirs.into(), ours))
}

/// The options of the Rust virtiofsd (1.x), the only one that is still kept.
fn arguments(request: &VirtiofsdRequest<'_>) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = vec![
        format!("--fd={SOCKET_FD}").into(),
        "--shared-dir".into(),
        request.directory.into(),
        format!("--cache={}", request.cache).into(),
        format!("--log-level={}", if request.debug { "debug" } else { "warn" }).into(),
    ];
    arguments.extend(request.extra_args.iter().map(OsString::from));
    arguments
}

async fn listen_to(pipe: pipe::Receiver, said: Arc<Mutex<VecDeque<String>>>) {
    let mut lines = BufReader::new(pipe).split(b'\n');
    while let Ok(Some(line)) = lines.next_segment().await {
        let line = String::from_utf8_lossy(&line[..line.len().min(MAX_LINE)]).trim().to_owned();
        if line.is_empty() {
            continue;
        }
        log::info!("virtiofsd: {line}");
        let mut said = said.lock();
        if said.len() == REPORTED_LINES {
            said.pop_front();
        }
        said.push_back(line);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn request<'a>(
        program: &'a Path,
        directory: &'a Path,
        socket: &'a Path,
    ) -> VirtiofsdRequest<'a> {
        VirtiofsdRequest {
            program,
            directory,
            socket,
            cache: "auto",
            extra_args: &[],
            debug: false,
            netns: None,
        }
    }

    fn script(directory: &Path, text: &str) -> PathBuf {
        let path = directory.join("daemon");
        fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    #[tokio::test]
    async fn its_last_words_tell_why_it_ended() {
        let dir = tempfile::tempdir().unwrap();
        let program = script(dir.path(), "echo bad directory >&2; exit 3");
        let socket = dir.path().join("s");
        let daemon = Virtiofsd::start(&request(&program, dir.path(), &socket)).unwrap();
        let why = daemon.ended().await;
        assert!(why.contains("exit status: 3") && why.ends_with("bad directory"), "{why}");
    }

    #[tokio::test]
    async fn the_socket_is_there_at_once_and_gone_at_last() {
        let dir = tempfile::tempdir().unwrap();
        let program = script(dir.path(), "exec sleep 100");
        let socket = dir.path().join("s");
        let daemon = Virtiofsd::start(&request(&program, dir.path(), &socket)).unwrap();
        assert!(std::os::unix::net::UnixStream::connect(&socket).is_ok());
        daemon.stop().await.unwrap();
        assert!(!socket.exists());
    }

    #[tokio::test]
    async fn a_missing_program_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let error = Virtiofsd::start(&request(Path::new("/no/virtiofsd"), dir.path(), &socket));
        assert!(format!("{:#}", error.unwrap_err()).contains("/no/virtiofsd"));
        assert!(!socket.exists());
    }

    #[test]
    fn arguments_name_directory_and_cache() {
        let extra = ["--thread-pool-size=1".to_owned()];
        let request = VirtiofsdRequest {
            extra_args: &extra,
            ..request(Path::new("/v"), Path::new("/d"), Path::new("/s"))
        };
        let expected = [
            "--fd=3",
            "--shared-dir",
            "/d",
            "--cache=auto",
            "--log-level=warn",
            "--thread-pool-size=1",
        ];
        assert_eq!(arguments(&request), expected);
    }
}
