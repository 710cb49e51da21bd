// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! A virtio device as a PCI function (VIRTIO 1.2, section 4.1): modern interface only. All structures lie
//! in one 64-bit BAR, MSI-X in a BAR of its own.
//!
//! The function's registers are the business of vCPUs. The data path has an interrupt object and
//! eventfds, and never waits for the function.

mod common;
mod doorbells;
mod interrupt;
mod layout;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::Arc;

use common::Selection;
use doorbells::Doorbells;
use interrupt::PciInterrupt;
use layout::Structure;

use super::session::{Session, Transition, status};
use crate::bus::Access;
use crate::irq::{DoorbellSink, IrqLine, MsiSink};
use crate::memory::GuestMemoryHandle;
use crate::pci::config::{self, BarKind, ConfigSpace, Identity, command};
use crate::pci::intx::{Intx, Pin};
use crate::pci::msix::{self, Msix};
use crate::pci::{Bar, PciFunction};
use crate::virtio::{VirtioDevice, VirtioInterrupt};

/// What a virtio PCI function is connected to.
pub struct Wiring {
    /// Guest memory, for the device.
    pub memory: GuestMemoryHandle,
    /// Messages.
    pub msi: Arc<dyn MsiSink>,
    /// Who sends them: the function's requester id.
    pub requester: u16,
    /// Vectors to have at least.
    pub vectors: u16,
    /// The line that pin INTA leads to.
    pub intx: IrqLine,
    /// Notifications.
    pub doorbells: Arc<dyn DoorbellSink>,
}

impl fmt::Debug for Wiring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Wiring")
    }
}

/// A virtio device as a PCI function.
#[derive(Debug)]
pub struct VirtioPci {
    // Configuration: where capabilities lie.
    msix_capability: u16,
    window_capability: u16,
    // Wiring.
    pin: Intx,
    interrupt: Arc<PciInterrupt>,
    doorbells: Doorbells,
    // State.
    config: ConfigSpace,
    msix: Msix,
    session: Session,
    selection: Selection,
}

impl VirtioPci {
    /// Make `device` a PCI function. It has at least a vector for each queue, and one for configuration changes.
    ///
    /// # Panics
    /// The device has no or too many queues: a mistake in the device model.
    pub fn new(device: Box<dyn VirtioDevice>, wiring: Wiring) -> Self {
        let queues = device.queue_max_sizes().len();
        assert!((1..=layout::MAX_QUEUES).contains(&queues), "{queues} queues");
        let msix = Msix::new(wiring.vectors.max(queues as u16 + 1), wiring.msi, wiring.requester);
        let mut config = ConfigSpace::new(&identity(device.device_type()));
        config.set_interrupt_pin(Pin::A as u8);
        config.add_bar(layout::MSIX_BAR, BarKind::Memory32, msix.bar_size());
        config.add_bar(layout::VIRTIO_BAR, BarKind::Memory64, layout::VIRTIO_BAR_SIZE);
        let msix_capability = config.add_capability(&msix.capability(layout::MSIX_BAR));
        for capability in layout::capabilities() {
            config.add_capability(&capability);
        }
        let window_capability = config.add_capability(&layout::window_capability());
        let pin = Intx::new(wiring.intx);
        let interrupt = Arc::new(PciInterrupt::new(msix.clone(), pin.clone(), queues));
        let notifier = Arc::clone(&interrupt) as Arc<dyn VirtioInterrupt>;
        Self {
            msix_capability,
            window_capability,
            pin,
            interrupt,
            doorbells: Doorbells::new(wiring.doorbells),
            config,
            msix,
            session: Session::new(device, wiring.memory, notifier),
            selection: Selection::default(),
        }
    }

    /// How to interrupt the driver, for changes of configuration that the host makes.
    pub fn interrupt(&self) -> Arc<dyn VirtioInterrupt> {
        Arc::clone(&self.interrupt) as Arc<dyn VirtioInterrupt>
    }

    /// The device.
    pub fn device_mut(&mut self) -> &mut dyn VirtioDevice {
        self.session.device_mut()
    }

    fn write_status(&mut self, value: u8) {
        // The device may meet an error as soon as it runs, and then the driver wants to hear of it.
        if value & status::DRIVER_OK != 0 {
            self.interrupt.set_live(true);
        }
        match self.session.write_status(value) {
            Transition::None => {}
            Transition::Started => self.doorbells.set_kicks(self.session.kicks()),
            Transition::Failed => self.interrupt.needs_reset(),
            Transition::Reset => {
                self.doorbells.set_kicks(&[]);
                self.interrupt.reset();
                self.selection = Selection::default();
            }
        }
    }

    fn structure_read(&mut self, offset: u64, data: &mut [u8]) -> Access {
        match layout::find(offset) {
            Some((Structure::Common, offset)) => common::read(self, offset, data),
            Some((Structure::Isr, 0)) if data.len() == 1 => data[0] = self.interrupt.take_isr(),
            Some((Structure::Device, offset)) => {
                data.fill(0);
                self.session.device().config_read(offset, data);
            }
            Some((Structure::Isr | Structure::Notify, _)) => data.fill(0),
            None => return Access::Unclaimed,
        }
        Access::Done
    }

    fn structure_write(&mut self, offset: u64, data: &[u8]) -> Access {
        match layout::find(offset) {
            Some((Structure::Common, offset)) => common::write(self, offset, data),
            Some((Structure::Isr, _)) => {}
            Some((Structure::Device, offset)) => {
                self.session.device_mut().config_write(offset, data);
            }
            Some((Structure::Notify, offset)) => {
                if let Some(queue) = layout::notify_queue(offset) {
                    self.session.kick(queue);
                }
            }
            None => return Access::Unclaimed,
        }
        Access::Done
    }

    /// What the window in configuration space shows: BAR, offset and length, if the driver has filled
    /// them in as section 4.1.4.9.2 tells it to.
    fn window(&self) -> Option<(u8, u64, usize)> {
        use layout::window::{BAR, LENGTH, OFFSET};
        let register = |offset| self.config.u32(self.window_capability + offset);
        let [bar, ..] = register(BAR).to_le_bytes();
        let (offset, length) = (register(OFFSET), register(LENGTH));
        let valid = matches!(length, 1 | 2 | 4) && offset.is_multiple_of(length);
        valid.then_some((bar, offset.into(), length as usize))
    }

    fn is_window_data(&self, offset: u16) -> bool {
        offset == self.window_capability + layout::window::DATA
    }
}

impl PciFunction for VirtioPci {
    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        if self.is_window_data(offset)
            && let Some((bar, at, length)) = self.window()
        {
            let mut value = [0; 4];
            let _ = self.bar_read(bar, at, &mut value[..length]);
            self.config.set(offset, &value);
        }
        let pending = if self.pin.is_asserted() { config::status::INTERRUPT } else { 0 };
        self.config.set_status(config::status::INTERRUPT, pending);
        self.config.read(offset, data);
    }

    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
        let command = self.config.u16(config::offset::COMMAND);
        self.pin.set_disabled(command & command::INTERRUPT_DISABLE != 0);
        self.msix.set_control(self.config.u16(self.msix_capability + msix::control::OFFSET));
        self.interrupt.follow_msix();
        if self.is_window_data(offset)
            && let Some((bar, at, length)) = self.window()
        {
            let value = self.config.u32(offset).to_le_bytes();
            let _ = self.bar_write(bar, at, &value[..length]);
        }
    }

    fn bars(&self) -> Vec<Bar> {
        self.config.bars()
    }

    fn bar_moved(&mut self, index: u8, address: Option<u64>) {
        if index == layout::VIRTIO_BAR {
            self.doorbells.set_bar(address);
        }
    }

    fn bar_read(&mut self, index: u8, offset: u64, data: &mut [u8]) -> Access {
        match index {
            layout::MSIX_BAR => self.msix.bar_read(offset, data),
            layout::VIRTIO_BAR => self.structure_read(offset, data),
            _ => Access::Unclaimed,
        }
    }

    fn bar_write(&mut self, index: u8, offset: u64, data: &[u8]) -> Access {
        match index {
            layout::MSIX_BAR => self.msix.bar_write(offset, data),
            layout::VIRTIO_BAR => self.structure_write(offset, data),
            _ => Access::Unclaimed,
        }
    }

    fn reset(&mut self) {
        self.session.reset();
        self.doorbells.set_kicks(&[]);
        self.interrupt.reset();
        self.selection = Selection::default();
        self.msix.reset();
        self.config.reset();
        self.pin.set_disabled(false);
    }
}

/// What the function says it is, section 4.1.2.
fn identity(device_type: u32) -> Identity {
    const VENDOR: u16 = 0x1AF4;
    const FIRST_MODERN: u16 = 0x1040;
    /// The specification asks for 0x40 or more; this is QEMU's.
    const SUBSYSTEM: u16 = 0x1100;
    Identity {
        vendor: VENDOR,
        device: FIRST_MODERN + device_type as u16,
        revision: 1,
        class: class(device_type),
        subsystem_vendor: VENDOR,
        subsystem: SUBSYSTEM,
    }
}

/// The specification leaves the class code open; these are the nearest (PCI Code and ID Assignment).
fn class(device_type: u32) -> u32 {
    use virtio_bindings::virtio_ids::{
        VIRTIO_ID_BLOCK, VIRTIO_ID_CONSOLE, VIRTIO_ID_NET, VIRTIO_ID_SCSI, VIRTIO_ID_VSOCK,
    };
    const MASS_STORAGE_SCSI: u32 = 0x01_00_00;
    const NETWORK_ETHERNET: u32 = 0x02_00_00;
    const COMMUNICATION_OTHER: u32 = 0x07_80_00;
    const UNASSIGNED: u32 = 0x00_FF_00;
    match device_type {
        VIRTIO_ID_NET => NETWORK_ETHERNET,
        VIRTIO_ID_BLOCK | VIRTIO_ID_SCSI => MASS_STORAGE_SCSI,
        VIRTIO_ID_CONSOLE | VIRTIO_ID_VSOCK => COMMUNICATION_OTHER,
        _ => UNASSIGNED,
    }
}
