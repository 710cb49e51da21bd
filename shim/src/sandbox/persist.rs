// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! `persist.json`: what a sandbox took of the host, for those who come after this process: `delete`, after it was killed,
//! and tools. The names are Kata's.

use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::host::{cgroup, network};

/// The version of the file's form, as Kata counts it.
const VERSION: u32 = 2;

/// A sandbox's state.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct State {
    /// The form of this file.
    pub persist_version: u32,
    /// `running` or `stopped`.
    pub state: String,
    /// The machine.
    pub hypervisor_state: Hypervisor,
    /// The agent.
    pub agent_state: Agent,
    /// The network.
    pub network: Network,
    /// Cgroups.
    pub cgroups: Option<cgroup::Record>,
}

/// The machine and its helper.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Hypervisor {
    /// Kind of hypervisor.
    #[serde(rename = "Type")]
    pub kind: String,
    /// QMP.
    #[serde(rename = "APISocket")]
    pub api_socket: PathBuf,
    /// The process that the machine runs in: the shim.
    pub pid: u32,
    /// virtiofsd, 0 where there is none.
    pub virtiofs_daemon_pid: u32,
}

/// The agent.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Agent {
    /// Where it listens.
    #[serde(rename = "URL")]
    pub url: String,
}

/// The network.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Network {
    /// The network namespace.
    #[serde(rename = "NetworkID")]
    pub network_id: PathBuf,
    /// Whether the shim made it.
    pub network_created: bool,
    /// What was done in it.
    pub endpoints: Option<network::Record>,
}

impl State {
    /// Write it to `path`, whole or not at all.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        let what = || format!("write {}", path.display());
        let new = path.with_extension("json.new");
        let text = serde_json::to_vec(&Self { persist_version: VERSION, ..self.clone() })?;
        let mut options = fs::OpenOptions::new();
        let mut file = options
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&new)
            .with_context(what)?;
        file.write_all(&text).with_context(what)?;
        fs::rename(&new, path).with_context(what)
    }

    /// Read it from `path`; `None` where there is none.
    ///
    /// # Errors
    /// It cannot be read, or is something else.
    pub fn load(path: &Path) -> Result<Option<Self>> {
        let text = match fs::read(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            text => text.with_context(|| format!("read {}", path.display()))?,
        };
        serde_json::from_slice(&text).with_context(|| format!("read {}", path.display())).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("persist.json");
        assert_eq!(State::load(&path).unwrap(), None);
        let state = State {
            state: "running".into(),
            hypervisor_state: Hypervisor { virtiofs_daemon_pid: 7, ..Default::default() },
            ..Default::default()
        };
        state.save(&path).unwrap();
        let read = State::load(&path).unwrap().unwrap();
        assert_eq!(read, State { persist_version: VERSION, ..state });
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains(r#""VirtiofsDaemonPid":7"#), "{text}");
    }

    #[test]
    fn what_is_missing_is_empty() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("persist.json");
        fs::write(&path, r#"{"State":"running","Unknown":1}"#).unwrap();
        assert_eq!(State::load(&path).unwrap().unwrap().state, "running");
        fs::write(&path, "nonsense").unwrap();
        assert!(State::load(&path).is_err());
    }
}
