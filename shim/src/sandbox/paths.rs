// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Where a sandbox keeps its sockets and its state on the host.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

/// Directories of the state of all sandboxes.
const STATES: &str = "/run/vc/sbs";

/// Directories of the sockets of all machines.
const MACHINES: &str = "/run/vc/vm";

/// The longest path that a unix socket can have (`sun_path` of unix(7), without its zero byte).
const SOCKET_PATH_MAX: usize = 107;

/// The directories of one sandbox.
#[derive(Debug, Clone)]
pub struct Paths {
    state: PathBuf,
    machine: PathBuf,
}

impl Paths {
    /// Those of sandbox `id`.
    ///
    /// # Errors
    /// The id is so long that a socket below them would have no valid path.
    pub fn new(id: &str) -> Result<Self> {
        let paths =
            Self { state: Path::new(STATES).join(id), machine: Path::new(MACHINES).join(id) };
        for socket in [paths.management_socket(), paths.console_socket()] {
            let length = socket.as_os_str().len();
            ensure!(
                length <= SOCKET_PATH_MAX,
                "{} has {length} bytes, a socket's path at most {SOCKET_PATH_MAX}: use a shorter id",
                socket.display()
            );
        }
        Ok(paths)
    }

    /// Make them.
    ///
    /// # Errors
    /// One cannot be made.
    pub fn create(&self) -> Result<()> {
        for directory in [&self.state, &self.machine] {
            let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(directory);
            made.with_context(|| format!("create {}", directory.display()))?;
        }
        Ok(())
    }

    /// Remove them with what is in them. What is not there is no error.
    ///
    /// # Errors
    /// One cannot be removed.
    pub fn remove(&self) -> Result<()> {
        for directory in [&self.machine, &self.state] {
            match fs::remove_dir_all(directory) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(error).with_context(|| format!("remove {}", directory.display()));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// The sandbox's state, for those who come after this process.
    pub fn state_file(&self) -> PathBuf {
        self.state.join("persist.json")
    }

    /// The HTTP server for `ecr-runtime` and the monitor.
    pub fn management_socket(&self) -> PathBuf {
        self.state.join("shim-monitor.sock")
    }

    /// QMP.
    pub fn qmp_socket(&self) -> PathBuf {
        self.machine.join("qmp.sock")
    }

    /// The guest's console.
    pub fn console_socket(&self) -> PathBuf {
        self.machine.join("console.sock")
    }

    /// virtiofsd.
    pub fn share_socket(&self) -> PathBuf {
        self.machine.join("vhost-fs.sock")
    }

    /// The guest's sockets, where the host has no vhost-vsock.
    pub fn vsock_socket(&self) -> PathBuf {
        self.machine.join("agent.sock")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_of_containerd_fits() {
        let paths = Paths::new(&"a".repeat(64)).unwrap();
        assert_eq!(
            paths.qmp_socket(),
            Path::new("/run/vc/vm").join("a".repeat(64)).join("qmp.sock")
        );
    }

    #[test]
    fn an_id_too_long_for_sockets_is_refused() {
        let error = Paths::new(&"a".repeat(90)).unwrap_err().to_string();
        assert!(error.contains("use a shorter id"), "{error}");
    }
}
