// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The driver's side of a split virtqueue, for tests and benchmarks.
//!
//! It checks nothing, so that a test can also break the rules.

// Each benchmark that includes this file uses a part of it.
#![allow(dead_code)]

use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// A buffer: address, size in bytes, whether the device writes it.
pub type Buffer = (u64, u32, bool);

pub struct Driver {
    pub memory: GuestMemoryMmap<()>,
    size: u16,
    descriptors: u64,
    available: u64,
    used: u64,
    next_descriptor: u16,
    next_available: u16,
    next_used: u16,
}

impl Driver {
    /// Rings of `size` entries from `base` on.
    pub fn new(memory: &GuestMemoryMmap<()>, base: u64, size: u16) -> Self {
        let available = base + 16 * u64::from(size);
        let used = (available + 6 + 2 * u64::from(size)).next_multiple_of(4);
        Self {
            memory: memory.clone(),
            size,
            descriptors: base,
            available,
            used,
            next_descriptor: 0,
            next_available: 0,
            next_used: 0,
        }
    }

    /// The device's side.
    pub fn queue(&self) -> Queue {
        let mut queue = Queue::new(self.size).unwrap();
        queue.set_size(self.size);
        queue.try_set_desc_table_address(GuestAddress(self.descriptors)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(self.available)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(self.used)).unwrap();
        queue.set_ready(true);
        queue
    }

    /// Write a descriptor of the queue's own table.
    pub fn descriptor(&self, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        self.descriptor_at(self.descriptors, index, address, len, flags, next);
    }

    /// Write a descriptor of the table at `table`.
    pub fn descriptor_at(
        &self,
        table: u64,
        index: u16,
        address: u64,
        len: u32,
        flags: u16,
        next: u16,
    ) {
        let descriptor = RawDescriptor::from(Descriptor::new(address, len, flags, next));
        self.memory.write_obj(descriptor, GuestAddress(table + 16 * u64::from(index))).unwrap();
    }

    /// Make the chain at `head` available.
    pub fn publish(&mut self, head: u16) {
        let slot = self.available + 4 + 2 * u64::from(self.next_available % self.size);
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.next_available = self.next_available.wrapping_add(1);
        self.set_available_index(self.next_available);
    }

    /// Say that buffers up to `index` are available.
    pub fn set_available_index(&self, index: u16) {
        self.memory.write_obj(index, GuestAddress(self.available + 2)).unwrap();
    }

    /// The flags of the available ring: 1 means no interrupts.
    pub fn set_available_flags(&self, flags: u16) {
        self.memory.write_obj(flags, GuestAddress(self.available)).unwrap();
    }

    /// With `VIRTIO_F_EVENT_IDX`: interrupt when the used index passes `index`.
    pub fn set_used_event(&self, index: u16) {
        let event = self.available + 4 + 2 * u64::from(self.size);
        self.memory.write_obj(index, GuestAddress(event)).unwrap();
    }

    /// With `VIRTIO_F_EVENT_IDX`: the available index at which the device wants a kick.
    pub fn available_event(&self) -> u16 {
        let event = self.used + 4 + 8 * u64::from(self.size);
        self.memory.read_obj(GuestAddress(event)).unwrap()
    }

    /// Make a chain of `buffers` available and return its head.
    pub fn add(&mut self, buffers: &[Buffer]) -> u16 {
        let head = self.next_descriptor;
        for (n, &(address, len, write)) in buffers.iter().enumerate() {
            let index = self.next_descriptor;
            self.next_descriptor = (index + 1) % self.size;
            let next = if n + 1 < buffers.len() { NEXT } else { 0 };
            let write = if write { WRITE } else { 0 };
            self.descriptor(index, address, len, next | write, self.next_descriptor);
        }
        self.publish(head);
        head
    }

    /// Take the next used chain: its head and the bytes written.
    pub fn used(&mut self) -> Option<(u32, u32)> {
        let index: u16 = self.memory.read_obj(GuestAddress(self.used + 2)).unwrap();
        if index == self.next_used {
            return None;
        }
        let element = self.used + 4 + 8 * u64::from(self.next_used % self.size);
        self.next_used = self.next_used.wrapping_add(1);
        let id = self.memory.read_obj(GuestAddress(element)).unwrap();
        let written = self.memory.read_obj(GuestAddress(element + 4)).unwrap();
        Some((id, written))
    }
}
