// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! A process of a fake container.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;

use ecr_shim::error::{Error, Kind, Result};
use ecr_shim::sandbox::Output;
use nix::pty::{Winsize, openpty};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use oci_spec::runtime::Process as ProcessSpec;
use tokio::fs::File;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{Mutex, watch};

use super::command::spawn;

type Reader = Mutex<Option<Box<dyn AsyncRead + Send + Unpin>>>;

/// A process, in a group of its own.
pub struct Running {
    pid: Pid,
    stdin: Mutex<Option<Box<dyn AsyncWrite + Send + Unpin>>>,
    stdout: Reader,
    stderr: Reader,
    terminal: Option<OwnedFd>,
    status: watch::Receiver<Option<u32>>,
}

impl Running {
    pub fn start(spec: &ProcessSpec, root: Option<&Path>) -> io::Result<Self> {
        let pty = if spec.terminal().unwrap_or(false) { Some(openpty(None, None)?) } else { None };
        let slave = pty.as_ref().map(|pty| &pty.slave);
        let mut child = spawn(spec, root, slave)?;
        let pid = Pid::from_raw(child.id().unwrap().cast_signed());
        let (sender, status) = watch::channel(None);
        let mut running = Self {
            pid,
            stdin: Mutex::new(None),
            stdout: Mutex::new(None),
            stderr: Mutex::new(None),
            terminal: None,
            status,
        };
        match pty {
            None => {
                running.stdin = Mutex::new(child.stdin.take().map(|end| Box::new(end) as _));
                running.stdout = Mutex::new(child.stdout.take().map(|end| Box::new(end) as _));
                running.stderr = Mutex::new(child.stderr.take().map(|end| Box::new(end) as _));
            }
            Some(pty) => {
                let end = || pty.master.try_clone().map(|fd| File::from_std(fd.into()));
                running.stdin = Mutex::new(Some(Box::new(end()?)));
                running.stdout = Mutex::new(Some(Box::new(end()?)));
                running.terminal = Some(pty.master);
            }
        }
        tokio::spawn(async move {
            let ended = child.wait().await.unwrap();
            let status = ended.code().unwrap_or_else(|| 128 + ended.signal().unwrap());
            sender.send_replace(Some(status.cast_unsigned()));
        });
        Ok(running)
    }

    pub fn kill(&self, signal: i32) {
        let _ = killpg(self.pid, Signal::try_from(signal).unwrap());
    }

    pub async fn wait(&self) -> u32 {
        self.status.clone().wait_for(Option::is_some).await.unwrap().unwrap()
    }

    pub async fn write(&self, data: &[u8]) -> Result<usize> {
        let mut stdin = self.stdin.lock().await;
        let end = stdin.as_mut().ok_or_else(|| failed("stdin is closed"))?;
        // A guest's pipe takes less than it is offered.
        let part = data.len().min(64 << 10);
        end.write_all(&data[..part]).await.map_err(|error| failed(&error))?;
        end.flush().await.map_err(|error| failed(&error))?;
        Ok(part)
    }

    pub async fn close_stdin(&self) {
        if self.terminal.is_none() {
            self.stdin.lock().await.take();
        }
    }

    pub async fn read(&self, output: Output, limit: usize) -> Result<Vec<u8>> {
        let reader = match output {
            Output::Stdout => &self.stdout,
            Output::Stderr => &self.stderr,
        };
        let mut reader = reader.lock().await;
        let end = reader.as_mut().ok_or_else(|| failed("no such stream"))?;
        let mut data = vec![0; limit];
        let read = end.read(&mut data).await.map_err(|error| failed(&error))?;
        data.truncate(read);
        Ok(data)
    }

    pub fn resize(&self, rows: u32, columns: u32) -> Result<()> {
        let terminal = self.terminal.as_ref().ok_or_else(|| failed("no terminal"))?;
        let size = Winsize {
            ws_row: u16::try_from(rows).unwrap(),
            ws_col: u16::try_from(columns).unwrap(),
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        // SAFETY: the descriptor is open, and `size` is what the request reads.
        let done = unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
        if done == 0 { Ok(()) } else { Err(failed(&io::Error::last_os_error())) }
    }
}

fn failed(why: &(impl std::fmt::Display + ?Sized)) -> Error {
    Error::new(Kind::Internal, why.to_string())
}
