// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Slots behind bridges, into which devices are plugged while the guest runs, and out of which the guest lets
//! them go.
//!
//! When the guest ejects a device, the vCPU takes it off its bus at once, so that the guest cannot find it
//! again, and leaves it for the control thread to take down.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ecr_devices::bus::SharedIoDevice;
use ecr_devices::chipset::{GuestRequest, GuestRequestSink};
use ecr_devices::hotplug::{EjectSink, PciHotplug};
use ecr_devices::pci::host::{DevFn, PciHost, Place, SharedFunction};
use parking_lot::Mutex;

use super::slots::{FIRST_BRIDGE, Slots};
use crate::control::{CommandError, PciPath};

/// Slots behind a bridge that devices can have, as Kata counts them.
pub(super) const SLOTS: std::ops::RangeInclusive<u8> = 1..=30;
/// How long the guest is left alone with a request before it may be repeated. One that was made before the
/// guest listened is lost, so it must be possible to repeat it.
const PATIENCE: Duration = Duration::from_secs(1);

/// Tells the guest to look at the registers.
pub(super) type Announce = Box<dyn Fn() + Send>;

/// The slots behind bridges.
pub(super) struct Hotplug {
    bridges: u8,
    registers: Arc<Mutex<PciHotplug>>,
    announce: Announce,
    ejector: Arc<Ejector>,
    /// Devices that the guest was asked to give up, and when.
    removals: Vec<(Place, Instant)>,
}

impl std::fmt::Debug for Hotplug {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hotplug").field("bridges", &self.bridges).finish_non_exhaustive()
    }
}

impl Hotplug {
    pub(super) fn new(
        bridges: u8,
        pci: &Arc<PciHost>,
        requests: &Arc<dyn GuestRequestSink>,
        announce: Announce,
    ) -> Self {
        let ejector = Arc::new(Ejector {
            pci: Arc::clone(pci),
            requests: Arc::clone(requests),
            ejected: Mutex::default(),
        });
        let sink = Arc::clone(&ejector) as Arc<dyn EjectSink>;
        let registers = Arc::new(Mutex::new(PciHotplug::new(bridges.into(), sink)));
        Self { bridges, registers, announce, ejector, removals: Vec::new() }
    }

    /// The register block.
    pub(super) fn registers(&self) -> SharedIoDevice {
        Arc::clone(&self.registers) as SharedIoDevice
    }

    /// Slots of the bridges.
    pub(super) fn bridges(&self) -> impl Iterator<Item = u8> + use<> {
        FIRST_BRIDGE..FIRST_BRIDGE + self.bridges
    }

    /// The guest finds what is there by itself.
    pub(super) fn reset(&self) {
        self.registers.lock().reset();
    }

    fn is_pending(&self, place: Place) -> bool {
        let asked = self.removals.iter().find(|(pending, _)| *pending == place);
        asked.is_some_and(|(_, when)| when.elapsed() < PATIENCE)
    }
}

/// Takes what the guest ejects off its bus.
struct Ejector {
    pci: Arc<PciHost>,
    requests: Arc<dyn GuestRequestSink>,
    /// What the control thread has yet to take down; no more than there are slots.
    ejected: Mutex<Vec<(Place, SharedFunction)>>,
}

impl std::fmt::Debug for Ejector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Ejector")
    }
}

impl EjectSink for Ejector {
    fn eject(&self, bus: usize, slot: u8) {
        let Some(place) = place_of(bus, slot) else { return };
        match self.pci.remove(place) {
            Ok(function) => {
                self.ejected.lock().push((place, function));
                self.requests.request(GuestRequest::TakeEjected);
            }
            Err(error) => log::debug!("eject: {error}"),
        }
    }
}

/// Slot `slot` of the bus that the registers call `bus`.
fn place_of(bus: usize, slot: u8) -> Option<Place> {
    let bridge = FIRST_BRIDGE.checked_add(u8::try_from(bus).ok()?)?;
    Some(Place::behind(DevFn::new(bridge, 0), DevFn::new(slot, 0)))
}

/// What the registers call the bus behind the bridge in front of `place`.
fn bus_of(place: Place) -> Option<usize> {
    place.bridge.map(|bridge| usize::from(bridge.device().saturating_sub(FIRST_BRIDGE)))
}

impl Slots {
    /// The slot for a device that is added now: the one asked for, or the first free one.
    pub(super) fn reserve(&self, wanted: Option<PciPath>) -> Result<Place, CommandError> {
        let failed = |text: String| Err(CommandError::Failed(text));
        let Some(path) = wanted else {
            let bridges = self.hotplug.iter().flat_map(Hotplug::bridges);
            let mut places = bridges.flat_map(|bridge| SLOTS.map(move |slot| (bridge, slot)));
            let free = places.find_map(|(bridge, slot)| {
                let place = Place::behind(DevFn::new(bridge, 0), DevFn::new(slot, 0));
                (!self.is_taken(place)).then_some(place)
            });
            return free.ok_or_else(|| match &self.hotplug {
                Some(_) => CommandError::Failed("no more bridge slots available".into()),
                None => CommandError::Failed(
                    "no more bridge slots available: this machine has no bridges; set bridges to 1 or more"
                        .into(),
                ),
            });
        };
        let Some(bridge) = path.bridge else {
            return failed("Bus 'pcie.0' does not support hotplugging".into());
        };
        if !self.hotplug.iter().flat_map(Hotplug::bridges).any(|known| known == bridge) {
            return failed(format!("there is no bridge in PCI slot {bridge:#x}"));
        }
        let slot = path.slot;
        if !SLOTS.contains(&slot) {
            let (first, last) = (SLOTS.start(), SLOTS.end());
            return failed(format!(
                "PCI: slot {slot} is not available behind a bridge: use {first} to {last}"
            ));
        }
        let place = Place::behind(DevFn::new(bridge, 0), DevFn::new(slot, 0));
        match self.devices.iter().find(|device| device.place == place) {
            None => Ok(place),
            Some(device) => failed(format!(
                "PCI: slot {slot} function 0 not available, in use by device '{}'",
                device.id
            )),
        }
    }

    /// Tell the guest of a new device.
    pub(super) fn announce(&self, place: Place) {
        if let (Some(hotplug), Some(bus)) = (&self.hotplug, bus_of(place)) {
            hotplug.registers.lock().insert(bus, place.at.device());
            (hotplug.announce)();
        }
    }

    /// Ask the guest to give up device `id`.
    pub(super) fn request_removal(&mut self, id: &str) -> Result<(), CommandError> {
        let device = self.devices.iter().find(|device| device.id == id);
        let place = device.ok_or_else(|| CommandError::DeviceNotFound(id.to_owned()))?.place;
        let (Some(hotplug), Some(bus)) = (&mut self.hotplug, bus_of(place)) else {
            return Err(CommandError::Failed("Bus 'pcie.0' does not support hotplugging".into()));
        };
        if hotplug.is_pending(place) {
            let text = format!("Device {id} is already in the process of unplug");
            return Err(CommandError::Failed(text));
        }
        hotplug.removals.retain(|(pending, _)| *pending != place);
        hotplug.removals.push((place, Instant::now()));
        hotplug.registers.lock().request_removal(bus, place.at.device());
        (hotplug.announce)();
        Ok(())
    }

    /// Take down what the guest has ejected; returns the ids.
    pub(super) fn take_ejected(&mut self) -> Vec<String> {
        let Some(hotplug) = &mut self.hotplug else { return Vec::new() };
        let ejected = std::mem::take(&mut *hotplug.ejector.ejected.lock());
        let mut ids = Vec::new();
        for (place, function) in ejected {
            // Queues come to rest; then the last one who holds the device lets go of it.
            function.lock().reset();
            drop(function);
            hotplug.removals.retain(|(pending, _)| *pending != place);
            if let Some(index) = self.devices.iter().position(|device| device.place == place) {
                ids.push(self.devices.swap_remove(index).id);
            }
        }
        ids
    }

    /// A guest that is reset has given up what it was asked to; returns the ids.
    pub(super) fn complete_removals(&mut self) -> Vec<String> {
        if let Some(hotplug) = &mut self.hotplug {
            for (place, _) in std::mem::take(&mut hotplug.removals) {
                if let Some(bus) = bus_of(place) {
                    hotplug.registers.lock().remove(bus, place.at.device());
                    hotplug.ejector.eject(bus, place.at.device());
                }
            }
        }
        self.take_ejected()
    }
}
