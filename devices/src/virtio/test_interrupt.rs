// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! An interrupt that remembers, for tests.

use parking_lot::{Condvar, Mutex};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::VirtioInterrupt;

#[derive(Default)]
struct Record {
    queues: Vec<u16>,
    resets: usize,
}

#[derive(Default)]
pub struct RecordedInterrupt {
    record: Mutex<Record>,
    changed: Condvar,
}

impl RecordedInterrupt {
    /// The queues that were announced, in order.
    pub fn queues(&self) -> Vec<u16> {
        self.record.lock().queues.clone()
    }

    /// How often a reset was asked for.
    pub fn resets(&self) -> usize {
        self.record.lock().resets
    }

    /// Wait until something happens after which `done` holds.
    pub fn wait_until(&self, mut done: impl FnMut() -> bool) {
        let mut record = self.record.lock();
        while !done() {
            self.changed.wait(&mut record);
        }
    }

    /// Wait until a reset is asked for.
    pub fn wait_for_reset(&self) {
        let mut record = self.record.lock();
        while record.resets == 0 {
            self.changed.wait(&mut record);
        }
    }
}

impl VirtioInterrupt for RecordedInterrupt {
    fn queue(&self, index: u16) {
        self.record.lock().queues.push(index);
        self.changed.notify_all();
    }
    fn config(&self) {}
    fn needs_reset(&self) {
        self.record.lock().resets += 1;
        self.changed.notify_all();
    }
    fn queue_eventfd(&self, _index: u16) -> std::io::Result<EventFd> {
        EventFd::new(EFD_NONBLOCK)
    }
}
