// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! How a virtio PCI function interrupts (VIRTIO 1.2, sections 4.1.4.5 and 4.1.5.3 to 4.1.5.4): by MSI-X
//! where the guest has enabled it, by its pin and the ISR status otherwise.
//!
//! The data path holds this object, and not the function: it waits for no vCPU.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};

use parking_lot::Mutex;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::pci::intx::Intx;
use crate::pci::msix::{Msix, MsixVector};
use crate::virtio::VirtioInterrupt;

/// No vector, section 4.1.4.3.
pub(super) const NO_VECTOR: u16 = 0xffff;

/// Bits of the ISR status.
mod isr {
    pub(super) const QUEUE: u8 = 1;
    pub(super) const CONFIG: u8 = 1 << 1;
}

#[derive(Debug)]
pub(super) struct PciInterrupt {
    // Wiring.
    msix: Msix,
    vectors: Box<[MsixVector]>,
    pin: Intx,
    // State.
    config_vector: AtomicU16,
    queue_vectors: Box<[AtomicU16]>,
    /// The pin follows it, and changes under its lock.
    isr: Mutex<u8>,
    generation: AtomicU8,
    /// The driver has set DRIVER_OK: it wants to hear of changes.
    live: AtomicBool,
    needs_reset: AtomicBool,
}

impl PciInterrupt {
    pub(super) fn new(msix: Msix, pin: Intx, queues: usize) -> Self {
        let vectors = (0..).map_while(|index| msix.vector(index)).collect();
        Self {
            msix,
            vectors,
            pin,
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            isr: Mutex::new(0),
            generation: AtomicU8::new(0),
            live: AtomicBool::new(false),
            needs_reset: AtomicBool::new(false),
        }
    }

    pub(super) fn config_vector(&self) -> u16 {
        self.config_vector.load(Ordering::Relaxed)
    }

    pub(super) fn set_config_vector(&self, vector: u16) {
        self.config_vector.store(self.known(vector), Ordering::Relaxed);
    }

    pub(super) fn queue_vector(&self, queue: u16) -> u16 {
        let vector = self.queue_vectors.get(usize::from(queue));
        vector.map_or(NO_VECTOR, |vector| vector.load(Ordering::Relaxed))
    }

    pub(super) fn set_queue_vector(&self, queue: u16, vector: u16) {
        if let Some(slot) = self.queue_vectors.get(usize::from(queue)) {
            slot.store(self.known(vector), Ordering::Relaxed);
        }
    }

    /// A driver learns from reading back NO_VECTOR that it cannot have this one.
    fn known(&self, vector: u16) -> u16 {
        if usize::from(vector) < self.vectors.len() { vector } else { NO_VECTOR }
    }

    /// Changes whenever device configuration does.
    pub(super) fn generation(&self) -> u8 {
        self.generation.load(Ordering::Acquire)
    }

    pub(super) fn is_reset_needed(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire)
    }

    pub(super) fn set_live(&self, live: bool) {
        self.live.store(live, Ordering::Release);
    }

    /// The ISR status, which reading clears.
    pub(super) fn take_isr(&self) -> u8 {
        let mut isr = self.isr.lock();
        self.pin.set(false);
        std::mem::take(&mut *isr)
    }

    /// The guest has enabled or disabled MSI-X.
    pub(super) fn follow_msix(&self) {
        self.raise(0);
    }

    pub(super) fn reset(&self) {
        self.live.store(false, Ordering::Release);
        self.needs_reset.store(false, Ordering::Release);
        self.config_vector.store(NO_VECTOR, Ordering::Relaxed);
        for vector in &self.queue_vectors {
            vector.store(NO_VECTOR, Ordering::Relaxed);
        }
        self.take_isr();
    }

    fn raise(&self, bits: u8) {
        let mut isr = self.isr.lock();
        *isr |= bits;
        self.pin.set(*isr != 0 && !self.msix.is_enabled());
    }

    fn trigger(&self, vector: u16) {
        if let Some(vector) = self.vectors.get(usize::from(vector)) {
            vector.trigger();
        }
    }

    fn notify_config(&self) {
        if self.live.load(Ordering::Acquire) {
            self.raise(isr::CONFIG);
            self.trigger(self.config_vector());
        }
    }
}

impl VirtioInterrupt for PciInterrupt {
    fn queue(&self, index: u16) {
        if self.msix.is_enabled() {
            self.trigger(self.queue_vector(index));
        } else {
            self.raise(isr::QUEUE);
        }
    }

    fn config(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.notify_config();
    }

    fn needs_reset(&self) {
        self.needs_reset.store(true, Ordering::Release);
        self.notify_config();
    }

    fn queue_eventfd(&self, index: u16) -> io::Result<EventFd> {
        if !self.msix.is_enabled() {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "the guest has not enabled MSI-X, and a pin cannot be driven from outside of this process: \
                 start the guest without pci=nomsi",
            ));
        }
        match self.vectors.get(usize::from(self.queue_vector(index))) {
            Some(vector) => vector.eventfd(),
            // The driver polls this queue: nobody listens.
            None => EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC),
        }
    }
}
