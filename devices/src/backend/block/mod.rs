// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What is behind a block device: a raw file or a block device of the host, and how requests reach it.
//!
//! [`BlockFile`] opens and describes the file. A [`BlockBackend`] carries [`Operation`]s to it:
//! `uring` without blocking its thread, `sync` with plain system calls where io_uring is not allowed.
//! Each queue has a backend of its own, used by one thread at a time, so there is nothing to lock.
//!
//! Left out: image formats with a structure (qcow2), locks against other users of the file.

mod file;
mod sync;
mod transfer;
mod uring;

use std::fmt::Debug;
use std::io;

use vmm_sys_util::eventfd::EventFd;

pub use file::{BlockFile, OpenError};
pub use transfer::Transfer;

/// How requests reach the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum IoEngine {
    /// io_uring where the host allows it, else plain system calls.
    #[default]
    Auto,
    /// io_uring or an error.
    Uring,
    /// Plain system calls, which hold up the other queues of the thread.
    Sync,
}

/// Something to do with the file. Offsets and lengths are in bytes and were checked by the caller.
#[derive(Debug)]
pub enum Operation {
    /// Read from the file.
    Read {
        /// Where in the file.
        offset: u64,
        /// Filled with what is read.
        into: Transfer,
    },
    /// Write to the file.
    Write {
        /// Where in the file.
        offset: u64,
        /// What is written.
        from: Transfer,
        /// Complete only when the data would survive a power failure.
        durable: bool,
    },
    /// Make all writes that have completed survive a power failure.
    Flush,
    /// The contents no longer matter; a hint.
    Discard {
        /// Where in the file.
        offset: u64,
        /// Size in bytes, not zero.
        len: u64,
    },
    /// Make the contents read as zeros.
    WriteZeroes {
        /// Where in the file.
        offset: u64,
        /// Size in bytes, not zero.
        len: u64,
        /// The space may be given back to the host.
        unmap: bool,
    },
}

/// Carries the operations of one queue to a file.
pub trait BlockBackend: Debug + Send {
    /// The calling thread is the one that will use `self` from now on, until it is dropped.
    ///
    /// # Errors
    /// The host refused; `self` cannot be used.
    fn start(&mut self) -> io::Result<()>;

    /// Signalled when it is time for [`Self::complete`]; `None` where all operations complete at once.
    fn completion(&self) -> Option<&EventFd>;

    /// Take `operation`. `tag` names it, is less than the depth that the backend was made for, and is not
    /// in use.
    fn queue(&mut self, tag: u16, operation: Operation);

    /// Start what was queued, in one system call, and return the next operation that is done, by its tag.
    /// To be called until it returns `None`.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`]: the host is short of memory, call again later. Any other: `self`
    /// cannot be used any more.
    fn complete(&mut self) -> io::Result<Option<(u16, io::Result<()>)>>;

    /// Start what was queued and wait until something is done. Only while something is in flight.
    ///
    /// # Errors
    /// As [`Self::complete`].
    fn wait(&mut self) -> io::Result<()>;
}

/// A backend for at most `depth` operations at a time on `file`.
///
/// # Errors
/// io_uring was asked for and the host does not allow it.
pub fn backend(
    file: &BlockFile,
    engine: IoEngine,
    depth: u16,
) -> io::Result<Box<dyn BlockBackend>> {
    let uring = match engine {
        IoEngine::Sync => return Ok(Box::new(sync::SyncBackend::new(file.clone()))),
        IoEngine::Auto | IoEngine::Uring => uring::UringBackend::new(file.clone(), depth),
    };
    match uring {
        Ok(uring) => Ok(Box::new(uring)),
        Err(error) if engine == IoEngine::Auto => {
            log::info!("no io_uring for {} ({error}): plain system calls", file.path().display());
            Ok(Box::new(sync::SyncBackend::new(file.clone())))
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests;
