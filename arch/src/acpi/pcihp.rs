// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What the operating system calls when PCI devices come and go (ACPI 6.5, sections 5.6.4 and 6.3; QEMU's
//! `docs/specs/acpi_pci_hotplug.rst` for the registers).
//!
//! The event's method asks the registers of each bus which slots have changed, and notifies the devices there:
//! 1 is a device check, 3 an eject request. `_EJ0` of a slot writes the slot's bit.

use acpi_tables::aml::{
    Acquire, And, Arg, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, If,
    Method, MethodCall, Mutex, Notify, OpRegion, OpRegionSpace, Path, Release, ShiftLeft, Store,
    ZERO,
};

use super::aml::{Encoded, device, encoded, low16, low32, name, references};
use super::{PciHotplug, Registers};

const DEVICE_CHECK: u8 = 1;
const EJECT_REQUEST: u8 = 3;
/// Wait for a mutex as long as it takes.
const FOREVER: u16 = 0xFFFF;
const REGISTER_BITS: usize = 32;
const HOST_BRIDGE: &str = "\\_SB_.PCI0";
/// The registers, and which belongs to whom while the selector stands.
const REGION: &str = "PCST";
const UP: &str = "PCIU";
const DOWN: &str = "PCID";
const EJECT: &str = "B0EJ";
const SELECT: &str = "BNUM";
const LOCK: &str = "BLCK";
/// Methods: eject a slot of a bus, look at all buses, notify the slots of a bus.
const EJECT_SLOT: &str = "PCEJ";
const LOOK: &str = "PCNT";
const NOTIFY_SLOTS: &str = "DVNT";

fn method(path: &str, args: u8, body: &[Encoded]) -> Encoded {
    encoded(&Method::new(path.into(), args, false, references(body)))
}

fn store(to: &str, value: &dyn acpi_tables::Aml) -> Encoded {
    encoded(&Store::new(&Path::new(to), value))
}

fn call(path: &str, arguments: Vec<&dyn acpi_tables::Aml>) -> Encoded {
    encoded(&MethodCall::new(path.into(), arguments))
}

/// `body` while nobody else moves the selector.
fn locked(body: Vec<Encoded>) -> Vec<Encoded> {
    let mut all = vec![encoded(&Acquire::new(LOCK.into(), FOREVER))];
    all.extend(body);
    all.push(encoded(&Release::new(LOCK.into())));
    all
}

/// What belongs to the host bridge.
pub(super) fn host_bridge(hotplug: &PciHotplug) -> Vec<Encoded> {
    let mut all = registers(hotplug);
    all.push(method(
        EJECT_SLOT,
        2,
        &locked(vec![store(SELECT, &Arg(0)), store(EJECT, &ShiftLeft::new(&ZERO, &1u8, &Arg(1)))]),
    ));
    let bridges = || (0u8..).zip(&hotplug.bridges);
    all.extend(bridges().map(|(index, &slot)| bridge(index, slot, hotplug)));
    let looks = bridges().flat_map(|(index, _)| look(index)).collect();
    all.push(method(LOOK, 0, &locked(looks)));
    all
}

/// What an event's method has to call.
pub(super) fn look_at_all() -> Encoded {
    call(&format!("{HOST_BRIDGE}.{LOOK}"), Vec::new())
}

fn registers(hotplug: &PciHotplug) -> Vec<Encoded> {
    let region = match hotplug.registers {
        Registers::Ports(ports) => {
            let (base, size) = (low16(ports.base), low16(ports.size));
            encoded(&OpRegion::new(REGION.into(), OpRegionSpace::SystemIO, &base, &size))
        }
        Registers::Memory(range) => {
            let (base, size) = (low32(range.base), low32(range.size));
            encoded(&OpRegion::new(REGION.into(), OpRegionSpace::SystemMemory, &base, &size))
        }
    };
    let named = |name| FieldEntry::Named(name, REGISTER_BITS);
    let removable = FieldEntry::Reserved(REGISTER_BITS);
    let fields =
        vec![named(*b"PCIU"), named(*b"PCID"), named(*b"B0EJ"), removable, named(*b"BNUM")];
    let (access, rule) = (FieldAccessType::DWord, FieldUpdateRule::WriteAsZeroes);
    vec![
        region,
        encoded(&Field::new(REGION.into(), access, FieldLockRule::NoLock, rule, fields)),
        encoded(&Mutex::new(LOCK.into(), 0)),
    ]
}

fn bridge_name(index: u8) -> String {
    format!("BR{index:02X}")
}

fn slot_name(slot: u8) -> String {
    format!("SL{slot:02X}")
}

fn address(slot: u8) -> u32 {
    u32::from(slot) << 16
}

fn bridge(index: u8, at: u8, hotplug: &PciHotplug) -> Encoded {
    let mut children = vec![name("_ADR", &address(at))];
    children.extend(hotplug.slots.clone().map(|slot| {
        // A person sees this number, so it is unique among all bridges.
        let number = u16::from(index) * 32 + u16::from(slot);
        let eject = method("_EJ0", 1, &[call(EJECT_SLOT, vec![&index, &slot])]);
        device(&slot_name(slot), &[name("_ADR", &address(slot)), name("_SUN", &number), eject])
    }));
    let notify = |slot: u8| {
        let device = Path::new(&slot_name(slot));
        let notify = Notify::new(&device, &Arg(1));
        let bit = 1u32 << (slot & 31);
        encoded(&If::new(&And::new(&ZERO, &Arg(0), &bit), vec![&notify]))
    };
    let notifies: Vec<Encoded> = hotplug.slots.clone().map(notify).collect();
    children.push(method(NOTIFY_SLOTS, 2, &notifies));
    device(&bridge_name(index), &children)
}

/// Look at one bus: a device that came and went in the meantime is announced first.
fn look(index: u8) -> [Encoded; 3] {
    let notify = format!("{HOST_BRIDGE}.{}.{NOTIFY_SLOTS}", bridge_name(index));
    let slots = |register: &str, value: u8| call(&notify, vec![&Path::new(register), &value]);
    [store(SELECT, &index), slots(UP, DEVICE_CHECK), slots(DOWN, EJECT_REQUEST)]
}
