// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Messages to a GICv2m (Arm Base System Architecture, appendix E): a message's data is the shared interrupt that it
//! raises, so no routing table is needed.

use std::io;
use std::sync::Arc;

use ecr_arch::layout::Range;
use ecr_arch::layout::virt::interrupt;
use ecr_devices::irq::{MsiMessage, MsiRoute, MsiSink};
use kvm_ioctls::VmFd;
use parking_lot::Mutex;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::line;
use crate::hypervisor::kvm::irq::os_error;

/// The frame to which messages are sent.
#[derive(Debug)]
pub(super) struct Frame {
    vm: Arc<VmFd>,
    at: Range,
    interrupts: u32,
}

impl Frame {
    pub(super) fn new(vm: Arc<VmFd>, at: Range, interrupts: u32) -> Self {
        Self { vm, at, interrupts }
    }

    /// The shared interrupt, counted from 0, that `message` raises.
    fn target(&self, message: MsiMessage) -> io::Result<u32> {
        let inside = message.address.wrapping_sub(self.at.base) < self.at.size;
        let spi = message.data.checked_sub(interrupt::SHARED);
        spi.filter(|_| inside && message.data < self.interrupts).ok_or_else(|| {
            let MsiMessage { address, data, .. } = message;
            let text = format!("no interrupt is raised by {data:#x} at {address:#x}");
            io::Error::new(io::ErrorKind::InvalidInput, text)
        })
    }
}

impl MsiSink for Frame {
    fn signal(&self, message: MsiMessage) -> io::Result<()> {
        let line = line(self.target(message)?);
        // The guest has made it edge-triggered.
        self.vm.set_irq_line(line, true).map_err(os_error)?;
        self.vm.set_irq_line(line, false).map_err(os_error)
    }

    fn route(self: Arc<Self>) -> io::Result<Box<dyn MsiRoute>> {
        let eventfd = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        Ok(Box::new(Route { frame: self, eventfd, armed: Mutex::new(None) }))
    }

    fn commit(&self) -> io::Result<()> {
        Ok(())
    }
}

#[derive(Debug)]
struct Route {
    frame: Arc<Frame>,
    eventfd: EventFd,
    /// The interrupt that KVM raises when the eventfd is signalled.
    armed: Mutex<Option<u32>>,
}

impl MsiRoute for Route {
    fn eventfd(&self) -> &EventFd {
        &self.eventfd
    }

    fn set(&self, message: Option<MsiMessage>) -> io::Result<()> {
        // The guest chose the message, so it can have one that leads nowhere, at will.
        let target = |message| {
            let target = self.frame.target(message);
            target.inspect_err(|error| log::debug!("route an MSI: {error}")).ok()
        };
        let wanted = message.and_then(target);
        let mut armed = self.armed.lock();
        if *armed == wanted {
            return Ok(());
        }
        if let Some(spi) = armed.take() {
            self.frame.vm.unregister_irqfd(&self.eventfd, spi).map_err(os_error)?;
        }
        if let Some(spi) = wanted {
            self.frame.vm.register_irqfd(&self.eventfd, spi).map_err(os_error)?;
            *armed = Some(spi);
        }
        Ok(())
    }
}

impl Drop for Route {
    fn drop(&mut self) {
        if let Err(error) = self.set(None) {
            log::error!("free an interrupt route: {error}");
        }
    }
}
