// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Stand-ins for what a function is connected to.

use std::io;
use std::sync::Arc;

use parking_lot::Mutex;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::irq::{DoorbellSink, IrqSink, MsiMessage, MsiRoute, MsiSink};

/// Who sends all messages of a test.
pub(crate) const REQUESTER: u16 = 0x18;

/// Remembers what was sent, what routes carry, and how often they were committed.
#[derive(Default)]
pub(crate) struct FakeMsi {
    pub(crate) sent: Mutex<Vec<u32>>,
    pub(crate) routes: Arc<Mutex<Vec<Option<MsiMessage>>>>,
    pub(crate) commits: Mutex<u32>,
}

impl FakeMsi {
    /// Data of the messages sent since the last call.
    pub(crate) fn take(&self) -> Vec<u32> {
        std::mem::take(&mut self.sent.lock())
    }
}

impl MsiSink for FakeMsi {
    fn signal(&self, message: MsiMessage) -> io::Result<()> {
        assert_eq!(message.requester, REQUESTER);
        self.sent.lock().push(message.data);
        Ok(())
    }

    fn route(self: Arc<Self>) -> io::Result<Box<dyn MsiRoute>> {
        let mut routes = self.routes.lock();
        routes.push(None);
        Ok(Box::new(FakeRoute {
            eventfd: EventFd::new(EFD_NONBLOCK)?,
            index: routes.len() - 1,
            routes: Arc::clone(&self.routes),
        }))
    }

    fn commit(&self) -> io::Result<()> {
        *self.commits.lock() += 1;
        Ok(())
    }
}

struct FakeRoute {
    eventfd: EventFd,
    index: usize,
    routes: Arc<Mutex<Vec<Option<MsiMessage>>>>,
}

impl MsiRoute for FakeRoute {
    fn eventfd(&self) -> &EventFd {
        &self.eventfd
    }

    fn set(&self, message: Option<MsiMessage>) -> io::Result<()> {
        assert!(message.is_none_or(|message| message.requester == REQUESTER));
        self.routes.lock()[self.index] = message;
        Ok(())
    }
}

/// Remembers where doorbells are.
#[derive(Default)]
pub(crate) struct FakeDoorbells(pub(crate) Mutex<Vec<u64>>);

impl DoorbellSink for FakeDoorbells {
    fn attach(&self, address: u64, _eventfd: &EventFd) -> io::Result<()> {
        self.0.lock().push(address);
        Ok(())
    }

    fn detach(&self, address: u64, _eventfd: &EventFd) -> io::Result<()> {
        let mut attached = self.0.lock();
        let at = attached.iter().position(|&it| it == address);
        attached.remove(at.ok_or(io::ErrorKind::NotFound)?);
        Ok(())
    }
}

/// Remembers the level of a line.
#[derive(Default)]
pub(crate) struct FakeLine(pub(crate) Mutex<bool>);

impl IrqSink for FakeLine {
    fn set_level(&self, high: bool) {
        *self.0.lock() = high;
    }
}
