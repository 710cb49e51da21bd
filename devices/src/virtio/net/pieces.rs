// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Pieces of memory that one system call fills or takes: readv(2), writev(2).

use std::io;
use std::os::fd::RawFd;

use vm_memory::GuestMemoryBackend;

use crate::memory::GuestMemory;
use crate::virtio::queue::{RingError, Segment};

/// Most pieces in one system call: Linux' `UIO_MAXIOV`.
pub(super) const MAX_PIECES: usize = 1024;

/// Room for a list of pieces, kept from call to call.
#[derive(Debug, Default)]
pub(super) struct Scratch(Vec<libc::iovec>);

// SAFETY: what the pointers lead to is used only through `Pieces`, which fills the list anew from memory
// that it borrows; what an earlier one left behind is never followed.
unsafe impl Send for Scratch {}

impl Scratch {
    /// Begin a list of pieces of `memory`.
    pub(super) fn begin<'a>(&'a mut self, memory: &'a GuestMemory) -> Pieces<'a> {
        self.0.clear();
        Pieces { list: &mut self.0, memory }
    }
}

/// A list of pieces of memory, all of which stay where they are as long as it lives.
pub(super) struct Pieces<'a> {
    list: &'a mut Vec<libc::iovec>,
    memory: &'a GuestMemory,
}

impl<'a> Pieces<'a> {
    /// Append a piece of guest memory.
    ///
    /// # Errors
    /// [`RingError::Memory`]; not with the memory that its chain was checked against.
    pub(super) fn push(&mut self, segment: Segment) -> Result<(), RingError> {
        for slice in self.memory.get_slices(segment.address, segment.len as usize) {
            let slice = slice.map_err(|_| RingError::Memory {
                what: "buffer",
                address: segment.address.0,
                len: segment.len.into(),
            })?;
            self.list.push(libc::iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            });
        }
        Ok(())
    }

    /// Append a piece of this process's own memory.
    pub(super) fn push_own(&mut self, memory: &'a mut [u8]) {
        self.list.push(libc::iovec { iov_base: memory.as_mut_ptr().cast(), iov_len: memory.len() });
    }

    /// Whether there are more than a system call takes.
    pub(super) fn are_too_many(&self) -> bool {
        self.list.len() > MAX_PIECES
    }

    /// Fill the pieces from `fd`; says with how many bytes.
    pub(super) fn read_from(self, fd: RawFd) -> io::Result<usize> {
        // SAFETY: each piece is guest memory, which anybody may write at any time and which `self.memory`
        // keeps mapped, or memory that is borrowed for as long as the list.
        let result = unsafe { libc::readv(fd, self.list.as_ptr(), self.count()) };
        usize::try_from(result).map_err(|_| io::Error::last_os_error())
    }

    /// Put the pieces out to `fd`; says how many bytes.
    pub(super) fn write_to(self, fd: RawFd) -> io::Result<usize> {
        // SAFETY: as for `read_from`.
        let result = unsafe { libc::writev(fd, self.list.as_ptr(), self.count()) };
        usize::try_from(result).map_err(|_| io::Error::last_os_error())
    }

    fn count(&self) -> libc::c_int {
        // More than MAX_PIECES the kernel refuses.
        libc::c_int::try_from(self.list.len()).unwrap_or(libc::c_int::MAX)
    }
}
