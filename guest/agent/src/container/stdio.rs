// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Standard streams of a process. Nothing is buffered here: the pipe or terminal holds what has not been read or
//! written, and makes the other side wait.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use anyhow::{Context, Result};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::pipe2;
use parking_lot::Mutex;
use tokio::net::unix::pipe::{Receiver, Sender};

/// The most that one read returns, whatever is asked for: well below the protocol's largest message.
const MAX_READ: usize = 1 << 20;

/// The agent's ends of the standard streams of one process. A closed one is gone.
#[derive(Debug)]
pub struct Streams {
    stdin: Mutex<Option<Arc<Sender>>>,
    stdout: Output,
    stderr: Output,
    terminal: Option<OwnedFd>,
}

/// One direction out of a process. Gone after its end.
#[derive(Debug)]
struct Output(Mutex<Option<Arc<Receiver>>>);

/// Which output is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    Stdout,
    Stderr,
}

impl Streams {
    /// Pipes, and the process's ends of them in the usual order. `size` is the capacity in bytes, 0 for the default.
    pub fn pipes(size: u32) -> Result<(Self, Vec<OwnedFd>)> {
        let make = || {
            let (reader, writer) = pipe2(OFlag::O_CLOEXEC).context("make a pipe")?;
            if size > 0 {
                let size = i32::try_from(size).unwrap_or(i32::MAX);
                fcntl(&reader, FcntlArg::F_SETPIPE_SZ(size))
                    .with_context(|| format!("make a pipe of {size} bytes"))?;
            }
            anyhow::Ok((reader, writer))
        };
        let (stdin, to_stdin) = make()?;
        let (from_stdout, stdout) = make()?;
        let (from_stderr, stderr) = make()?;
        let streams = Streams {
            stdin: Mutex::new(Some(sender(to_stdin)?)),
            stdout: Output(Mutex::new(Some(receiver(from_stdout)?))),
            stderr: Output(Mutex::new(Some(receiver(from_stderr)?))),
            terminal: None,
        };
        Ok((streams, vec![stdin, stdout, stderr]))
    }

    /// A terminal, which is input and output in one.
    pub fn terminal(master: OwnedFd) -> Result<Self> {
        let another = || master.try_clone().context("duplicate the terminal");
        Ok(Streams {
            stdin: Mutex::new(Some(sender(another()?)?)),
            stdout: Output(Mutex::new(Some(receiver(another()?)?))),
            stderr: Output(Mutex::new(None)),
            terminal: Some(master),
        })
    }

    /// Write all of `data`, as fast as the process reads it.
    pub async fn write(&self, data: &[u8]) -> io::Result<()> {
        let stdin = self.stdin.lock().clone().ok_or(io::ErrorKind::BrokenPipe)?;
        let mut rest = data;
        while !rest.is_empty() {
            stdin.writable().await?;
            match stdin.try_write(rest) {
                Ok(written) => rest = rest.get(written..).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// The process reads the end of its input after what has been written. A terminal has no such end.
    pub fn close_stdin(&self) {
        if self.terminal.is_none() {
            self.stdin.lock().take();
        }
    }

    /// Wait for output, and take up to `length` bytes of it; nothing at its end.
    pub async fn read(&self, source: Source, length: usize) -> io::Result<Vec<u8>> {
        let output = match source {
            Source::Stdout => &self.stdout,
            Source::Stderr => &self.stderr,
        };
        let Some(reader) = output.0.lock().clone() else { return Ok(Vec::new()) };
        let mut data = vec![0; length.clamp(1, MAX_READ)];
        let length = loop {
            reader.readable().await?;
            match reader.try_read(&mut data) {
                Ok(length) => break length,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // What a terminal says when nobody has its other end any more.
                Err(error) if error.raw_os_error() == Some(libc::EIO) => break 0,
                Err(error) => return Err(error),
            }
        };
        if length == 0 {
            output.0.lock().take();
        }
        data.truncate(length);
        data.shrink_to_fit();
        Ok(data)
    }

    /// Set the size of the terminal; `None` if there is none.
    pub fn resize(&self, rows: u32, columns: u32) -> Option<Result<()>> {
        let terminal = self.terminal.as_ref()?;
        Some(super::helper::resize(terminal.as_fd(), rows, columns))
    }
}

fn sender(fd: OwnedFd) -> Result<Arc<Sender>> {
    set_nonblocking(&fd)?;
    Ok(Arc::new(Sender::from_owned_fd_unchecked(fd).context("watch a stream")?))
}

fn receiver(fd: OwnedFd) -> Result<Arc<Receiver>> {
    set_nonblocking(&fd)?;
    Ok(Arc::new(Receiver::from_owned_fd_unchecked(fd).context("watch a stream")?))
}

/// Ours only: the process's end of a pipe is another open file.
fn set_nonblocking(fd: &OwnedFd) -> Result<()> {
    let flags = fcntl(fd, FcntlArg::F_GETFL).context("look at a stream")?;
    let flags = OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK;
    fcntl(fd, FcntlArg::F_SETFL(flags)).context("make a stream non-blocking")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::{Read, Write};

    #[tokio::test(flavor = "current_thread")]
    async fn output_until_its_end() {
        let (streams, theirs) = Streams::pipes(0).unwrap();
        let mut theirs: Vec<File> = theirs.into_iter().map(File::from).collect();
        theirs[1].write_all(b"hello").unwrap();
        assert_eq!(streams.read(Source::Stdout, 4).await.unwrap(), b"hell");
        assert_eq!(streams.read(Source::Stdout, usize::MAX).await.unwrap(), b"o");
        drop(theirs);
        assert_eq!(streams.read(Source::Stdout, 4).await.unwrap(), b"");
        assert_eq!(streams.read(Source::Stdout, 4).await.unwrap(), b"", "for ever");
        assert_eq!(streams.read(Source::Stderr, 4).await.unwrap(), b"");
        assert!(streams.stdout.0.lock().is_none(), "the pipe is closed");
        assert!(streams.resize(1, 1).is_none());
    }

    #[tokio::test(flavor = "current_thread")]
    async fn input_waits_for_its_reader() {
        let (streams, theirs) = Streams::pipes(4096).unwrap();
        let mut input = File::from(theirs.into_iter().next().unwrap());
        let data = vec![7; 1 << 20];
        let reader = tokio::task::spawn_blocking(move || {
            let mut all = Vec::new();
            input.read_to_end(&mut all).map(|_| all)
        });
        streams.write(&data).await.unwrap();
        streams.close_stdin();
        assert_eq!(reader.await.unwrap().unwrap(), data);
        assert!(streams.write(b"more").await.is_err());
    }
}
