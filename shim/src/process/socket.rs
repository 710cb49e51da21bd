// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The shim's socket. Its path is a hash of who asks for whom, so that every start for a container of a pod finds the
//! pod's shim without being told.

use std::fs::{self, DirBuilder, Permissions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::error::{Error, Kind, Result};

/// Where containerd's shims have their sockets.
const DIRECTORY: &str = "/run/containerd/s";

/// The socket of one shim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShimSocket {
    path: PathBuf,
}

/// A socket that `start` has taken.
#[derive(Debug)]
pub enum Taken {
    /// It is ours to serve on.
    New(UnixListener),
    /// A shim is serving on it already.
    Live,
}

impl ShimSocket {
    /// The socket of the shim that serves sandbox `id` in `namespace` of the containerd at `containerd`.
    pub fn of(containerd: &str, namespace: &str, id: &str) -> Self {
        let key = format!("{}/{namespace}/{id}", containerd.trim_end_matches('/'));
        let hash: String = Sha256::digest(key).iter().map(|byte| format!("{byte:02x}")).collect();
        Self { path: Path::new(DIRECTORY).join(hash) }
    }

    /// As containerd is told.
    pub fn address(&self) -> String {
        format!("unix://{}", self.path.display())
    }

    /// Is somebody serving on it?
    pub fn is_live(&self) -> bool {
        UnixStream::connect(&self.path).is_ok()
    }

    /// Take the socket, from a dead shim if need be.
    pub fn take(&self) -> Result<Taken> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o711)
            .create(DIRECTORY)
            .map_err(|error| self.failed(&error))?;
        match UnixListener::bind(&self.path) {
            Err(error) if error.kind() == ErrorKind::AddrInUse => {
                if self.is_live() {
                    return Ok(Taken::Live);
                }
                self.remove();
                UnixListener::bind(&self.path)
            }
            other => other,
        }
        .and_then(|listener| {
            fs::set_permissions(&self.path, Permissions::from_mode(0o600))?;
            Ok(Taken::New(listener))
        })
        .map_err(|error| self.failed(&error))
    }

    /// Remove the socket. It may be gone already.
    pub fn remove(&self) {
        // Whatever else is wrong with it will be said by the next who binds it.
        let _ = fs::remove_file(&self.path);
    }

    /// Remove the socket if nobody serves on it any more.
    pub fn remove_stale(&self) {
        if matches!(UnixStream::connect(&self.path), Err(error) if error.kind() == ErrorKind::ConnectionRefused)
        {
            self.remove();
        }
    }

    fn failed(&self, error: &io::Error) -> Error {
        Error::new(Kind::Internal, format!("take socket {}: {error}", self.path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_says_who_asks_for_whom() {
        // sha256("/run/containerd/containerd.sock/default/c1")
        let socket = ShimSocket::of("/run/containerd/containerd.sock", "default", "c1");
        assert_eq!(
            socket.address(),
            "unix:///run/containerd/s/d25aa4ef11a84e954e74a5bcff06557d0b6ea8d0c00243896f29826694bbd888"
        );
        assert_ne!(socket, ShimSocket::of("/run/containerd/containerd.sock", "default", "c2"));
        assert_ne!(socket, ShimSocket::of("/run/containerd/containerd.sock", "k8s.io", "c1"));
    }
}
