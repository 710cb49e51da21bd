// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Where standard input comes from.
//!
//! The writers of a FIFO may come and go, so that its end is not the end of standard input: see [`Source::reopen`].

use std::io::{self, ErrorKind};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use tokio::fs::File;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;

use super::uri::Place;
use crate::error::{Error, Kind, Result};

/// Standard input, opened.
#[derive(Debug)]
pub enum Source {
    /// A FIFO.
    Fifo {
        /// Its reading end.
        end: pipe::Receiver,
        /// Where it is.
        path: PathBuf,
    },
    /// Anything else: ends where it ends.
    File(File),
}

impl Source {
    /// Open it.
    pub async fn open(place: &Place) -> Result<Self> {
        match place {
            Place::Fifo(path) | Place::File(path) => open(path).await.map_err(|error| {
                Error::new(Kind::InvalidArgument, format!("open stdin {}: {error}", path.display()))
            }),
            Place::Program { path, .. } => Err(Error::new(
                Kind::InvalidArgument,
                format!("stdin cannot come from a logging program ({})", path.display()),
            )),
        }
    }

    /// Read some; nothing at the end, which for a FIFO means that it has no writer any more.
    pub async fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Source::Fifo { end, .. } => end.read(buffer).await,
            Source::File(file) => file.read(buffer).await,
        }
    }

    /// Read some of what is there already; nothing if there is nothing.
    pub async fn read_present(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Source::Fifo { .. } => self.read_now(buffer).map(Option::unwrap_or_default),
            Source::File(file) => file.read(buffer).await,
        }
    }

    /// Read without waiting: `None` if there is a writer who has written nothing, no bytes if there is no writer. The
    /// FIFO itself is asked: what the runtime knows of it may be old.
    pub fn read_now(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        match self {
            Source::Fifo { end, .. } => match nix::unistd::read(end.as_fd(), buffer) {
                Ok(read) => Ok(Some(read)),
                Err(Errno::EAGAIN) => Ok(None),
                Err(error) => Err(error.into()),
            },
            Source::File(_) => Ok(Some(0)),
        }
    }

    /// Wait for other writers, if there can be any: a FIFO that has lost its last one has to be opened again before it
    /// sees the next.
    pub fn reopen(&mut self) -> io::Result<bool> {
        match self {
            Source::Fifo { end, path } => {
                // What a new writer has written already stays in the FIFO, since it is open twice for a moment.
                *end = pipe::OpenOptions::new().open_receiver(path)?;
                Ok(true)
            }
            Source::File(_) => Ok(false),
        }
    }
}

async fn open(path: &Path) -> io::Result<Source> {
    match pipe::OpenOptions::new().open_receiver(path) {
        Ok(end) => Ok(Source::Fifo { end, path: path.to_owned() }),
        Err(error) if error.kind() == ErrorKind::InvalidInput => {
            File::open(path).await.map(Source::File)
        }
        Err(error) => Err(error),
    }
}
