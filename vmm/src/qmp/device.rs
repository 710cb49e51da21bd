// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! `device_add` and `device_del`: from QEMU's properties to a [`Command`].

use serde_json::{Map, Value, json};

use super::Controller;
use super::backends::{Backends, User};
use super::property::{Properties, slot};
use super::request::QmpError;
use super::schema::{Type, member, optional};
use crate::config::{DiskConfig, MacAddr, NetConfig};
use crate::control::{Command, DeviceConfig, PciInfo, PciPath, Reply};

/// Arguments of `device_add`; each driver has more.
pub(super) const ADD: Type = Type::Open(&[
    member("driver", &Type::Str),
    optional("bus", &Type::Str),
    optional("id", &Type::Str),
]);
pub(super) const DELETE: Type = Type::Object(&[member("id", &Type::Str)]);

const BLK: &str = "virtio-blk-pci";
const NET: &str = "virtio-net-pci";
const BLK_PROPERTIES: &[&str] =
    &["drive", "num-queues", "queue-size", "serial", "logical_block_size", "write-cache"];
const NET_PROPERTIES: &[&str] = &["netdev", "mac", "mq", "host_mtu", "rx_queue_size"];
/// Properties of QEMU's that make no difference here: our devices are modern, share nothing by locks, and
/// have no option ROM.
const IGNORED: &[&str] = &[
    "addr",
    "bootindex",
    "config-wce",
    "disable-legacy",
    "disable-modern",
    "event_idx",
    "indirect_desc",
    "iothread",
    "multifunction",
    "physical_block_size",
    "rombar",
    "romfile",
    "scsi",
    "share-rw",
    "vectors",
];
/// Those of the ignored ones that must be switches nevertheless.
const SWITCHES: &[&str] = &["share-rw", "disable-modern", "disable-legacy"];
const SECTOR: u16 = 512;
/// Slots behind a bridge.
const SLOTS: std::ops::RangeInclusive<u8> = 1..=30;

/// `device_add`.
pub(super) fn add(
    arguments: &Map<String, Value>,
    backends: &mut Backends,
    controller: &mut dyn Controller,
) -> Result<Value, QmpError> {
    let driver = arguments.get("driver").and_then(Value::as_str).unwrap_or_default();
    let used = match driver {
        BLK => BLK_PROPERTIES,
        NET => NET_PROPERTIES,
        _ => {
            let text = format!("'{driver}' is not a valid device model name");
            return Err(QmpError::generic(text));
        }
    };
    let properties = Properties::new(driver, arguments, used, IGNORED)?;
    SWITCHES.iter().try_for_each(|name| properties.switch(name).map(drop))?;
    let id = properties.required("id")?.to_owned();
    let (device, user) = if driver == NET {
        net(&id, &properties, backends)?
    } else {
        disk(&id, &properties, backends)?
    };
    let path = place(&properties, controller)?;
    match controller.execute(Command::AddDevice { device, path })? {
        Reply::Plugged { .. } => {
            backends.used(&id, user);
            Ok(json!({}))
        }
        other => Err(QmpError::generic(format!("device_add was answered with {other:?}"))),
    }
}

fn disk(
    id: &str,
    properties: &Properties<'_>,
    backends: &Backends,
) -> Result<(DeviceConfig, User), QmpError> {
    let drive = properties.required("drive")?;
    let node = backends.node(drive).ok_or_else(|| properties.cannot_find("drive", drive))?;
    // The sectors are those of the file or block device, and there is always a write cache that can be flushed.
    if let Some(size) = properties.number("logical_block_size")?
        && !matches!(size, 0 | SECTOR)
    {
        return Err(properties.refuses("logical_block_size", &json!(size)));
    }
    if properties.automatic("write-cache")? == Some(false) {
        return Err(properties.refuses("write-cache", &json!("off")));
    }
    let disk = DiskConfig {
        id: id.to_owned(),
        path: node.path.clone(),
        readonly: node.readonly,
        direct: node.direct,
        serial: properties.text("serial")?.map(str::to_owned),
        queues: properties.number("num-queues")?.unwrap_or(0),
        queue_size: properties.number("queue-size")?.unwrap_or_else(DiskConfig::default_queue_size),
        io: node.io,
    };
    Ok((DeviceConfig::Disk(disk), User::Node(drive.to_owned())))
}

fn net(
    id: &str,
    properties: &Properties<'_>,
    backends: &Backends,
) -> Result<(DeviceConfig, User), QmpError> {
    let name = properties.required("netdev")?;
    let netdev = backends.netdev(name).ok_or_else(|| properties.cannot_find("netdev", name))?;
    if let Some(user) = backends.netdev_user(name) {
        return Err(QmpError::generic(format!("Device '{name}' is in use by '{user}'")));
    }
    let mac = properties.required("mac")?;
    let taps = netdev.taps();
    if properties.switch("mq")? != Some(true) && taps.len() > 1 {
        let text = format!("netdev '{name}' has {} queues: set mq=on", taps.len());
        return Err(QmpError::generic(text));
    }
    let net = NetConfig {
        id: id.to_owned(),
        mac: MacAddr::parse(mac).map_err(|_| properties.refuses("mac", &json!(mac)))?,
        mtu: properties.number("host_mtu")?,
        queue_size: properties
            .number("rx_queue_size")?
            .unwrap_or_else(NetConfig::default_queue_size),
        taps,
        vhost: netdev.vhost(),
        tap: None,
    };
    Ok((DeviceConfig::Net(net), User::Netdev(name.to_owned())))
}

/// Where `bus` and `addr` put the device. Without `addr` it is the first free slot.
fn place(
    properties: &Properties<'_>,
    controller: &mut dyn Controller,
) -> Result<PciPath, QmpError> {
    let bus = match properties.text("bus")? {
        Some(bus) if bus != "pcie.0" => bus,
        _ => return Err(QmpError::generic("Bus 'pcie.0' does not support hotplugging")),
    };
    let Reply::Pci(functions) = controller.execute(Command::QueryPci)? else {
        return Err(QmpError::generic("the machine does not tell of its buses"));
    };
    let bridge = functions.iter().find(|it| it.id == bus && it.bridge.is_some());
    let bridge = bridge.ok_or_else(|| QmpError::generic(format!("Bus '{bus}' not found")))?.slot;
    let slot = match properties.text("addr")? {
        Some(addr) => slot(addr).ok_or_else(|| properties.refuses("addr", &json!(addr)))?,
        None => free_slot(&functions, bridge)
            .ok_or_else(|| QmpError::generic("PCI: no slot/function available, all in use"))?,
    };
    Ok(PciPath { bridge: Some(bridge), slot })
}

fn free_slot(functions: &[PciInfo], bridge: u8) -> Option<u8> {
    let at = |slot| PciPath { bridge: Some(bridge), slot };
    SLOTS.into_iter().find(|&slot| functions.iter().all(|it| it.path != at(slot)))
}

/// `device_del`. The device is gone when `DEVICE_DELETED` says so.
pub(super) fn delete(
    arguments: &Map<String, Value>,
    controller: &mut dyn Controller,
) -> Result<Value, QmpError> {
    let id = arguments.get("id").and_then(Value::as_str).unwrap_or_default();
    controller.execute(Command::RemoveDevice { id: id.to_owned() })?;
    Ok(json!({}))
}
