// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Notifications that reach a queue without a return to this process: one doorbell for each queue in use,
//! wherever the guest has put the notification structure.

use std::fmt;
use std::sync::Arc;

use log::debug;
use vmm_sys_util::eventfd::EventFd;

use super::layout;
use crate::irq::DoorbellSink;

pub(super) struct Doorbells {
    // Wiring.
    sink: Arc<dyn DoorbellSink>,
    /// Queues in use.
    kicks: Vec<(u16, Arc<EventFd>)>,
    /// What is attached, and where.
    attached: Vec<(u64, Arc<EventFd>)>,
    // State.
    bar: Option<u64>,
}

impl fmt::Debug for Doorbells {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Doorbells").field("attached", &self.attached).finish_non_exhaustive()
    }
}

impl Doorbells {
    pub(super) fn new(sink: Arc<dyn DoorbellSink>) -> Self {
        Self { sink, kicks: Vec::new(), attached: Vec::new(), bar: None }
    }

    /// The BAR that contains the notification structure decodes at a new address.
    pub(super) fn set_bar(&mut self, bar: Option<u64>) {
        self.bar = bar;
        self.update();
    }

    /// Queues have come into use, or none is any more.
    pub(super) fn set_kicks(&mut self, kicks: &[(u16, Arc<EventFd>)]) {
        self.kicks = kicks.to_vec();
        self.update();
    }

    /// A doorbell that cannot be attached is no loss: its writes arrive on the bus.
    fn update(&mut self) {
        for (address, kick) in self.attached.drain(..) {
            if let Err(error) = self.sink.detach(address, &kick) {
                debug!("detach the doorbell at {address:#x}: {error}");
            }
        }
        let Some(bar) = self.bar else { return };
        for (index, kick) in &self.kicks {
            let address = bar + layout::notify_offset(*index);
            match self.sink.attach(address, kick) {
                Ok(()) => self.attached.push((address, Arc::clone(kick))),
                Err(error) => debug!("attach a doorbell at {address:#x}: {error}"),
            }
        }
    }
}

impl Drop for Doorbells {
    fn drop(&mut self) {
        self.kicks.clear();
        self.update();
    }
}
