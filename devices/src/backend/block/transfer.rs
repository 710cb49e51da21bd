// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Pieces of guest memory that the host kernel reads or fills, without a copy.

use std::fmt;
use std::sync::Arc;

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryError};

use crate::memory::GuestMemory;

/// Most pieces in one system call: Linux' `UIO_MAXIOV`.
const MAX_PIECES: usize = 1024;

/// Guest memory that takes part in a transfer. It holds the view that its pieces were found in, so they
/// stay mapped as long as it lives, whatever is plugged out of the guest meanwhile.
pub struct Transfer {
    /// Keeps the memory behind `pieces` mapped.
    memory: Arc<GuestMemory>,
    pieces: Vec<libc::iovec>,
    /// How many of the pieces are done.
    done: usize,
    /// Bytes in the pieces that are not done.
    left: u64,
}

// SAFETY: the pointers in `pieces` lead to guest memory, which any thread of this process may access
// (guests change it at any time as well), and which `memory` keeps mapped.
unsafe impl Send for Transfer {}

impl fmt::Debug for Transfer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Transfer")
            .field("pieces", &self.remaining().len())
            .field("left", &self.left)
            .finish()
    }
}

impl Transfer {
    /// A transfer of nothing yet.
    pub fn new(memory: Arc<GuestMemory>) -> Self {
        Self { memory, pieces: Vec::new(), done: 0, left: 0 }
    }

    /// Append `len` bytes from `address` on.
    ///
    /// # Errors
    /// They are not all in guest memory.
    pub fn push(&mut self, address: GuestAddress, len: u32) -> Result<(), GuestMemoryError> {
        for slice in self.memory.get_slices(address, len as usize) {
            let slice = slice?;
            self.pieces.push(libc::iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            });
            self.left += slice.len() as u64;
        }
        Ok(())
    }

    /// Bytes still to be transferred.
    pub fn left(&self) -> u64 {
        self.left
    }

    /// The pieces still to be transferred, as many as one system call takes. They do not move in memory
    /// while `self` is not changed.
    pub(super) fn pieces(&self) -> &[libc::iovec] {
        let remaining = self.remaining();
        &remaining[..remaining.len().min(MAX_PIECES)]
    }

    /// Count the first `bytes` as transferred.
    pub(super) fn advance(&mut self, bytes: u64) {
        let mut bytes = bytes.min(self.left);
        self.left -= bytes;
        while let Some(piece) = self.pieces.get_mut(self.done) {
            let len = piece.iov_len as u64;
            if bytes < len {
                // Less than the length of the piece, so it fits a usize and stays inside.
                piece.iov_base = piece.iov_base.cast::<u8>().wrapping_add(bytes as usize).cast();
                piece.iov_len -= bytes as usize;
                return;
            }
            bytes -= len;
            self.done += 1;
        }
    }

    /// Whether all pieces start and end at multiples of `start` and `len`, powers of two.
    pub(super) fn is_aligned(&self, start: u32, len: u32) -> bool {
        let (start, len) = (start as usize - 1, len as usize - 1);
        self.remaining()
            .iter()
            .all(|piece| piece.iov_base as usize & start == 0 && piece.iov_len & len == 0)
    }

    fn remaining(&self) -> &[libc::iovec] {
        &self.pieces[self.done..]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two regions that touch, and a hole behind them.
    fn memory() -> Arc<GuestMemory> {
        let ranges = [(GuestAddress(0), 0x1000), (GuestAddress(0x1000), 0x1000)];
        Arc::new(GuestMemory::from_ranges(&ranges).unwrap())
    }

    fn lengths(transfer: &Transfer) -> Vec<usize> {
        transfer.pieces().iter().map(|piece| piece.iov_len).collect()
    }

    #[test]
    fn a_buffer_across_regions_is_two_pieces() {
        let mut transfer = Transfer::new(memory());
        transfer.push(GuestAddress(0xe00), 0x400).unwrap();
        assert_eq!(lengths(&transfer), [0x200, 0x200]);
        assert!(transfer.push(GuestAddress(0x1f00), 0x200).is_err());
    }

    #[test]
    fn what_is_done_is_not_done_again() {
        let mut transfer = Transfer::new(memory());
        transfer.push(GuestAddress(0), 100).unwrap();
        transfer.push(GuestAddress(0x100), 50).unwrap();
        let first = transfer.pieces()[0].iov_base as usize;
        transfer.advance(30);
        assert_eq!(lengths(&transfer), [70, 50]);
        assert_eq!(transfer.pieces()[0].iov_base as usize, first + 30);
        transfer.advance(70);
        assert_eq!((lengths(&transfer), transfer.left()), (vec![50], 50));
        transfer.advance(u64::MAX);
        assert_eq!((transfer.pieces().len(), transfer.left()), (0, 0));
    }

    #[test]
    fn one_call_takes_so_many_pieces() {
        let mut transfer = Transfer::new(memory());
        for n in 0..MAX_PIECES as u64 + 1 {
            transfer.push(GuestAddress(n), 1).unwrap();
        }
        assert_eq!(transfer.pieces().len(), MAX_PIECES);
        transfer.advance(MAX_PIECES as u64);
        assert_eq!(transfer.pieces().len(), 1);
    }

    #[test]
    fn alignment_is_of_starts_and_lengths() {
        let mut transfer = Transfer::new(memory());
        transfer.push(GuestAddress(0x200), 0x400).unwrap();
        assert!(transfer.is_aligned(512, 512));
        assert!(!transfer.is_aligned(1024, 512));
        assert!(!transfer.is_aligned(512, 2048));
    }
}
