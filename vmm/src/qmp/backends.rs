// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Block nodes and network back ends: what clients define first and then plug devices onto. They belong to the
//! server and outlive the connection of the client that defined them, as with QEMU.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::fds::FdTable;
use super::property::switch;
use super::request::QmpError;
use super::schema::{Type, check_arguments, member, optional};
use crate::config::DiskIo;

/// Most of each kind.
const MAX: usize = 512;
const RAW: &str = "raw";

const DRIVER: Type = Type::Enum(&["raw", "file", "host_device"]);
const CACHE: Type =
    Type::Object(&[optional("direct", &Type::Bool), optional("no-flush", &Type::Bool)]);
const DISCARD: Type = Type::Enum(&["ignore", "unmap"]);
const AIO: Type = Type::Enum(&["threads", "native", "io_uring"]);
const ON_OFF_AUTO: Type = Type::Enum(&["on", "off", "auto"]);
const DETECT_ZEROES: Type = Type::Enum(&["off", "on", "unmap"]);

/// Arguments of `blockdev-add`. Those without a use here are QEMU's, and change nothing that a guest or its
/// data could notice.
pub(super) const BLOCKDEV: Type = Type::Object(&[
    member("driver", &DRIVER),
    optional("node-name", &Type::Str),
    optional("read-only", &Type::Bool),
    optional("auto-read-only", &Type::Bool),
    optional("force-share", &Type::Bool),
    optional("discard", &DISCARD),
    optional("detect-zeroes", &DETECT_ZEROES),
    optional("cache", &CACHE),
    optional("filename", &Type::Str),
    optional("aio", &AIO),
    optional("locking", &ON_OFF_AUTO),
    // The name of a node, or one defined on the spot.
    optional("file", &Type::Any),
]);

pub(super) const NODE_NAME: Type = Type::Object(&[member("node-name", &Type::Str)]);

/// Arguments of `netdev_add`.
pub(super) const NETDEV: Type = Type::Object(&[
    member("type", &Type::Enum(&["tap"])),
    member("id", &Type::Str),
    optional("fd", &Type::Str),
    optional("fds", &Type::Str),
    // A switch, also as text.
    optional("vhost", &Type::Any),
    optional("vhostfd", &Type::Str),
    optional("vhostfds", &Type::Str),
]);

pub(super) const NETDEV_ID: Type = Type::Object(&[member("id", &Type::Str)]);

/// A block node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Node {
    pub(super) path: PathBuf,
    pub(super) readonly: bool,
    pub(super) direct: bool,
    pub(super) io: DiskIo,
    /// Read-only where it cannot be written.
    auto_readonly: bool,
    /// The node it is built upon, if that has a name.
    file: Option<String>,
}

/// The host's end of a network device.
#[derive(Debug)]
pub(super) struct Netdev {
    taps: Vec<OwnedFd>,
    vhost: Vec<OwnedFd>,
}

impl Netdev {
    /// A tap for each pair of queues.
    pub(super) fn taps(&self) -> Vec<RawFd> {
        self.taps.iter().map(AsRawFd::as_raw_fd).collect()
    }

    /// A vhost device for each, or none.
    pub(super) fn vhost(&self) -> Vec<RawFd> {
        self.vhost.iter().map(AsRawFd::as_raw_fd).collect()
    }
}

impl Node {
    /// Try to open the file, so that a mistake is told by the command that made it. The device opens it again.
    fn opened(mut self) -> Result<Self, QmpError> {
        let mut opened = open(&self.path, !self.readonly);
        if opened.is_err() && self.auto_readonly {
            self.readonly = true;
            opened = open(&self.path, false);
        }
        let path = self.path.display();
        opened
            .map_err(|e| QmpError::generic(format!("Could not open '{path}': {}", reason(&e))))?;
        Ok(self)
    }
}

/// What devices are plugged onto.
#[derive(Debug, Default)]
pub(super) struct Backends {
    nodes: BTreeMap<String, Node>,
    netdevs: BTreeMap<String, Netdev>,
    /// Which back end each device uses.
    users: BTreeMap<String, User>,
}

/// A device's back end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum User {
    Node(String),
    Netdev(String),
}

impl Backends {
    pub(super) fn node(&self, name: &str) -> Option<&Node> {
        self.nodes.get(name)
    }

    pub(super) fn netdev(&self, id: &str) -> Option<&Netdev> {
        self.netdevs.get(id)
    }

    /// Device `id` was plugged onto a back end.
    pub(super) fn used(&mut self, id: &str, by: User) {
        self.users.insert(id.to_owned(), by);
    }

    /// Device `id` is gone.
    pub(super) fn released(&mut self, id: &str) {
        self.users.remove(id);
    }

    /// The device that uses a back end.
    fn user(&self, of: &User) -> Option<&str> {
        self.users.iter().find(|(_, user)| *user == of).map(|(id, _)| id.as_str())
    }

    /// The device that uses network back end `id`.
    pub(super) fn netdev_user(&self, id: &str) -> Option<&str> {
        self.user(&User::Netdev(id.to_owned()))
    }

    /// `blockdev-add`.
    pub(super) fn add_node(&mut self, arguments: &Map<String, Value>) -> Result<Value, QmpError> {
        let name = text(arguments, "node-name")
            .ok_or_else(|| QmpError::generic("'node-name' must be specified for the root node"))?;
        let inner = arguments.get("file").and_then(|file| text(file.as_object()?, "node-name"));
        self.check_name(name)?;
        if let Some(inner) = inner {
            self.check_name(inner)?;
            if inner == name {
                return Err(duplicate(name));
            }
        }
        if self.nodes.len() + 2 > MAX {
            return Err(QmpError::generic(format!(
                "there are {MAX} block nodes: delete one first"
            )));
        }
        let node = self.build(arguments)?.opened()?;
        if let (Some(inner), Some(file)) = (inner, arguments.get("file").and_then(Value::as_object))
        {
            self.nodes.insert(inner.to_owned(), self.build(file)?.opened()?);
        }
        self.nodes.insert(name.to_owned(), node);
        Ok(json!({}))
    }

    fn check_name(&self, name: &str) -> Result<(), QmpError> {
        let well_formed = name.starts_with(|first: char| first.is_ascii_alphabetic())
            && name.chars().all(|next| next.is_ascii_alphanumeric() || "-._".contains(next));
        if !well_formed {
            return Err(QmpError::generic(format!("Invalid node-name: '{name}'")));
        }
        if self.nodes.contains_key(name) { Err(duplicate(name)) } else { Ok(()) }
    }

    /// A node from its description.
    fn build(&self, arguments: &Map<String, Value>) -> Result<Node, QmpError> {
        let mut node = match (text(arguments, "driver"), arguments.get("file")) {
            (Some(RAW), Some(Value::String(name))) => {
                let node = self.nodes.get(name).cloned().ok_or_else(|| {
                    QmpError::generic(format!("Cannot find device='{name}' nor node-name='{name}'"))
                })?;
                Node { file: Some(name.clone()), ..node }
            }
            (Some(RAW), Some(Value::Object(file))) => {
                check_arguments(&BLOCKDEV, file)?;
                if text(file, "driver") == Some(RAW) {
                    return Err(QmpError::generic(
                        "a raw node on a raw node: name the file's driver",
                    ));
                }
                Node { file: text(file, "node-name").map(str::to_owned), ..self.build(file)? }
            }
            (Some(RAW), Some(_)) => {
                let text = "Invalid parameter type for 'file', expected: BlockdevRef";
                return Err(QmpError::generic(text));
            }
            (Some(RAW), None) => return Err(QmpError::generic("Parameter 'file' is missing")),
            _ => file_node(arguments)?,
        };
        node.readonly |= flag(arguments, "read-only");
        let cache = arguments.get("cache").and_then(Value::as_object);
        node.direct |= cache.is_some_and(|cache| flag(cache, "direct"));
        node.auto_readonly |= flag(arguments, "auto-read-only");
        Ok(node)
    }

    /// `blockdev-del`.
    pub(super) fn delete_node(
        &mut self,
        arguments: &Map<String, Value>,
    ) -> Result<Value, QmpError> {
        let name = text(arguments, "node-name").unwrap_or_default();
        if !self.nodes.contains_key(name) {
            let text = format!("Failed to find node with node-name='{name}'");
            return Err(QmpError::generic(text));
        }
        let below = self.nodes.values().any(|node| node.file.as_deref() == Some(name));
        if below || self.user(&User::Node(name.to_owned())).is_some() {
            return Err(QmpError::generic(format!("Node {name} is in use")));
        }
        self.nodes.remove(name);
        Ok(json!({}))
    }

    /// `netdev_add`.
    pub(super) fn add_netdev(
        &mut self,
        arguments: &Map<String, Value>,
        fds: &mut FdTable,
    ) -> Result<Value, QmpError> {
        let id = text(arguments, "id").unwrap_or_default();
        if self.netdevs.contains_key(id) {
            return Err(QmpError::generic(format!("Duplicate ID '{id}' for netdev")));
        }
        if self.netdevs.len() == MAX {
            return Err(QmpError::generic(format!("there are {MAX} netdevs: delete one first")));
        }
        let names = |one, many| -> Vec<&str> {
            let many = text(arguments, many).into_iter().flat_map(|names| names.split(':'));
            text(arguments, one).into_iter().chain(many).collect()
        };
        let (taps, vhost) = (names("fd", "fds"), names("vhostfd", "vhostfds"));
        if taps.is_empty() {
            return Err(QmpError::generic("a tap needs fd= or fds=: name what getfd received"));
        }
        let wants_vhost = match arguments.get("vhost").map(switch) {
            Some(None) => {
                let text = "Invalid parameter type for 'vhost', expected: boolean";
                return Err(QmpError::generic(text));
            }
            Some(Some(on)) => on,
            None => !vhost.is_empty(),
        };
        if wants_vhost && vhost.len() != taps.len() {
            let text = "The number of fds passed does not match the number of vhostfds passed";
            return Err(QmpError::generic(text));
        }
        // All or none, whatever is missing.
        let all: Vec<&str> = taps.iter().chain(&vhost).copied().collect();
        let mut taken = fds.take(&all)?;
        let behind = taken.split_off(taps.len());
        let vhost = if wants_vhost { behind } else { Vec::new() };
        self.netdevs.insert(id.to_owned(), Netdev { taps: taken, vhost });
        Ok(json!({}))
    }

    /// `netdev_del`.
    pub(super) fn delete_netdev(
        &mut self,
        arguments: &Map<String, Value>,
    ) -> Result<Value, QmpError> {
        let id = text(arguments, "id").unwrap_or_default();
        if !self.netdevs.contains_key(id) {
            return Err(QmpError::device_not_found(id));
        }
        if let Some(user) = self.netdev_user(id) {
            return Err(QmpError::generic(format!("Device '{id}' is in use by '{user}'")));
        }
        self.netdevs.remove(id);
        Ok(json!({}))
    }
}

fn duplicate(name: &str) -> QmpError {
    QmpError::generic(format!("Duplicate nodes with node-name='{name}'"))
}

/// A node that is a file or a block device of the host.
fn file_node(arguments: &Map<String, Value>) -> Result<Node, QmpError> {
    if arguments.contains_key("file") {
        return Err(QmpError::generic("Parameter 'file' is unexpected"));
    }
    let filename = text(arguments, "filename")
        .ok_or_else(|| QmpError::generic("Parameter 'filename' is missing"))?;
    let io = match text(arguments, "aio") {
        Some("io_uring") => DiskIo::Uring,
        Some("threads") => DiskIo::Sync,
        // Linux's old interface has been superseded.
        _ => DiskIo::Auto,
    };
    Ok(Node {
        path: filename.into(),
        readonly: false,
        direct: false,
        io,
        auto_readonly: false,
        file: None,
    })
}

fn open(path: &Path, write: bool) -> io::Result<File> {
    // A pipe without a writer must not stop us.
    File::options().read(true).write(write).custom_flags(libc::O_NONBLOCK).open(path)
}

/// The reason as C libraries spell it, without the number that Rust adds.
fn reason(error: &io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or_default().to_owned()
}

fn text<'a>(arguments: &'a Map<String, Value>, name: &str) -> Option<&'a str> {
    arguments.get(name).and_then(Value::as_str)
}

fn flag(arguments: &Map<String, Value>, name: &str) -> bool {
    arguments.get(name).and_then(Value::as_bool).unwrap_or_default()
}
