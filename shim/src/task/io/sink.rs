// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Where output goes.
//!
//! A FIFO is open for reading, too, so that its reader may come and go, as containerd does when it restarts: meanwhile
//! it fills, and the process waits. A process that has ended cannot wait for ever. [`Sink::let_go`] gives the reading
//! end up; then a FIFO that nobody reads breaks, and one that is read does not.

use std::io::{self, ErrorKind};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use nix::fcntl::{FcntlArg, fcntl};
use tokio::fs::{File, OpenOptions, create_dir_all};
use tokio::io::AsyncWriteExt;
use tokio::net::unix::pipe;

use super::uri::Place;
use crate::error::{Error, Kind, Result};

/// A FIFO holds so much where the system allows it: fewer wake-ups.
const FIFO_SIZE: i32 = 256 << 10;

/// An output stream's end, opened.
#[derive(Debug, Default)]
pub enum Sink {
    /// Nobody wants it.
    #[default]
    Nowhere,
    /// A FIFO.
    Fifo {
        /// Its writing end.
        end: pipe::Sender,
        /// Where it is, as long as we read it, too. A pipe of ours is nowhere.
        path: Option<PathBuf>,
    },
    /// A file.
    File(File),
}

impl Sink {
    /// Open it.
    pub async fn open(place: &Place) -> Result<Self> {
        let (path, opened) = match place {
            Place::Fifo(path) => (path, open_fifo(path).await),
            Place::File(path) => (path, open_file(path).await),
            Place::Program { path, .. } => {
                (path, Err(io::Error::other("a logging program takes stdout, and with it stderr")))
            }
        };
        opened.map_err(|error| {
            let text = format!("open output stream {}: {error}", path.display());
            Error::new(Kind::InvalidArgument, text)
        })
    }

    /// The writing end of a pipe.
    pub(crate) fn pipe(end: pipe::Sender) -> Self {
        Sink::Fifo { end, path: None }
    }

    /// Write some of `data`; returns how much. Nothing is lost if this is dropped where it waits.
    pub async fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        match self {
            Sink::Nowhere => Ok(data.len()),
            Sink::Fifo { end, .. } => loop {
                end.writable().await?;
                match end.try_write(data) {
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                    result => return result,
                }
            },
            Sink::File(file) => {
                file.write_all(data).await?;
                file.flush().await.map(|()| data.len())
            }
        }
    }

    /// Be no reader of the FIFO any more.
    pub fn let_go(&mut self) -> io::Result<()> {
        if let Sink::Fifo { end, path } = self
            && let Some(path) = path.take()
        {
            *end = pipe::OpenOptions::new().open_sender(path)?;
        }
        Ok(())
    }
}

async fn open_fifo(path: &Path) -> io::Result<Sink> {
    match pipe::OpenOptions::new().read_write(true).open_sender(path) {
        Ok(end) => {
            // The system may not allow it, or it is larger already.
            let _ = fcntl(end.as_fd(), FcntlArg::F_SETPIPE_SZ(FIFO_SIZE));
            Ok(Sink::Fifo { end, path: Some(path.to_owned()) })
        }
        // Something else than a FIFO, such as /dev/null.
        Err(error) if error.kind() == ErrorKind::InvalidInput => {
            OpenOptions::new().append(true).open(path).await.map(Sink::File)
        }
        Err(error) => Err(error),
    }
}

async fn open_file(path: &Path) -> io::Result<Sink> {
    if let Some(directory) = path.parent() {
        create_dir_all(directory).await?;
    }
    OpenOptions::new().create(true).append(true).open(path).await.map(Sink::File)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::stat::Mode;
    use nix::unistd::mkfifo;
    use std::time::Duration;
    use tokio::io::AsyncReadExt;

    #[tokio::test]
    async fn a_fifo_outlives_its_readers_until_it_is_let_go() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        mkfifo(&path, Mode::S_IRWXU).unwrap();
        let mut sink = Sink::open(&Place::Fifo(path.clone())).await.unwrap();
        assert_eq!(sink.write(b"one").await.unwrap(), 3);
        let mut buffer = [0; 8];
        let mut reader = pipe::OpenOptions::new().open_receiver(&path).unwrap();
        assert_eq!(reader.read(&mut buffer).await.unwrap(), 3);
        drop(reader);
        assert_eq!(sink.write(b"two").await.unwrap(), 3);
        let mut reader = pipe::OpenOptions::new().open_receiver(&path).unwrap();
        sink.let_go().unwrap();
        assert_eq!(sink.write(b"!").await.unwrap(), 1);
        assert_eq!(reader.read(&mut buffer).await.unwrap(), 4);
        drop(reader);
        assert_eq!(sink.write(b"x").await.unwrap_err().kind(), ErrorKind::BrokenPipe);
    }

    #[tokio::test]
    async fn a_full_fifo_waits() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        mkfifo(&path, Mode::S_IRWXU).unwrap();
        let mut sink = Sink::open(&Place::Fifo(path)).await.unwrap();
        let block = vec![0; 64 << 10];
        let all = async {
            loop {
                sink.write(&block).await.unwrap();
            }
        };
        assert!(tokio::time::timeout(Duration::from_millis(50), all).await.is_err());
    }

    #[tokio::test]
    async fn files_grow_and_devices_are_taken() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b/log");
        for _ in 0..2 {
            let mut sink = Sink::open(&Place::File(path.clone())).await.unwrap();
            assert_eq!(sink.write(b"line\n").await.unwrap(), 5);
        }
        assert_eq!(std::fs::read(&path).unwrap(), b"line\nline\n");
        Sink::open(&Place::Fifo("/dev/null".into())).await.unwrap().write(b"x").await.unwrap();
        let error = Sink::open(&Place::Fifo(dir.path().join("none"))).await.unwrap_err();
        assert!(error.to_string().contains("none"), "{error}");
    }
}
