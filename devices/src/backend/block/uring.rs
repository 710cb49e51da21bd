// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Operations through an io_uring of their own.
//!
//! Newer kernels are told that one thread uses the ring and when it looks at completions, so that nothing
//! interrupts it. In that mode the ring's own descriptor wakes nobody, hence the eventfd.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::mem;
use std::os::fd::AsRawFd;
use std::sync::atomic::{Ordering, fence};

use io_uring::squeue::Entry;
use io_uring::types::{Fixed, FsyncFlags};
use io_uring::{Builder, IoUring, opcode};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::file::{DISCARD_MODE, is_unsupported, zero_mode};
use super::{BlockBackend, BlockFile, Operation};

pub(super) struct UringBackend {
    file: BlockFile,
    ring: IoUring,
    /// The kernel signals it when there are completions to look for.
    completion: EventFd,
    /// What the kernel works on, by tag. It owns the memory that the kernel was told of, and is not
    /// changed before the kernel is done with it.
    in_flight: Box<[Option<Operation>]>,
    /// Done without the ring.
    done: VecDeque<(u16, io::Result<()>)>,
}

impl fmt::Debug for UringBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UringBackend")
            .field("file", &self.file)
            .field("in_flight", &self.in_flight_count())
            .finish()
    }
}

impl UringBackend {
    pub(super) fn new(file: BlockFile, depth: u16) -> io::Result<Self> {
        let ring = ring(u32::from(depth))?;
        // The ring holds references of its own to the files.
        ring.submitter().register_files(&file.descriptors())?;
        let completion = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        ring.submitter().register_eventfd(completion.as_raw_fd())?;
        let in_flight = (0..depth).map(|_| None).collect();
        Ok(Self { file, ring, completion, in_flight, done: VecDeque::new() })
    }

    fn in_flight_count(&self) -> usize {
        self.in_flight.iter().flatten().count()
    }

    /// Tell the ring of the operation that stands in `in_flight` under `tag`.
    fn push(&mut self, tag: u16) {
        let slot = &mut self.in_flight[usize::from(tag)];
        let Some(operation) = slot else { return };
        let entry = entry(&self.file, operation).user_data(u64::from(tag));
        // SAFETY: the entry points to pieces of guest memory and to their list. Both belong to the
        // operation, which stays in `in_flight`, unchanged, until the kernel has completed it.
        if unsafe { self.ring.submission().push(&entry) }.is_err() {
            // The ring has as many entries as there are tags.
            *slot = None;
            self.done.push_back((tag, Err(io::ErrorKind::QuotaExceeded.into())));
        }
    }

    /// The kernel is done with `tag`. `None`: part of it is left, and queued again.
    fn finish(&mut self, tag: u16, result: i32) -> Option<io::Result<()>> {
        let slot = self.in_flight.get_mut(usize::from(tag))?;
        let operation = slot.as_mut()?;
        if result == -libc::EINTR || result == -libc::EAGAIN {
            self.push(tag);
            return None;
        }
        let result = match u32::try_from(result) {
            Err(_) => Err(io::Error::from_raw_os_error(-result)),
            Ok(moved) => match operation {
                Operation::Read { offset, into: transfer }
                | Operation::Write { offset, from: transfer, .. } => {
                    let moved = u64::from(moved);
                    transfer.advance(moved);
                    *offset += moved;
                    match (moved, transfer.left()) {
                        (_, 0) => Ok(()),
                        (0, _) => Err(io::ErrorKind::UnexpectedEof.into()),
                        _ => {
                            self.push(tag);
                            return None;
                        }
                    }
                }
                _ => Ok(()),
            },
        };
        let operation = slot.take()?;
        Some(result.or_else(|error| self.otherwise(&operation, error)))
    }

    /// A second way to do what the host has no quick way for. Rare, so it may hold up the thread.
    fn otherwise(&self, operation: &Operation, error: io::Error) -> io::Result<()> {
        match *operation {
            Operation::Discard { offset, len } if is_unsupported(&error) => {
                self.file.discard_otherwise(offset, len)
            }
            Operation::WriteZeroes { offset, len, .. } if is_unsupported(&error) => {
                self.file.write_zeroes_otherwise(offset, len)
            }
            _ => Err(error),
        }
    }

    /// Enter the kernel, with what was queued, until `wanted` completions are there. Whoever calls this
    /// looks at the completions next, so those that come meanwhile need no signal.
    fn enter(&mut self, wanted: usize) -> io::Result<()> {
        self.ring.completion().disable_eventfd();
        let result = loop {
            match self.ring.submit_and_wait(wanted) {
                // The kernel stops at an entry that it refuses, and completes that with an error.
                Ok(taken) if taken > 0 && !self.ring.submission().is_empty() => {}
                Ok(_) => break Ok(()),
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR) => {}
                    Some(libc::EAGAIN | libc::EBUSY) => {
                        break Err(io::ErrorKind::WouldBlock.into());
                    }
                    _ => break Err(error),
                },
            }
        };
        self.ring.completion().enable_eventfd();
        // Either the kernel sees that, or the next look at the ring sees what the kernel did before.
        fence(Ordering::SeqCst);
        result
    }

    /// Whether the kernel has work or completions that it does on the next entry only.
    fn kernel_waits(&mut self) -> bool {
        let queue = self.ring.submission();
        queue.taskrun() || queue.cq_overflow()
    }
}

impl BlockBackend for UringBackend {
    fn start(&mut self) -> io::Result<()> {
        if self.ring.params().is_setup_single_issuer() {
            // Made disabled; the thread that enables it is the one it belongs to.
            self.ring.submitter().register_enable_rings()?;
        }
        Ok(())
    }

    fn completion(&self) -> Option<&EventFd> {
        Some(&self.completion)
    }

    fn queue(&mut self, tag: u16, operation: Operation) {
        self.in_flight[usize::from(tag)] = Some(operation);
        self.push(tag);
    }

    fn complete(&mut self) -> io::Result<Option<(u16, io::Result<()>)>> {
        loop {
            if !self.ring.submission().is_empty() {
                self.enter(0)?;
            }
            if let Some(done) = self.done.pop_front() {
                return Ok(Some(done));
            }
            let completion = self.ring.completion().next();
            if let Some(completion) = completion {
                // What `push` gave to the kernel.
                let tag = completion.user_data() as u16;
                if let Some(result) = self.finish(tag, completion.result()) {
                    return Ok(Some((tag, result)));
                }
            } else if self.kernel_waits() {
                self.enter(0)?;
            } else {
                return Ok(None);
            }
        }
    }

    fn wait(&mut self) -> io::Result<()> {
        let ready = !self.done.is_empty() || !self.ring.completion().is_empty();
        if ready { Ok(()) } else { self.enter(1) }
    }
}

impl Drop for UringBackend {
    fn drop(&mut self) {
        while self.in_flight_count() > 0 {
            match self.wait().and_then(|()| self.complete()) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::thread::yield_now(),
                Err(error) => {
                    log::error!("waiting for {}: {error}", self.file.path().display());
                    // The kernel may still use this memory: it must never be freed.
                    mem::forget(mem::take(&mut self.in_flight));
                }
            }
        }
    }
}

/// A ring in the best mode that the kernel knows.
fn ring(entries: u32) -> io::Result<IoUring> {
    type Mode = fn(&mut Builder);
    let modes: [Mode; 3] = [
        // Linux 6.1
        |ring| {
            ring.setup_single_issuer()
                .setup_defer_taskrun()
                .setup_taskrun_flag()
                .setup_r_disabled();
        },
        // Linux 5.19
        |ring| {
            ring.setup_coop_taskrun().setup_taskrun_flag();
        },
        |_| {},
    ];
    let mut last = None;
    for mode in modes {
        let mut builder = IoUring::builder();
        builder.dontfork();
        mode(&mut builder);
        match builder.build(entries) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => last = Some(error),
            result => return result,
        }
    }
    Err(last.unwrap_or_else(|| io::ErrorKind::Unsupported.into()))
}

/// What the kernel is told of `operation`, which must not be moved or changed before it is done.
fn entry(file: &BlockFile, operation: &Operation) -> Entry {
    // The first of the registered files, without an alignment to keep.
    const MAIN: Fixed = Fixed(0);
    match operation {
        Operation::Read { offset, into } => {
            let (fd, pieces) = (Fixed(file.route(*offset, into) as u32), into.pieces());
            opcode::Readv::new(fd, pieces.as_ptr(), pieces.len() as u32).offset(*offset).build()
        }
        Operation::Write { offset, from, durable } => {
            let (fd, pieces) = (Fixed(file.route(*offset, from) as u32), from.pieces());
            opcode::Writev::new(fd, pieces.as_ptr(), pieces.len() as u32)
                .offset(*offset)
                .rw_flags(if *durable { libc::RWF_DSYNC } else { 0 })
                .build()
        }
        Operation::Flush => opcode::Fsync::new(MAIN).flags(FsyncFlags::DATASYNC).build(),
        Operation::Discard { offset, len } => {
            opcode::Fallocate::new(MAIN, *len).offset(*offset).mode(DISCARD_MODE).build()
        }
        Operation::WriteZeroes { offset, len, unmap } => {
            opcode::Fallocate::new(MAIN, *len).offset(*offset).mode(zero_mode(*unmap)).build()
        }
    }
}
