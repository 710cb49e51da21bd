// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Answers as QEMU spells them: each type next to the function that fills it. Members that QEMU has and that
//! are missing here are optional in QEMU's schema.

use serde_json::{Value, json};

use super::command::COMMANDS;
use super::schema::{Type, member, optional};
use crate::control::{BlockInfo, CpuInfo, NvdimmInfo, PciBarInfo, PciInfo, Reply};

/// The version of QEMU whose protocol is spoken; clients decide by it what they may send.
const QEMU_VERSION: [u32; 3] = [10, 0, 2];
/// Which program it really is.
const PACKAGE: &str = concat!("ecr-", env!("CARGO_PKG_VERSION"));

pub(super) const VERSION: Type = Type::Object(&[
    member(
        "qemu",
        &Type::Object(&[
            member("major", &Type::Int),
            member("minor", &Type::Int),
            member("micro", &Type::Int),
        ]),
    ),
    member("package", &Type::Str),
]);

pub(super) fn version() -> Value {
    let [major, minor, micro] = QEMU_VERSION;
    json!({"qemu": {"major": major, "minor": minor, "micro": micro}, "package": PACKAGE})
}

/// What a client is greeted with. No capability is offered.
pub(super) fn greeting() -> Value {
    json!({"QMP": {"version": version(), "capabilities": []}})
}

pub(super) const COMMAND_NAMES: Type = Type::Array(&Type::Object(&[member("name", &Type::Str)]));

pub(super) fn command_names() -> Value {
    COMMANDS.iter().map(|command| json!({"name": command.name})).collect()
}

pub(super) const SCHEMA: Type = Type::Array(&Type::Object(&[
    member("name", &Type::Str),
    member("meta-type", &META_TYPE),
    optional("arg-type", &Type::Str),
    optional("ret-type", &Type::Str),
    optional("json-type", &Type::Str),
    optional("element-type", &Type::Str),
    optional("values", &Type::Array(&Type::Str)),
    optional("members", &Type::Array(&SCHEMA_MEMBER)),
]));
const META_TYPE: Type =
    Type::Enum(&["builtin", "enum", "array", "object", "alternate", "command", "event"]);
const SCHEMA_MEMBER: Type = Type::Object(&[
    member("name", &Type::Str),
    optional("type", &Type::Str),
    optional("default", &Type::Null),
]);

pub(super) const STATUS: Type = Type::Object(&[
    member("running", &Type::Bool),
    member(
        "status",
        &Type::Enum(&[
            "prelaunch",
            "running",
            "paused",
            "guest-panicked",
            "shutdown",
            "internal-error",
        ]),
    ),
]);

pub(super) fn status(reply: &Reply) -> Option<Value> {
    let Reply::Status(state) = reply else { return None };
    Some(json!({"status": state, "running": *state == crate::control::RunState::Running}))
}

pub(super) const NAME: Type = Type::Object(&[optional("name", &Type::Str)]);

pub(super) fn name(reply: &Reply) -> Option<Value> {
    let Reply::Identity(identity) = reply else { return None };
    Some(match &identity.name {
        Some(name) => json!({"name": name}),
        None => json!({}),
    })
}

pub(super) const UUID: Type = Type::Object(&[member("UUID", &Type::Str)]);

pub(super) fn uuid(reply: &Reply) -> Option<Value> {
    let Reply::Identity(identity) = reply else { return None };
    Some(json!({"UUID": identity.uuid.to_string()}))
}

pub(super) const KVM: Type =
    Type::Object(&[member("enabled", &Type::Bool), member("present", &Type::Bool)]);

pub(super) fn kvm(reply: &Reply) -> Option<Value> {
    let Reply::Machine(machine) = reply else { return None };
    Some(json!({"enabled": machine.accelerated, "present": machine.accelerated}))
}

pub(super) const MACHINES: Type = Type::Array(&Type::Object(&[
    member("name", &Type::Str),
    optional("is-default", &Type::Bool),
    member("cpu-max", &Type::Int),
    member("hotpluggable-cpus", &Type::Bool),
    member("numa-mem-supported", &Type::Bool),
    member("deprecated", &Type::Bool),
    member("acpi", &Type::Bool),
]));

pub(super) fn machines(reply: &Reply) -> Option<Value> {
    let Reply::Machine(machine) = reply else { return None };
    Some(json!([{
        "name": machine.kind.name(),
        "is-default": true,
        "cpu-max": machine.max_cpus,
        "hotpluggable-cpus": false,
        "numa-mem-supported": false,
        "deprecated": false,
        "acpi": true,
    }]))
}

pub(super) const CPUS: Type = Type::Array(&Type::Object(&[
    member("cpu-index", &Type::Int),
    member("qom-path", &Type::Str),
    member("thread-id", &Type::Int),
    member(
        "props",
        &Type::Object(&[
            member("socket-id", &Type::Int),
            member("core-id", &Type::Int),
            member("thread-id", &Type::Int),
        ]),
    ),
    member("target", &Type::Enum(&["x86_64", "aarch64"])),
]));

pub(super) fn cpus(reply: &Reply) -> Option<Value> {
    let Reply::Cpus(cpus) = reply else { return None };
    Some(cpus.iter().map(cpu).collect())
}

fn cpu(cpu: &CpuInfo) -> Value {
    json!({
        "cpu-index": cpu.index,
        "qom-path": format!("/machine/unattached/cpu[{}]", cpu.index),
        "thread-id": cpu.thread_id,
        "props": {"socket-id": cpu.socket, "core-id": cpu.core, "thread-id": cpu.thread},
        // Guests run on the host's processor.
        "target": std::env::consts::ARCH,
    })
}

pub(super) const MEMORY_SIZE: Type =
    Type::Object(&[member("base-memory", &Type::Int), optional("plugged-memory", &Type::Int)]);

pub(super) fn memory_size(reply: &Reply) -> Option<Value> {
    let Reply::Memory(memory) = reply else { return None };
    Some(json!({"base-memory": memory.base, "plugged-memory": memory.plugged}))
}

pub(super) const MEMORY_DEVICES: Type = Type::Array(&Type::Object(&[
    member("type", &Type::Enum(&["nvdimm"])),
    member(
        "data",
        &Type::Object(&[
            optional("id", &Type::Str),
            member("addr", &Type::Int),
            member("size", &Type::Int),
            member("slot", &Type::Int),
            member("node", &Type::Int),
            member("memdev", &Type::Str),
            member("hotplugged", &Type::Bool),
            member("hotpluggable", &Type::Bool),
        ]),
    ),
]));

pub(super) fn memory_devices(reply: &Reply) -> Option<Value> {
    let Reply::Memory(memory) = reply else { return None };
    Some(memory.nvdimms.iter().enumerate().map(nvdimm).collect())
}

fn nvdimm((slot, nvdimm): (usize, &NvdimmInfo)) -> Value {
    json!({
        "type": "nvdimm",
        "data": {
            "id": nvdimm.id,
            "addr": nvdimm.address,
            "size": nvdimm.size,
            "slot": slot,
            "node": 0,
            "memdev": format!("/objects/mem-{}", nvdimm.id),
            "hotplugged": false,
            "hotpluggable": false,
        },
    })
}

pub(super) const CHARDEVS: Type = Type::Array(&Type::Object(&[
    member("label", &Type::Str),
    member("filename", &Type::Str),
    member("frontend-open", &Type::Bool),
]));

pub(super) fn chardevs(reply: &Reply) -> Option<Value> {
    let Reply::Chardevs(chardevs) = reply else { return None };
    let chardevs = chardevs.iter();
    Some(
        chardevs
            .map(|one| {
                json!({"label": one.label, "filename": one.filename, "frontend-open": one.open})
            })
            .collect(),
    )
}

pub(super) const BLOCK: Type = Type::Array(&Type::Object(&[
    member("device", &Type::Str),
    optional("qdev", &Type::Str),
    member("type", &Type::Str),
    member("removable", &Type::Bool),
    member("locked", &Type::Bool),
    optional("inserted", &INSERTED),
]));
const INSERTED: Type = Type::Object(&[
    member("file", &Type::Str),
    member("ro", &Type::Bool),
    member("drv", &Type::Str),
    member("backing_file_depth", &Type::Int),
    member("encrypted", &Type::Bool),
    member("detect_zeroes", &Type::Enum(&["off", "on", "unmap"])),
    member("bps", &Type::Int),
    member("bps_rd", &Type::Int),
    member("bps_wr", &Type::Int),
    member("iops", &Type::Int),
    member("iops_rd", &Type::Int),
    member("iops_wr", &Type::Int),
    member("image", &IMAGE),
    member("cache", &CACHE),
    member("write_threshold", &Type::Int),
]);
const IMAGE: Type = Type::Object(&[
    member("filename", &Type::Str),
    member("format", &Type::Str),
    member("virtual-size", &Type::Int),
]);
const CACHE: Type = Type::Object(&[
    member("writeback", &Type::Bool),
    member("direct", &Type::Bool),
    member("no-flush", &Type::Bool),
]);

pub(super) fn block(reply: &Reply) -> Option<Value> {
    let Reply::Block(disks) = reply else { return None };
    Some(disks.iter().map(disk).collect())
}

fn disk(disk: &BlockInfo) -> Value {
    let path = disk.path.to_string_lossy();
    json!({
        "device": disk.id,
        "qdev": format!("/machine/peripheral/{}/virtio-backend", disk.id),
        "type": "unknown",
        "removable": false,
        "locked": false,
        "inserted": {
            "file": path,
            "ro": disk.readonly,
            "drv": "raw",
            "backing_file_depth": 0,
            "encrypted": false,
            "detect_zeroes": "off",
            // Requests are not throttled.
            "bps": 0, "bps_rd": 0, "bps_wr": 0,
            "iops": 0, "iops_rd": 0, "iops_wr": 0,
            "image": {"filename": path, "format": "raw", "virtual-size": disk.size},
            "cache": {"writeback": true, "direct": disk.direct, "no-flush": false},
            "write_threshold": 0,
        },
    })
}

pub(super) const PCI: Type = Type::Array(&Type::Object(&[
    member("bus", &Type::Int),
    member("devices", &Type::Array(&PCI_DEVICE)),
]));
const PCI_DEVICE: Type = Type::Object(&[
    member("bus", &Type::Int),
    member("slot", &Type::Int),
    member("function", &Type::Int),
    member("class_info", &Type::Object(&[member("class", &Type::Int)])),
    member("id", &PCI_ID),
    optional("irq", &Type::Int),
    member("irq_pin", &Type::Int),
    member("qdev_id", &Type::Str),
    optional("pci_bridge", &PCI_BRIDGE),
    member("regions", &Type::Array(&PCI_REGION)),
]);
const PCI_BRIDGE: Type = Type::Object(&[
    member(
        "bus",
        &Type::Object(&[
            member("number", &Type::Int),
            member("secondary", &Type::Int),
            member("subordinate", &Type::Int),
            member("io_range", &PCI_RANGE),
            member("memory_range", &PCI_RANGE),
            member("prefetchable_range", &PCI_RANGE),
        ]),
    ),
    optional("devices", &Type::Array(&PCI_BEHIND)),
]);
const PCI_RANGE: Type = Type::Object(&[member("base", &Type::Int), member("limit", &Type::Int)]);
/// As [`PCI_DEVICE`]; there are no bridges behind bridges.
const PCI_BEHIND: Type = Type::Object(&[
    member("bus", &Type::Int),
    member("slot", &Type::Int),
    member("function", &Type::Int),
    member("class_info", &Type::Object(&[member("class", &Type::Int)])),
    member("id", &PCI_ID),
    optional("irq", &Type::Int),
    member("irq_pin", &Type::Int),
    member("qdev_id", &Type::Str),
    member("regions", &Type::Array(&PCI_REGION)),
]);
const PCI_ID: Type = Type::Object(&[
    member("device", &Type::Int),
    member("vendor", &Type::Int),
    optional("subsystem", &Type::Int),
    optional("subsystem-vendor", &Type::Int),
]);
const PCI_REGION: Type = Type::Object(&[
    member("bar", &Type::Int),
    member("type", &Type::Enum(&["io", "memory"])),
    member("address", &Type::Int),
    member("size", &Type::Int),
    optional("prefetch", &Type::Bool),
    optional("mem_type_64", &Type::Bool),
]);

pub(super) fn pci(reply: &Reply) -> Option<Value> {
    let Reply::Pci(functions) = reply else { return None };
    let on_root = functions.iter().filter(|function| function.path.bridge.is_none());
    let devices: Value = on_root.map(|function| pci_root_device(function, functions)).collect();
    Some(json!([{"bus": 0, "devices": devices}]))
}

/// A device of the root bus, among `all`. A bridge shows what is behind it.
fn pci_root_device(function: &PciInfo, all: &[PciInfo]) -> Value {
    let mut device = pci_device(function);
    if let Some(bridge) = &function.bridge {
        let range = |(base, limit): (u64, u64)| json!({"base": base, "limit": limit});
        device["pci_bridge"] = json!({"bus": {
            "number": function.bus,
            "secondary": bridge.secondary,
            "subordinate": bridge.subordinate,
            "io_range": range(bridge.io),
            "memory_range": range(bridge.memory),
            "prefetchable_range": range(bridge.prefetchable),
        }});
        if bridge.secondary != 0 {
            let behind = all.iter().filter(|it| it.path.bridge == Some(function.slot));
            device["pci_bridge"]["devices"] = behind.map(pci_device).collect();
        }
    }
    device
}

fn pci_device(function: &PciInfo) -> Value {
    let mut device = json!({
        "bus": function.bus,
        "slot": function.slot,
        "function": function.function,
        "class_info": {"class": function.class},
        "id": {"device": function.device, "vendor": function.vendor},
        "irq_pin": function.irq_pin,
        "qdev_id": function.id,
        "regions": function.bars.iter().map(pci_region).collect::<Value>(),
    });
    // A bridge has no subsystem.
    if function.bridge.is_none() {
        device["id"]["subsystem"] = json!(function.subsystem);
        device["id"]["subsystem-vendor"] = json!(function.subsystem_vendor);
    }
    if function.irq_pin != 0 {
        device["irq"] = json!(function.irq);
    }
    device
}

fn pci_region(bar: &PciBarInfo) -> Value {
    if bar.io {
        return json!({
            "bar": bar.index, "type": "io", "address": bar.address, "size": bar.size,
        });
    }
    json!({
        "bar": bar.index,
        "type": "memory",
        "address": bar.address,
        "size": bar.size,
        "prefetch": bar.prefetch,
        "mem_type_64": bar.wide,
    })
}

pub(super) const IO_THREADS: Type = Type::Array(&Type::Object(&[
    member("id", &Type::Str),
    member("thread-id", &Type::Int),
    member("poll-max-ns", &Type::Int),
    member("poll-grow", &Type::Int),
    member("poll-shrink", &Type::Int),
    member("aio-max-batch", &Type::Int),
]));

pub(super) fn io_threads(reply: &Reply) -> Option<Value> {
    let Reply::IoThreads(threads) = reply else { return None };
    let threads = threads.iter();
    Some(
        threads
            .map(|thread| {
                // They wait for events and never poll.
                json!({
                    "id": thread.id,
                    "thread-id": thread.thread_id,
                    "poll-max-ns": 0, "poll-grow": 0, "poll-shrink": 0, "aio-max-batch": 0,
                })
            })
            .collect(),
    )
}
