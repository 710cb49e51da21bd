// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Frames for the driver, sections 5.1.6.3 and 5.1.6.4.
//!
//! Nobody knows the size of a frame before it is read, and what a read leaves over is lost. So each read is
//! given the driver's next buffers, for a frame as large as the last one, and memory of this process behind
//! them. What ends up there is copied into more buffers; where the driver has given none, the frame waits.

use std::io;
use std::os::fd::RawFd;

use vm_memory::{Bytes, GuestAddress};

use super::pieces::{MAX_PIECES, Scratch};
use crate::backend::tap::HEADER_SIZE;
use crate::memory::GuestMemory;
use crate::virtio::queue::{Chain, DeviceQueue, RingError, Segment};

/// Largest frame with its header: 64 KiB of payload to be segmented, and headers that come before it.
pub(super) const FRAME_MAX: usize = HEADER_SIZE + 0x1_0000 + 0x100;

/// Most frames in one turn.
const BATCH: usize = 64;

/// Where the count of buffers stands in the header.
const NUM_BUFFERS: u64 = 10;

/// The half of a pair of queues that gives frames to the driver.
#[derive(Debug)]
pub(super) struct Receiver {
    pub(super) queue: DeviceQueue,
    // configuration
    /// A frame may take several buffers.
    mergeable: bool,
    // state
    room: Room,
    scratch: Scratch,
    /// What does not fit into the driver's buffers.
    spill: Box<[u8]>,
    /// Bytes of `spill` that are a frame for which there are no buffers yet.
    held: usize,
    /// Size of the last frame: large ones come in trains.
    expected: u64,
    /// Frames that did not fit.
    dropped: u64,
}

/// What follows from an attempt to receive a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// There may be another one.
    Again,
    /// Nothing can be done before the host has a frame, or the driver a buffer.
    Wait,
}

impl Receiver {
    pub(super) fn new(queue: DeviceQueue, mergeable: bool) -> Self {
        Self {
            queue,
            mergeable,
            room: Room::default(),
            scratch: Scratch::default(),
            spill: vec![0; FRAME_MAX].into_boxed_slice(),
            held: 0,
            expected: 0,
            dropped: 0,
        }
    }

    /// Take frames from `fd`, until there are no more, or no buffers for them, or others have their turn.
    ///
    /// # Errors
    /// Any [`RingError`].
    pub(super) fn receive(&mut self, memory: &GuestMemory, fd: RawFd) -> Result<(), RingError> {
        for _ in 0..BATCH {
            let step = if self.held > 0 { self.deliver(memory)? } else { self.read(memory, fd)? };
            if step == Step::Wait {
                return self.queue.notify(memory);
            }
        }
        self.queue.kick_again();
        self.queue.notify(memory)
    }

    /// Receive one frame.
    fn read(&mut self, memory: &GuestMemory, fd: RawFd) -> Result<Step, RingError> {
        self.room.clear();
        while self.room.has_place_for_more(self.expected, self.mergeable)
            && self.room.grow(&mut self.queue, memory)?
        {}
        if self.room.chains.is_empty() {
            return Ok(Step::Wait);
        }
        let mut pieces = self.scratch.begin(memory);
        for segment in &self.room.segments {
            pieces.push(*segment)?;
        }
        pieces.push_own(&mut self.spill);
        if pieces.are_too_many() {
            let head = self.room.chains[0].0;
            return Err(RingError::Request { head, rule: "has too many pieces for a frame" });
        }
        match pieces.read_from(fd) {
            Ok(size) if size >= HEADER_SIZE => self.place(memory, size),
            Ok(0) => Ok(self.give_up(Step::Wait)),
            Ok(_) => Ok(self.give_up(Step::Again)),
            Err(error) => {
                if error.kind() != io::ErrorKind::WouldBlock {
                    // A tap that is down, for one; when it is up again, it says so.
                    log::debug!("read a frame from the host: {error}");
                }
                Ok(self.give_up(Step::Wait))
            }
        }
    }

    /// A frame of `size` bytes has been read into the room, and the spill behind it.
    fn place(&mut self, memory: &GuestMemory, size: usize) -> Result<Step, RingError> {
        self.expected = size as u64;
        let Some(rest) = (size as u64).checked_sub(self.room.size).filter(|rest| *rest > 0) else {
            return self.use_room(memory, size);
        };
        // Less than the room and the spill together, or it was cut off.
        let rest = rest as usize;
        if !self.mergeable || rest == self.spill.len() {
            return Ok(self.drop_frame());
        }
        let mut copied = 0;
        while copied < rest {
            if !self.room.grow(&mut self.queue, memory)? {
                return self.hold(memory, size, rest);
            }
            let buffers = self.room.last.writable();
            copied += buffers.write(memory, &self.spill[copied..rest])? as usize;
        }
        self.use_room(memory, size)
    }

    /// Keep a frame, whose last `rest` bytes are in the spill, until the driver gives more buffers.
    fn hold(&mut self, memory: &GuestMemory, size: usize, rest: usize) -> Result<Step, RingError> {
        if size > self.spill.len() || self.has_all_buffers() {
            return Ok(self.drop_frame());
        }
        self.spill.copy_within(..rest, size - rest);
        let mut begin = &mut self.spill[..size - rest];
        for segment in &self.room.segments {
            let (now, later) = begin.split_at_mut(begin.len().min(segment.len as usize));
            memory.read_slice(now, segment.address).map_err(|_| outside(segment))?;
            begin = later;
        }
        self.held = size;
        Ok(self.give_up(Step::Wait))
    }

    /// Give the driver the frame that was held.
    fn deliver(&mut self, memory: &GuestMemory) -> Result<Step, RingError> {
        let size = self.held;
        self.room.clear();
        while self.room.size < size as u64 {
            if !self.room.grow(&mut self.queue, memory)? {
                if self.has_all_buffers() {
                    self.held = 0;
                    return Ok(self.drop_frame());
                }
                return Ok(self.give_up(Step::Wait));
            }
        }
        let mut frame = &self.spill[..size];
        for segment in &self.room.segments {
            let (now, later) = frame.split_at(frame.len().min(segment.len as usize));
            memory.write_slice(now, segment.address).map_err(|_| outside(segment))?;
            frame = later;
        }
        self.held = 0;
        self.use_room(memory, size)
    }

    /// The driver can give no more than it has.
    fn has_all_buffers(&self) -> bool {
        self.room.chains.len() >= usize::from(self.queue.size())
    }

    fn use_room(&mut self, memory: &GuestMemory, size: usize) -> Result<Step, RingError> {
        self.room.fill(&mut self.queue, memory, size)?;
        Ok(Step::Again)
    }

    fn drop_frame(&mut self) -> Step {
        self.dropped += 1;
        let (size, room, dropped) = (self.expected, self.room.size, self.dropped);
        // A guest can do this as often as it likes.
        log::debug!("a frame of {size} bytes does not fit into {room} ({dropped} until now)");
        self.give_up(Step::Again)
    }

    /// The buffers are the next ones again.
    fn give_up(&mut self, step: Step) -> Step {
        // At most as many as the queue has descriptors.
        self.queue.put_back_last(self.room.chains.len() as u16);
        self.room.clear();
        step
    }
}

fn outside(segment: &Segment) -> RingError {
    RingError::Memory { what: "buffer", address: segment.address.0, len: u64::from(segment.len) }
}

/// The driver's buffers for one frame.
#[derive(Debug, Default)]
struct Room {
    /// Head and size of each chain.
    chains: Vec<(u16, u32)>,
    segments: Vec<Segment>,
    size: u64,
    /// Where the two bytes stand that count the chains.
    count_at: [GuestAddress; 2],
    /// The last chain.
    last: Chain,
}

impl Room {
    fn clear(&mut self) {
        self.chains.clear();
        self.segments.clear();
        self.size = 0;
    }

    /// Whether another chain is worth while for a frame of `expected` bytes.
    fn has_place_for_more(&self, expected: u64, mergeable: bool) -> bool {
        let enough = self.size >= expected || self.segments.len() >= MAX_PIECES / 2;
        self.chains.is_empty() || mergeable && !enough
    }

    /// Take the next chain, if there is one; the driver then kicks when there is.
    fn grow(&mut self, queue: &mut DeviceQueue, memory: &GuestMemory) -> Result<bool, RingError> {
        if !queue.pop_or_wait(memory, &mut self.last)? {
            return Ok(false);
        }
        let (head, buffers) = (self.last.head(), self.last.writable());
        let begin = self.segments.len();
        self.segments.extend(buffers.segments());
        if self.chains.is_empty() {
            self.count_at = count_position(&self.segments[begin..]).ok_or(RingError::Request {
                head,
                rule: "is too small for the header of a frame",
            })?;
        } else if buffers.is_empty() {
            return Err(RingError::Request { head, rule: "has no room for a frame" });
        }
        self.chains.push((head, u32::try_from(buffers.len()).unwrap_or(u32::MAX)));
        self.size += buffers.len();
        Ok(true)
    }

    /// Use as many chains as `size` bytes take, and give the others back.
    fn fill(
        &mut self,
        queue: &mut DeviceQueue,
        memory: &GuestMemory,
        size: usize,
    ) -> Result<(), RingError> {
        let (mut left, mut used) = (size, 0);
        for (_, written) in &mut self.chains {
            if left == 0 {
                break;
            }
            let here = left.min(*written as usize);
            // At most what it was.
            *written = here as u32;
            left -= here;
            used += 1;
        }
        // At most as many as the queue has descriptors.
        for (at, byte) in self.count_at.into_iter().zip((used as u16).to_le_bytes()) {
            memory.write_obj(byte, at).map_err(|_| RingError::Memory {
                what: "header",
                address: at.0,
                len: 1,
            })?;
        }
        queue.put_back_last((self.chains.len() - used) as u16);
        queue.add_all_used(memory, &self.chains[..used])
    }
}

/// Where the count of buffers stands in the chain of `segments`.
fn count_position(segments: &[Segment]) -> Option<[GuestAddress; 2]> {
    let byte = |mut offset: u64| {
        for segment in segments {
            let len = u64::from(segment.len);
            if offset < len {
                return Some(GuestAddress(segment.address.0 + offset));
            }
            offset -= len;
        }
        None
    };
    Some([byte(NUM_BUFFERS)?, byte(NUM_BUFFERS + 1)?])
}
