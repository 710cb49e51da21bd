// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The one table of commands: dispatch, `query-commands` and `query-qmp-schema` come from it.

use serde_json::{Map, Value, json};

use super::backends::{self, Backends};
use super::fds::FdTable;
use super::request::QmpError;
use super::schema::{self, Type, member, optional};
use super::{Controller, device, info};
use crate::control::{Command, Reply};

/// A command.
#[derive(Debug)]
pub(super) struct CommandSpec {
    pub(super) name: &'static str,
    /// An object.
    pub(super) arguments: &'static Type,
    pub(super) returns: &'static Type,
    pub(super) run: Run,
}

/// Who answers a command.
#[derive(Debug)]
pub(super) enum Run {
    /// The session: it ends the negotiation.
    Negotiate,
    /// This server knows the answer.
    Here(fn() -> Value),
    /// The controller, and how its reply is spelled; `None` where the reply belongs to another command.
    Control(Command, fn(&Reply) -> Option<Value>),
    /// What devices are made of: the command has arguments, and effects on the server.
    Plug(fn(&Map<String, Value>, &mut Workbench<'_>) -> Result<Value, QmpError>),
}

/// What a command that deals with devices works on.
pub(super) struct Workbench<'a> {
    pub(super) backends: &'a mut Backends,
    pub(super) fds: &'a mut FdTable,
    pub(super) controller: &'a mut dyn Controller,
}

const FD_NAME: Type = Type::Object(&[member("fdname", &Type::Str)]);

const CAPABILITIES: Type = Type::Object(&[optional("enable", &Type::Array(&Type::Enum(&["oob"])))]);

/// All commands there are.
pub(super) const COMMANDS: &[CommandSpec] = &[
    CommandSpec {
        name: "qmp_capabilities",
        arguments: &CAPABILITIES,
        returns: &Type::EMPTY,
        run: Run::Negotiate,
    },
    here("query-version", &info::VERSION, info::version),
    here("query-commands", &info::COMMAND_NAMES, info::command_names),
    here("query-qmp-schema", &info::SCHEMA, schema::introspect),
    query("query-status", &info::STATUS, Command::QueryStatus, info::status),
    query("query-name", &info::NAME, Command::QueryIdentity, info::name),
    query("query-uuid", &info::UUID, Command::QueryIdentity, info::uuid),
    query("query-kvm", &info::KVM, Command::QueryMachine, info::kvm),
    query("query-machines", &info::MACHINES, Command::QueryMachine, info::machines),
    query("query-cpus-fast", &info::CPUS, Command::QueryCpus, info::cpus),
    query("query-memory-size-summary", &info::MEMORY_SIZE, Command::QueryMemory, info::memory_size),
    query(
        "query-memory-devices",
        &info::MEMORY_DEVICES,
        Command::QueryMemory,
        info::memory_devices,
    ),
    query("query-chardev", &info::CHARDEVS, Command::QueryChardevs, info::chardevs),
    query("query-block", &info::BLOCK, Command::QueryBlock, info::block),
    query("query-pci", &info::PCI, Command::QueryPci, info::pci),
    query("query-iothreads", &info::IO_THREADS, Command::QueryIoThreads, info::io_threads),
    action("stop", Command::Stop),
    action("cont", Command::Cont),
    action("system_reset", Command::Reset),
    action("system_powerdown", Command::Powerdown),
    action("quit", Command::Quit),
    plug("blockdev-add", &backends::BLOCKDEV, |arguments, at| at.backends.add_node(arguments)),
    plug("blockdev-del", &backends::NODE_NAME, |arguments, at| at.backends.delete_node(arguments)),
    plug("device_add", &device::ADD, |arguments, at| {
        device::add(arguments, at.backends, at.controller)
    }),
    plug("device_del", &device::DELETE, |arguments, at| device::delete(arguments, at.controller)),
    plug("netdev_add", &backends::NETDEV, |arguments, at| {
        at.backends.add_netdev(arguments, at.fds)
    }),
    plug("netdev_del", &backends::NETDEV_ID, |arguments, at| at.backends.delete_netdev(arguments)),
    plug("getfd", &FD_NAME, |arguments, at| at.fds.name(fd_name(arguments)).map(|()| json!({}))),
    plug("closefd", &FD_NAME, |arguments, at| at.fds.close(fd_name(arguments)).map(|()| json!({}))),
];

fn fd_name(arguments: &Map<String, Value>) -> &str {
    arguments.get("fdname").and_then(Value::as_str).unwrap_or_default()
}

const fn plug(
    name: &'static str,
    arguments: &'static Type,
    run: fn(&Map<String, Value>, &mut Workbench<'_>) -> Result<Value, QmpError>,
) -> CommandSpec {
    CommandSpec { name, arguments, returns: &Type::EMPTY, run: Run::Plug(run) }
}

const fn here(name: &'static str, returns: &'static Type, answer: fn() -> Value) -> CommandSpec {
    CommandSpec { name, arguments: &Type::EMPTY, returns, run: Run::Here(answer) }
}

const fn query(
    name: &'static str,
    returns: &'static Type,
    command: Command,
    spell: fn(&Reply) -> Option<Value>,
) -> CommandSpec {
    CommandSpec { name, arguments: &Type::EMPTY, returns, run: Run::Control(command, spell) }
}

const fn action(name: &'static str, command: Command) -> CommandSpec {
    query(name, &Type::EMPTY, command, done)
}

fn done(reply: &Reply) -> Option<Value> {
    matches!(reply, Reply::Done).then(|| json!({}))
}

/// Find a command and check its arguments.
pub(super) fn find(
    name: &str,
    arguments: &Map<String, Value>,
) -> Result<&'static CommandSpec, QmpError> {
    let spec = COMMANDS.iter().find(|spec| spec.name == name).ok_or_else(|| {
        QmpError::command_not_found(format!("The command {name} has not been found"))
    })?;
    schema::check_arguments(spec.arguments, arguments)?;
    Ok(spec)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::config::MachineType;
    use crate::control::{
        BlockInfo, ChardevInfo, CpuInfo, Identity, IoThreadInfo, MachineInfo, MemoryInfo,
        NvdimmInfo, PciBarInfo, PciBridgeInfo, PciInfo, PciPath, RunState,
    };

    /// A reply with something in every field.
    fn reply(command: &Command) -> Reply {
        match command {
            Command::Stop
            | Command::Cont
            | Command::Reset
            | Command::Powerdown
            | Command::Quit
            | Command::RemoveDevice { .. } => Reply::Done,
            Command::AddDisk(_) | Command::AddNet(_) | Command::AddDevice { .. } => {
                Reply::Plugged { path: PciPath { bridge: Some(2), slot: 1 } }
            }
            Command::QueryStatus => Reply::Status(RunState::Running),
            Command::QueryIdentity => Reply::Identity(Identity {
                name: Some("vm".into()),
                uuid: uuid::Uuid::from_u128(1),
            }),
            Command::QueryMachine => Reply::Machine(MachineInfo {
                kind: MachineType::Q35,
                max_cpus: 64,
                accelerated: true,
            }),
            Command::QueryCpus => Reply::Cpus(vec![CpuInfo {
                index: 1,
                thread_id: 4711,
                socket: 0,
                core: 1,
                thread: 0,
            }]),
            Command::QueryMemory => Reply::Memory(MemoryInfo {
                base: 1 << 30,
                plugged: 0,
                nvdimms: vec![NvdimmInfo {
                    id: "image".into(),
                    address: 4 << 30,
                    size: 128 << 20,
                    path: PathBuf::from("/image"),
                }],
            }),
            Command::QueryChardevs => Reply::Chardevs(vec![ChardevInfo {
                label: "console".into(),
                filename: "null".into(),
                open: true,
            }]),
            Command::QueryBlock => Reply::Block(vec![BlockInfo {
                id: "disk0".into(),
                path: PathBuf::from("/disk"),
                size: 1 << 30,
                readonly: true,
                direct: true,
            }]),
            Command::QueryPci => Reply::Pci(vec![pci_bridge(), pci_info()]),
            Command::QueryLastOutput => Reply::LastOutput(String::new()),
            Command::QueryIoThreads => {
                Reply::IoThreads(vec![IoThreadInfo { id: "ecr-io0".into(), thread_id: 4712 }])
            }
        }
    }

    fn pci_info() -> PciInfo {
        let bar = PciBarInfo {
            index: 0,
            io: false,
            prefetch: true,
            wide: true,
            address: 0xC000_0000,
            size: 0x4000,
        };
        PciInfo {
            bus: 1,
            path: PciPath { bridge: Some(2), slot: 3 },
            slot: 3,
            function: 0,
            id: "disk0".into(),
            vendor: 0x1AF4,
            device: 0x1042,
            subsystem: 0x1100,
            subsystem_vendor: 0x1AF4,
            class: 0x0180,
            irq_pin: 1,
            irq: 11,
            bars: vec![bar.clone(), PciBarInfo { index: 2, io: true, ..bar }],
            bridge: None,
        }
    }

    fn pci_bridge() -> PciInfo {
        PciInfo {
            bus: 0,
            path: PciPath { bridge: None, slot: 2 },
            slot: 2,
            class: 0x0604,
            irq_pin: 0,
            bars: Vec::new(),
            bridge: Some(PciBridgeInfo {
                secondary: 1,
                subordinate: 1,
                io: (0x1000, 0x1FFF),
                memory: (0xC000_0000, 0xC01F_FFFF),
                prefetchable: (0x80_0000_0000, 0x80_001F_FFFF),
            }),
            ..pci_info()
        }
    }

    #[test]
    fn what_is_behind_a_bridge_is_shown_with_it() {
        let shown = info::pci(&Reply::Pci(vec![pci_bridge(), pci_info()])).unwrap();
        let devices = shown[0]["devices"].as_array().unwrap();
        assert_eq!(devices.len(), 1);
        let bridge = &devices[0]["pci_bridge"];
        assert_eq!(bridge["bus"]["secondary"], 1);
        assert_eq!(
            bridge["bus"]["memory_range"],
            json!({"base": 0xC000_0000u32, "limit": 0xC01F_FFFFu32})
        );
        assert_eq!(bridge["devices"][0]["qdev_id"], "disk0");
        assert_eq!(bridge["devices"][0]["bus"], 1);
    }

    #[test]
    fn replies_of_the_controller_keep_to_the_schema() {
        for spec in COMMANDS {
            if let Run::Control(command, spell) = &spec.run {
                let value = spell(&reply(command)).unwrap();
                spec.returns.check(spec.name, &value).unwrap();
            }
        }
    }

    #[test]
    fn a_reply_that_belongs_elsewhere_is_not_spelled() {
        let stray = Reply::Status(RunState::Running);
        for spec in COMMANDS.iter().filter(|spec| spec.name != "query-status") {
            if let Run::Control(_, spell) = &spec.run {
                assert_eq!(spell(&stray), None, "{}", spec.name);
            }
        }
    }

    #[test]
    fn finds_a_command_with_the_arguments_it_takes() {
        let arguments = json!({"enable": []});
        let spec = find("qmp_capabilities", arguments.as_object().unwrap()).unwrap();
        assert_eq!(spec.name, "qmp_capabilities");
    }

    #[test]
    fn refuses_in_qemus_words() {
        assert_eq!(
            find("nonexistent", &Map::new()).unwrap_err(),
            QmpError::command_not_found("The command nonexistent has not been found")
        );
        let arguments = json!({"a": 1});
        assert_eq!(
            find("stop", arguments.as_object().unwrap()).unwrap_err(),
            QmpError::generic("Parameter 'a' is unexpected")
        );
    }

    #[test]
    fn the_server_keeps_its_own_answers_to_the_schema() {
        for spec in COMMANDS {
            if let Run::Here(answer) = &spec.run {
                spec.returns.check(spec.name, &answer()).unwrap();
            }
        }
    }
}
