// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Where standard input comes from.
//!
//! A FIFO is open for writing, too. Its writers may come and go, as containerd does when it restarts; only CloseIO ends
//! it, as with containerd's own shim.

use std::io::{self, ErrorKind};
use std::path::Path;

use tokio::fs::File;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;

use super::uri::Place;
use crate::error::{Error, Kind, Result};

/// Standard input, opened.
#[derive(Debug)]
pub enum Source {
    /// A FIFO.
    Fifo(pipe::Receiver),
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

    /// Read some; nothing at the end.
    pub async fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Source::Fifo(fifo) => fifo.read(buffer).await,
            Source::File(file) => file.read(buffer).await,
        }
    }

    /// Read some of what is there already; nothing if there is nothing.
    pub async fn read_present(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Source::Fifo(fifo) => match fifo.try_read(buffer) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(0),
                result => result,
            },
            Source::File(file) => file.read(buffer).await,
        }
    }
}

async fn open(path: &Path) -> io::Result<Source> {
    match pipe::OpenOptions::new().read_write(true).open_receiver(path) {
        Ok(fifo) => Ok(Source::Fifo(fifo)),
        Err(error) if error.kind() == ErrorKind::InvalidInput => {
            File::open(path).await.map(Source::File)
        }
        Err(error) => Err(error),
    }
}
