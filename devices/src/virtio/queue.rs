// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! A split virtqueue as the worker of a device sees it: every chain comes out checked.
//!
//! VIRTIO 1.2, section 2.7. `virtio_queue` keeps the indices and writes the used ring. What the
//! specification forbids to drivers is checked here, because `virtio_queue`'s iterators end silently at
//! a bad descriptor and a device would take half a chain for a whole one. Each violation is a
//! [`RingError`]: the device then calls [`DeviceQueue::fail`] and serves that queue no more.
//!
//! Left out: packed virtqueues, `VIRTIO_F_IN_ORDER`.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, VRING_AVAIL_F_NO_INTERRUPT,
};
use virtio_queue::QueueT;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::EventFd;

use super::{ActiveQueue, VirtioInterrupt};
use crate::memory::GuestMemory;

/// Most chains taken in one call of [`DeviceQueue::serve`], so that no queue starves the others on
/// its thread.
const BATCH: u16 = 128;

/// Longest chain in bytes, section 2.7.5.2.
const MAX_CHAIN_BYTES: u64 = 1 << 32;

/// Size of a descriptor in a table.
const DESCRIPTOR_SIZE: u32 = 16;

/// Where the elements of a used ring begin, and the size of each; section 2.7.8.
const USED_ELEMENTS: u64 = 4;
const USED_ELEMENT_SIZE: u64 = 8;

/// What becomes of a chain that was taken by [`DeviceQueue::serve_while`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taken {
    /// It is used, with so many bytes written.
    Used(u32),
    /// [`DeviceQueue::add_used`] has to follow.
    Kept,
    /// It cannot be dealt with now, so it is the next one again, and no more are taken.
    Refused,
}

/// Something in a ring that the specification forbids to drivers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// More buffers became available than the queue can hold.
    #[error("available index {available} is more than the queue size {size} ahead of {next}")]
    AvailableIndex {
        /// What the driver wrote.
        available: u16,
        /// The next index that the device would take.
        next: u16,
        /// Queue size.
        size: u16,
    },
    /// A descriptor number outside of its table.
    #[error("descriptor {index} lies outside of its table of {entries}")]
    DescriptorIndex {
        /// The number.
        index: u16,
        /// Descriptors in the table.
        entries: u32,
    },
    /// A chain of more descriptors than the queue has; also what a loop looks like.
    #[error("the chain at descriptor {head} is a loop, or longer than the queue size {size}")]
    ChainLength {
        /// First descriptor.
        head: u16,
        /// Queue size.
        size: u16,
    },
    /// A chain of more than 4 GiB.
    #[error("the chain at descriptor {head} has more than 4 GiB")]
    ChainBytes {
        /// First descriptor.
        head: u16,
    },
    /// A buffer for the device to read behind one for it to write.
    #[error("descriptor {index} is device-readable but follows a device-writable one")]
    Order {
        /// The descriptor.
        index: u16,
    },
    /// An indirect descriptor that is not allowed as it is.
    #[error("indirect descriptor {index} with a table of {len} bytes: {rule}")]
    Indirect {
        /// The descriptor.
        index: u16,
        /// Size of its table in bytes.
        len: u32,
        /// The rule that it breaks.
        rule: &'static str,
    },
    /// A ring, table or buffer outside of guest memory.
    #[error("{what} at {address:#x}+{len:#x} is not in guest memory")]
    Memory {
        /// Ring, table or buffer.
        what: &'static str,
        /// First guest-physical address.
        address: u64,
        /// Size in bytes.
        len: u64,
    },
    /// A chain that the device type has no use for.
    #[error("the chain at descriptor {head} {rule}")]
    Request {
        /// First descriptor.
        head: u16,
        /// The rule that it breaks.
        rule: &'static str,
    },
}

/// A contiguous piece of guest-physical memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// First address.
    pub address: GuestAddress,
    /// Size in bytes, not zero.
    pub len: u32,
}

/// The buffers of one descriptor chain. Made once and filled by each [`DeviceQueue::pop`].
#[derive(Debug, Default)]
pub struct Chain {
    head: u16,
    segments: Vec<Segment>,
    /// How many of the segments, from the first, are device-readable.
    readable: usize,
    readable_len: u64,
    writable_len: u64,
}

impl Chain {
    /// The number of its first descriptor, by which it is returned.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// What the driver gives to the device.
    pub fn readable(&self) -> Buffers<'_> {
        let (readable, _) = self.segments.split_at(self.readable);
        Buffers { segments: readable, start: 0, len: self.readable_len }
    }

    /// What the device fills.
    pub fn writable(&self) -> Buffers<'_> {
        let (_, writable) = self.segments.split_at(self.readable);
        Buffers { segments: writable, start: 0, len: self.writable_len }
    }

    fn clear(&mut self, head: u16) {
        self.segments.clear();
        *self = Self { head, segments: std::mem::take(&mut self.segments), ..Self::default() };
    }

    fn push(&mut self, index: u16, buffer: &Descriptor) -> Result<(), RingError> {
        let len = u64::from(buffer.len());
        if buffer.is_write_only() {
            self.writable_len += len;
        } else if self.readable < self.segments.len() {
            return Err(RingError::Order { index });
        } else {
            self.readable_len += len;
            self.readable += usize::from(len != 0);
        }
        if self.readable_len + self.writable_len > MAX_CHAIN_BYTES {
            return Err(RingError::ChainBytes { head: self.head });
        }
        if len != 0 {
            self.segments.push(Segment { address: buffer.addr(), len: buffer.len() });
        }
        Ok(())
    }
}

/// A run of bytes in a chain. How the driver cut it into buffers means nothing, section 2.7.4.
#[derive(Debug, Clone, Copy)]
pub struct Buffers<'a> {
    segments: &'a [Segment],
    /// Bytes of the segments before the run.
    start: u64,
    len: u64,
}

impl<'a> Buffers<'a> {
    /// Size in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is no byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The first `count` bytes and the rest; `None` where there are fewer.
    pub fn split_at(self, count: u64) -> Option<(Self, Self)> {
        let rest = self.len.checked_sub(count)?;
        Some((Self { len: count, ..self }, Self { start: self.start + count, len: rest, ..self }))
    }

    /// Its pieces of guest memory, in order.
    pub fn segments(self) -> impl Iterator<Item = Segment> + 'a {
        let (mut skip, mut left) = (self.start, self.len);
        self.segments.iter().filter_map(move |segment| {
            let len = u64::from(segment.len);
            let before = skip.min(len);
            let take = left.min(len - before);
            skip -= before;
            left -= take;
            let address = GuestAddress(segment.address.0 + before);
            // `take` is at most the length of the segment.
            (take != 0).then_some(Segment { address, len: take as u32 })
        })
    }

    /// Copy the first bytes into all of `data`.
    ///
    /// # Errors
    /// [`RingError::Memory`]; not with the memory that the chain was checked against.
    pub fn read(self, memory: &GuestMemory, mut data: &mut [u8]) -> Result<(), RingError> {
        for segment in self.segments() {
            let count = data.len().min(segment.len as usize);
            let (now, later) = data.split_at_mut(count);
            memory.read_slice(now, segment.address).map_err(|_| segment.outside())?;
            data = later;
        }
        Ok(())
    }

    /// Copy `data` to the first bytes; what does not fit is left out. Says how many bytes were copied.
    ///
    /// # Errors
    /// [`RingError::Memory`]; not with the memory that the chain was checked against.
    pub fn write(self, memory: &GuestMemory, mut data: &[u8]) -> Result<u32, RingError> {
        let mut written = 0;
        for segment in self.segments() {
            let count = data.len().min(segment.len as usize);
            let (now, later) = data.split_at(count);
            memory.write_slice(now, segment.address).map_err(|_| segment.outside())?;
            written += count as u32;
            data = later;
        }
        Ok(written)
    }
}

impl Segment {
    fn outside(&self) -> RingError {
        RingError::Memory { what: "buffer", address: self.address.0, len: u64::from(self.len) }
    }
}

/// A queue in use by a device's worker.
#[derive(Debug)]
pub struct DeviceQueue {
    // wiring
    interrupt: Arc<dyn VirtioInterrupt>,
    // configuration
    indirect: bool,
    // state
    active: ActiveQueue,
    /// How many used chains were added since the driver was last notified.
    unannounced: u16,
    failed: bool,
}

impl DeviceQueue {
    /// Serve `active` as `features` say.
    pub fn new(
        mut active: ActiveQueue,
        features: u64,
        interrupt: Arc<dyn VirtioInterrupt>,
    ) -> Self {
        active.queue.set_event_idx(features >> VIRTIO_RING_F_EVENT_IDX & 1 != 0);
        let indirect = features >> VIRTIO_RING_F_INDIRECT_DESC & 1 != 0;
        Self { interrupt, indirect, active, unannounced: 0, failed: false }
    }

    /// Its number in the device.
    pub fn index(&self) -> u16 {
        self.active.index
    }

    /// What the driver signals when buffers are available.
    pub fn kick(&self) -> &EventFd {
        &self.active.kick
    }

    /// Its size as the driver chose it.
    pub fn size(&self) -> u16 {
        self.active.queue.size()
    }

    /// Whether [`Self::fail`] was called.
    pub fn has_failed(&self) -> bool {
        self.failed
    }

    /// Give the queue back.
    pub fn into_active(self) -> ActiveQueue {
        self.active
    }

    /// The driver broke a rule: ask it for a reset, and let whoever serves the queue see
    /// [`Self::has_failed`].
    pub fn fail(&mut self, error: &dyn std::error::Error) {
        if !self.failed {
            // Guests can do this as often as they like, so it must not fill a log.
            log::debug!("queue {} waits for a reset by its driver: {error}", self.active.index);
            self.failed = true;
            self.interrupt.needs_reset();
        }
    }

    /// Hand available chains to `take`, until there are no more or `BATCH` were taken; the kick is
    /// then signalled again. What `take` returns is the number of bytes it wrote, if it is done with
    /// the chain, which is then used; else [`Self::add_used`] has to follow. The driver hears of
    /// nothing before [`Self::notify`].
    ///
    /// # Errors
    /// The first [`RingError`], of the ring or from `take`.
    pub fn serve(
        &mut self,
        memory: &GuestMemory,
        chain: &mut Chain,
        mut take: impl FnMut(&Chain) -> Result<Option<u32>, RingError>,
    ) -> Result<(), RingError> {
        self.serve_while(memory, chain, |chain| Ok(take(chain)?.map_or(Taken::Kept, Taken::Used)))
    }

    /// As [`Self::serve`], for devices that may have to stop in between.
    ///
    /// # Errors
    /// The first [`RingError`], of the ring or from `take`.
    pub fn serve_while(
        &mut self,
        memory: &GuestMemory,
        chain: &mut Chain,
        mut take: impl FnMut(&Chain) -> Result<Taken, RingError>,
    ) -> Result<(), RingError> {
        let mut left = BATCH;
        loop {
            self.active.queue.disable_notification(memory).map_err(|_| self.used_outside())?;
            while left > 0 && self.pop(memory, chain)? {
                match take(chain)? {
                    Taken::Used(written) => self.add_used(memory, chain.head, written)?,
                    Taken::Kept => {}
                    Taken::Refused => {
                        self.put_back();
                        return Ok(());
                    }
                }
                left -= 1;
            }
            if left == 0 {
                self.kick_again();
                return Ok(());
            }
            // Buffers may have come between the last look and here, without a kick.
            if !self.active.queue.enable_notification(memory).map_err(|_| self.used_outside())? {
                return Ok(());
            }
        }
    }

    /// Come back to this queue after the others on its thread.
    pub fn kick_again(&self) {
        // It can fail only when the counter is full, and then the kick is pending already.
        let _ = self.active.kick.write(1);
    }

    /// Take the next available chain, if there is one.
    ///
    /// # Errors
    /// Any [`RingError`].
    pub fn pop(&mut self, memory: &GuestMemory, chain: &mut Chain) -> Result<bool, RingError> {
        let queue = &mut self.active.queue;
        let (size, next) = (queue.size(), queue.next_avail());
        let available = queue
            .avail_idx(memory, Ordering::Acquire)
            .map_err(|_| ring_outside("available ring", queue.avail_ring()))?
            .0;
        match available.wrapping_sub(next) {
            0 => return Ok(false),
            count if count > size => {
                return Err(RingError::AvailableIndex { available, next, size });
            }
            _ => {}
        }
        // Behind flags and idx, two bytes each. A size of zero does not come here.
        let entry = queue.avail_ring().checked_add(4 + 2 * u64::from(next % size));
        let head = entry
            .and_then(|entry| memory.load(GuestAddress(entry), Ordering::Relaxed).ok())
            .map(u16::from_le)
            .ok_or_else(|| ring_outside("available ring", queue.avail_ring()))?;
        queue.set_next_avail(next.wrapping_add(1));
        chain.clear(head);
        self.walk(memory, chain)?;
        Ok(true)
    }

    /// As [`Self::pop`], but when there is no chain, the driver is made to kick when there is one. For
    /// queues whose buffers are taken only when there is something to put into them.
    ///
    /// # Errors
    /// Any [`RingError`].
    pub fn pop_or_wait(
        &mut self,
        memory: &GuestMemory,
        chain: &mut Chain,
    ) -> Result<bool, RingError> {
        loop {
            if self.pop(memory, chain)? {
                return Ok(true);
            }
            // Buffers may have come between the last look and here, without a kick.
            if !self.active.queue.enable_notification(memory).map_err(|_| self.used_outside())? {
                return Ok(false);
            }
        }
    }

    /// Undo the last [`Self::pop`]: its chain, which is not used yet, is the next one again.
    pub fn put_back(&mut self) {
        self.put_back_last(1);
    }

    /// Undo the last `count` calls of [`Self::pop`].
    pub fn put_back_last(&mut self, count: u16) {
        let next = self.active.queue.next_avail();
        self.active.queue.set_next_avail(next.wrapping_sub(count));
    }

    /// Return the chain at `head`, into which the device wrote `written` bytes.
    ///
    /// # Errors
    /// [`RingError::Memory`] or [`RingError::DescriptorIndex`].
    pub fn add_used(
        &mut self,
        memory: &GuestMemory,
        head: u16,
        written: u32,
    ) -> Result<(), RingError> {
        self.add_all_used(memory, &[(head, written)])
    }

    /// Return chains, each by its head and the bytes written. The driver sees all of them at once, or none.
    ///
    /// # Errors
    /// [`RingError::Memory`] or [`RingError::DescriptorIndex`].
    pub fn add_all_used(
        &mut self,
        memory: &GuestMemory,
        chains: &[(u16, u32)],
    ) -> Result<(), RingError> {
        let (size, ring) = (self.size(), self.active.queue.used_ring());
        let mut next = self.active.queue.next_used();
        for &(head, written) in chains {
            if head >= size {
                return Err(RingError::DescriptorIndex { index: head, entries: size.into() });
            }
            let slot = USED_ELEMENTS + u64::from(next % size) * USED_ELEMENT_SIZE;
            // Head and size, in one access.
            let element = (u64::from(written) << 32 | u64::from(head)).to_le();
            ring.checked_add(slot)
                .and_then(|at| memory.write_obj(element, GuestAddress(at)).ok())
                .ok_or_else(|| self.used_outside())?;
            next = next.wrapping_add(1);
        }
        // Chains that were popped are at most as many as the queue has descriptors.
        self.unannounced = self.unannounced.saturating_add(chains.len() as u16);
        self.active.queue.set_next_used(next);
        ring.checked_add(2)
            .and_then(|at| memory.store(next.to_le(), GuestAddress(at), Ordering::Release).ok())
            .ok_or_else(|| self.used_outside())
    }

    /// Interrupt the driver, if buffers were used that it wants to hear of. Once per batch.
    ///
    /// # Errors
    /// [`RingError::Memory`].
    pub fn notify(&mut self, memory: &GuestMemory) -> Result<(), RingError> {
        match std::mem::take(&mut self.unannounced) {
            0 => Ok(()),
            count => {
                if self.driver_wants_to_hear(memory, count)? {
                    self.interrupt.queue(self.active.index);
                }
                Ok(())
            }
        }
    }

    /// Whether the driver wants to hear of the last `count` used chains, section 2.7.7.
    fn driver_wants_to_hear(&self, memory: &GuestMemory, count: u16) -> Result<bool, RingError> {
        let queue = &self.active.queue;
        // The driver asks before it looks for used chains, so what it asks is read after they were added.
        fence(Ordering::SeqCst);
        let ring = queue.avail_ring();
        let load = |offset: u64| {
            let at = ring.checked_add(offset).map(GuestAddress);
            at.and_then(|at| memory.load(at, Ordering::Relaxed).ok())
                .map(u16::from_le)
                .ok_or_else(|| ring_outside("available ring", ring))
        };
        if queue.event_idx_enabled() {
            // Behind flags, index and ring: the index of the chain that the driver waits for.
            let event = load(4 + 2 * u64::from(self.size()))?;
            return Ok(queue.next_used().wrapping_sub(event).wrapping_sub(1) < count);
        }
        Ok(u32::from(load(0)?) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }

    /// Collect the buffers of the chain that starts at `chain.head`.
    fn walk(&self, memory: &GuestMemory, chain: &mut Chain) -> Result<(), RingError> {
        let size = self.size();
        let mut table = Table {
            address: self.active.queue.desc_table(),
            entries: u32::from(size),
            indirect: false,
        };
        let (mut index, mut buffers) = (chain.head, 0);
        loop {
            let descriptor = table.read(memory, index)?;
            if descriptor.refers_to_indirect_table() {
                table = self.indirect_table(&table, index, &descriptor)?;
                index = 0;
                continue;
            }
            if buffers == size {
                return Err(RingError::ChainLength { head: chain.head, size });
            }
            buffers += 1;
            if !memory.check_range(descriptor.addr(), descriptor.len() as usize) {
                return Err(RingError::Memory {
                    what: "buffer",
                    address: descriptor.addr().0,
                    len: u64::from(descriptor.len()),
                });
            }
            chain.push(index, &descriptor)?;
            if !descriptor.has_next() {
                return Ok(());
            }
            index = descriptor.next();
        }
    }

    /// The table that `descriptor`, number `index` of `table`, refers to; section 2.7.5.3.
    fn indirect_table(
        &self,
        table: &Table,
        index: u16,
        descriptor: &Descriptor,
    ) -> Result<Table, RingError> {
        let len = descriptor.len();
        let rule = if !self.indirect {
            "VIRTIO_F_INDIRECT_DESC was not negotiated"
        } else if table.indirect {
            "it is itself in an indirect table"
        } else if descriptor.has_next() {
            "it also has a next descriptor"
        } else if len == 0 || !len.is_multiple_of(DESCRIPTOR_SIZE) {
            "that is not a positive multiple of 16"
        } else {
            return Ok(Table {
                address: descriptor.addr().0,
                entries: len / DESCRIPTOR_SIZE,
                indirect: true,
            });
        };
        Err(RingError::Indirect { index, len, rule })
    }

    fn used_outside(&self) -> RingError {
        ring_outside("used ring", self.active.queue.used_ring())
    }
}

/// The error of a ring at `address`; its exact size does not matter to who reads it.
fn ring_outside(what: &'static str, address: u64) -> RingError {
    RingError::Memory { what, address, len: 0 }
}

/// A descriptor table.
struct Table {
    address: u64,
    entries: u32,
    indirect: bool,
}

impl Table {
    /// Read descriptor `index`, once: the driver may change it at any time.
    fn read(&self, memory: &GuestMemory, index: u16) -> Result<Descriptor, RingError> {
        if u32::from(index) >= self.entries {
            return Err(RingError::DescriptorIndex { index, entries: self.entries });
        }
        self.address
            .checked_add(u64::from(index) * u64::from(DESCRIPTOR_SIZE))
            .and_then(|address| memory.read_obj(GuestAddress(address)).ok())
            .ok_or(RingError::Memory {
                what: "descriptor table",
                address: self.address,
                len: u64::from(self.entries) * u64::from(DESCRIPTOR_SIZE),
            })
    }
}

#[cfg(test)]
mod tests;
