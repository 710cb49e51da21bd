// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! PCI slots, as all boards have them: the root bus, bridges on it, and what is plugged in.

use std::ops::RangeInclusive;
use std::sync::Arc;

use ecr_arch::acpi::{PciHotplug, PciInterrupt, Registers};
use ecr_devices::chipset::GuestRequestSink;
use ecr_devices::irq::{DoorbellSink, MsiSink, SharedLine};
use ecr_devices::memory::GuestMemoryHandle;
use ecr_devices::pci::assign::{self, NoRoom, Windows};
use ecr_devices::pci::bridge::PciBridge;
use ecr_devices::pci::host::{DevFn, PciError, PciHost, Place};
use ecr_devices::pci::intx::Pin;
use ecr_devices::virtio::VirtioDevice;
use ecr_devices::virtio::transport::pci::{VirtioPci, Wiring};
use parking_lot::Mutex;

use super::hotplug::{self, Announce, Hotplug};
use crate::hypervisor::Vm;
use crate::vm::StartError;

const PINS: [Pin; 4] = [Pin::A, Pin::B, Pin::C, Pin::D];
/// Slots of the root bus that devices can have.
const SLOTS: RangeInclusive<u8> = 1..=30;
/// MSI-X vectors of each device behind a bridge, at least. Where an ITS translates, all of them send as the bridge does,
/// and Linux gives its id as many interrupts as the devices have that are there when the first of them is set up
/// (`drivers/irqchip/irq-gic-v3-its-pci-msi.c`): this many are 4 for each slot.
const VECTORS_BEHIND_BRIDGE: u16 = 128;
/// Slot of the first bridge; the others follow it.
pub(super) const FIRST_BRIDGE: u8 = 2;

/// The slots and what is plugged in.
pub(super) struct Slots {
    pci: Arc<PciHost>,
    /// Inputs of the interrupt controller for INTA to INTD of the root bus.
    gsis: [u8; 4],
    lines: [SharedLine; 4],
    memory: GuestMemoryHandle,
    msi: Arc<dyn MsiSink>,
    doorbells: Arc<dyn DoorbellSink>,
    pub(super) devices: Vec<Plugged>,
    /// Slots behind bridges, if there are any.
    pub(super) hotplug: Option<Hotplug>,
}

/// A device in its slot.
#[derive(Debug)]
pub(super) struct Plugged {
    pub(super) id: String,
    pub(super) place: Place,
}

impl std::fmt::Debug for Slots {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Slots").field("devices", &self.devices).finish_non_exhaustive()
    }
}

impl Slots {
    /// The slots of `pci`, with nothing plugged in.
    pub(super) fn new(
        pci: Arc<PciHost>,
        vm: &dyn Vm,
        gsis: [u8; 4],
        memory: &GuestMemoryHandle,
    ) -> Self {
        Self {
            pci,
            gsis,
            lines: gsis.map(|gsi| SharedLine::new(vm.irq_line(gsi.into()))),
            memory: memory.clone(),
            msi: vm.msi(),
            doorbells: vm.doorbells(),
            devices: Vec::new(),
            hotplug: None,
        }
    }

    /// Bridges stand in fixed slots, before any device takes one. `announce` tells the guest that something has
    /// changed behind them.
    pub(super) fn attach_bridges(
        &mut self,
        count: u8,
        requests: &Arc<dyn GuestRequestSink>,
        announce: Announce,
    ) -> Result<(), PciError> {
        if count > 0 {
            self.hotplug = Some(Hotplug::new(count, &self.pci, requests, announce));
        }
        for index in 0..count {
            let at = DevFn::new(FIRST_BRIDGE + index, 0);
            self.pci.add(at, Arc::new(Mutex::new(PciBridge::new())))?;
            let id = format!("pci-bridge-{index}");
            self.devices.push(Plugged { id, place: at.into() });
        }
        Ok(())
    }

    /// The next free slot of the root bus, for a device that is there from the start.
    pub(super) fn next(&self, id: &str) -> Result<Place, StartError> {
        let place = SLOTS.map(|slot| DevFn::new(slot, 0).into());
        place.into_iter().find(|place| !self.is_taken(*place)).ok_or_else(|| {
            StartError::Machine(format!("no PCI slot is left for device '{id}': use fewer devices"))
        })
    }

    pub(super) fn is_taken(&self, place: Place) -> bool {
        self.devices.iter().any(|device| device.place == place)
    }

    /// Put a virtio device into a slot.
    pub(super) fn attach_virtio(
        &mut self,
        id: &str,
        place: Place,
        device: Box<dyn VirtioDevice>,
    ) -> Result<(), PciError> {
        let wiring = Wiring {
            memory: self.memory.clone(),
            msi: Arc::clone(&self.msi),
            requester: place.requester(),
            vectors: if place.bridge.is_some() { VECTORS_BEHIND_BRIDGE } else { 0 },
            doorbells: Arc::clone(&self.doorbells),
            intx: self.lines[usize::from(place.interrupt(Pin::A))].driver(),
        };
        let function = VirtioPci::new(device, wiring);
        self.pci.add(place, Arc::new(Mutex::new(function)))?;
        self.devices.push(Plugged { id: id.to_owned(), place });
        Ok(())
    }

    /// Place all BARs in `windows`, as firmware would. Once all devices are plugged in, and after a reset.
    pub(super) fn assign_bars(&self, windows: &Windows) -> Result<(), NoRoom> {
        assign::assign(&self.pci, windows, self.gsis)
    }

    /// Back to the state after power-on; no BAR is placed.
    pub(super) fn reset(&self) {
        self.pci.reset();
        if let Some(hotplug) = &self.hotplug {
            hotplug.reset();
        }
    }

    /// Devices finish what they have begun and let go of their queues.
    pub(super) fn stop_devices(&self) {
        self.pci.reset();
    }

    pub(super) fn pci(&self) -> &PciHost {
        &self.pci
    }

    /// Buses that there can be: the root bus, and one behind each bridge. Linux looks at every slot of every bus
    /// that it is told of: with 256 of them that is more than 8000 exits, and half of its boot.
    pub(super) fn buses(&self) -> u64 {
        1 + self.hotplug.iter().flat_map(Hotplug::bridges).count() as u64
    }

    /// The id of what sits there; empty for the chipset.
    pub(super) fn id_at(&self, place: Place) -> String {
        let device = self.devices.iter().find(|device| device.place == place);
        device.map_or_else(String::new, |device| device.id.clone())
    }

    /// Whether a device has this id.
    pub(super) fn has_device(&self, id: &str) -> bool {
        self.devices.iter().any(|device| device.id == id)
    }

    /// How devices are added to a running machine, by the registers at `registers`; `None` if they cannot be.
    pub(super) fn describe_hotplug(&self, registers: Registers) -> Option<PciHotplug> {
        let bridges = self.hotplug.as_ref()?.bridges().collect();
        Some(PciHotplug { registers, bridges, slots: hotplug::SLOTS })
    }

    /// Where INTA of each device leads, and all pins of the bridges: devices come and go behind them.
    pub(super) fn interrupts(&self) -> Vec<PciInterrupt> {
        let bridges: Vec<u8> = self.hotplug.iter().flat_map(Hotplug::bridges).collect();
        let on_root = self.devices.iter().filter(|device| device.place.bridge.is_none());
        let routes = on_root.flat_map(|device| {
            let slot = device.place.at.device();
            let pins = if bridges.contains(&slot) { &PINS[..] } else { &PINS[..1] };
            pins.iter().map(move |&pin| PciInterrupt {
                slot,
                pin: pin as u8 - 1,
                gsi: self.gsis[usize::from(device.place.interrupt(pin))].into(),
            })
        });
        routes.collect()
    }
}
