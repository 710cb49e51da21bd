// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Kata's configuration files and annotations.
//!
//! [`Config::for_sandbox`] does all of it for one sandbox; the steps are public, too, for tools. A value comes from, in
//! falling order: an annotation, the drop-in files beside the configuration file, that file, the default. Each value's
//! origin is kept. `docs/configuration.md` lists the keys; a test compares it with the tables here.
//!
//! | module | subject |
//! |---|---|
//! | `setting` | the table of keys |
//! | `hypervisor`, `tables` | the keys |
//! | `sources`, `file` | which file is read, and reading it |
//! | `check` | clamps, and what cannot work |
//! | `annotations`, `asset` | what a pod may change |
//! | `container_type`, `sizing` | what other annotations say |
//! | `cmdline` | the guest kernel's parameters |
//! | `print` | the effective configuration, for people |

mod annotations;
mod asset;
mod check;
mod cmdline;
mod container_type;
mod file;
mod hypervisor;
mod print;
mod setting;
mod sizing;
mod sources;
mod tables;

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::PathBuf;

use toml::Value;

use crate::error::Result;
use setting::{Honoured, Key};

pub use cmdline::{Root, kernel_cmdline};
pub use container_type::{ContainerType, container_type, sandbox_id};
pub use hypervisor::{
    BlockAio, BlockDriver, ExtraMonitor, Hypervisor, MACHINE_TYPE, RootfsType, SharedFs, VfioPort,
    VirtioFsCache,
};
pub use sizing::{Sizing, requested_by_annotations, requested_by_resources};
pub use sources::{DEFAULT_PATHS, HostFacts, Sources};
pub use tables::{Agent, EmptyDirMode, Factory, Image, NetModel, Runtime, VfioMode};

/// The tables of a configuration file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Table {
    Hypervisor,
    Agent,
    Runtime,
    Factory,
    Image,
}

impl Table {
    /// Its header as ecr writes it.
    fn header(self) -> &'static str {
        match self {
            Self::Hypervisor => "hypervisor.ecr",
            Self::Agent => "agent.kata",
            Self::Runtime => "runtime",
            Self::Factory => "factory",
            Self::Image => "image",
        }
    }

    fn keys(self) -> &'static [Key] {
        match self {
            Self::Hypervisor => hypervisor::KEYS,
            Self::Agent => tables::AGENT_KEYS,
            Self::Runtime => tables::RUNTIME_KEYS,
            Self::Factory => tables::FACTORY_KEYS,
            Self::Image => tables::IMAGE_KEYS,
        }
    }

    fn key(self, name: &str) -> Option<&'static Key> {
        self.keys().iter().find(|key| key.name == name)
    }
}

const TABLES: [Table; 5] =
    [Table::Hypervisor, Table::Agent, Table::Runtime, Table::Factory, Table::Image];

/// All keys of all tables.
fn all_keys() -> impl Iterator<Item = &'static Key> {
    TABLES.iter().flat_map(|table| table.keys())
}

/// Where a value comes from.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Origin {
    /// Nobody has set it.
    #[default]
    Default,
    /// A configuration file, or a drop-in file beside it.
    File {
        /// The file.
        path: PathBuf,
        /// The line.
        line: usize,
    },
    /// The annotation of this key.
    Annotation(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File { path, line } => write!(f, "{}:{line}", path.display()),
            Self::Annotation(key) => write!(f, "annotation {key}"),
        }
    }
}

/// The effective configuration.
#[derive(Debug, Clone, Default)]
pub struct Config {
    /// The configuration file, symbolic links resolved.
    pub path: PathBuf,
    /// The virtual machine.
    pub hypervisor: Hypervisor,
    /// The agent in the guest.
    pub agent: Agent,
    /// The shim.
    pub runtime: Runtime,
    /// Machines made before they are needed.
    pub factory: Factory,
    /// Images inside the guest.
    pub image: Image,
    host: HostFacts,
    origins: BTreeMap<(Table, &'static str), Origin>,
    /// What was asked for, word for word; clamps may have put something else into effect.
    asked: BTreeMap<(Table, &'static str), Value>,
}

impl Config {
    /// The configuration of a sandbox with these annotations, checked. What is asked for and has no effect yet is logged.
    ///
    /// # Errors
    /// No usable file, a value that makes no sense, an annotation that is not allowed, or a file that is missing.
    pub fn for_sandbox(sources: &Sources, annotations: &HashMap<String, String>) -> Result<Self> {
        let mut config = load(sources)?;
        config.apply_annotations(annotations)?;
        for line in config.not_honoured() {
            log::warn!("{line}");
        }
        Ok(config)
    }

    /// What was asked for and has no effect yet, one line for each.
    pub fn not_honoured(&self) -> Vec<String> {
        let default = Self::default();
        all_keys()
            .filter_map(|key| {
                let value = (key.get)(self);
                let idle = match key.honoured {
                    Honoured::Yes | Honoured::Moot => false,
                    Honoured::No => value != (key.get)(&default),
                    Honoured::Only(values) => !value.as_str().is_some_and(|v| values.contains(&v)),
                };
                idle.then(|| {
                    let (table, name) = (key.table.header(), key.name);
                    let origin = self.origin(key);
                    format!(
                        "configuration: {table}.{name} = {value} is not honoured yet ({origin})"
                    )
                })
            })
            .collect()
    }

    fn origin(&self, key: &Key) -> &Origin {
        const DEFAULT: &Origin = &Origin::Default;
        self.origins.get(&(key.table, key.name)).unwrap_or(DEFAULT)
    }

    /// Set a key. The error says what is wrong with the value.
    fn set(&mut self, key: &Key, value: &Value, origin: Origin) -> Result<(), String> {
        (key.set)(self, value)?;
        self.origins.insert((key.table, key.name), origin);
        self.asked.insert((key.table, key.name), value.clone());
        Ok(())
    }
}

/// The configuration that `sources` lead to, without annotations, checked.
///
/// # Errors
/// No usable file, a value that makes no sense, or a file that is missing.
pub fn load(sources: &Sources) -> Result<Config> {
    let mut config = read(sources)?;
    config.check_assets()?;
    Ok(config)
}

/// The same, but the files that it names (kernel, image) need not be there.
///
/// # Errors
/// No usable file, or a value that makes no sense.
pub fn read(sources: &Sources) -> Result<Config> {
    let mut config = Config { path: sources.find()?, host: sources.host, ..Config::default() };
    config.read_files()?;
    config.clamp();
    config.check()?;
    Ok(config)
}

#[cfg(test)]
mod tests;
