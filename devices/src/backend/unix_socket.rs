// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Unix stream sockets with a name in the file system: listening ones that clean up after themselves,
//! and connecting without ever waiting (unix(7)).

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// Longest path of a socket in bytes: `sun_path` less its terminating zero.
pub const MAX_PATH: usize = 107;

/// Why a socket could not be made.
#[derive(Debug, thiserror::Error)]
pub enum UnixSocketError {
    /// The path does not fit into a socket address.
    #[error(
        "unix socket path {path:?} is {} bytes long, more than the {MAX_PATH} that Linux allows: \
         choose a shorter one",
        .path.as_os_str().len()
    )]
    TooLong {
        /// The path.
        path: PathBuf,
    },
    /// Somebody listens there.
    #[error("unix socket {path:?} is in use by another process: choose another path")]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// There is a file that is not a socket.
    #[error("{path:?} exists and is not a socket: remove it or choose another path")]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The system refused.
    #[error("listen on unix socket {path:?}: {source}")]
    Listen {
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A listening socket that accepts without blocking. Dropping it removes its file, unless somebody has
/// put another one in its place.
#[derive(Debug)]
pub struct UnixSocket {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the file that was made.
    identity: (u64, u64),
}

impl UnixSocket {
    /// Listen at `path`. A socket file that nobody listens on any more is replaced.
    ///
    /// # Errors
    /// See [`UnixSocketError`].
    pub fn bind(path: &Path) -> Result<Self, UnixSocketError> {
        let path = path.to_path_buf();
        if path.as_os_str().len() > MAX_PATH {
            return Err(UnixSocketError::TooLong { path });
        }
        clear_the_way(&path)?;
        let listen = || {
            let listener = UnixListener::bind(&path)?;
            listener.set_nonblocking(true)?;
            let metadata = fs::symlink_metadata(&path)?;
            Ok((listener, (metadata.dev(), metadata.ino())))
        };
        match listen() {
            Ok((listener, identity)) => Ok(Self { listener, path, identity }),
            Err(source) => Err(UnixSocketError::Listen { path, source }),
        }
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Take the next client.
    ///
    /// # Errors
    /// `WouldBlock` when there is none.
    pub fn accept(&self) -> io::Result<UnixStream> {
        Ok(self.listener.accept()?.0)
    }
}

impl AsRawFd for UnixSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.listener.as_raw_fd()
    }
}

impl Drop for UnixSocket {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == self.identity);
        if ours && let Err(error) = fs::remove_file(&self.path) {
            log::warn!("remove unix socket {:?}: {error}", self.path);
        }
    }
}

/// Remove a dead socket at `path`; refuse a live one and any other file.
fn clear_the_way(path: &Path) -> Result<(), UnixSocketError> {
    let fail = |source| UnixSocketError::Listen { path: path.to_path_buf(), source };
    match fs::metadata(path) {
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(UnixSocketError::NotASocket { path: path.to_path_buf() });
        }
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(fail(error)),
    }
    // A datagram socket cannot connect to a stream socket, so the question neither waits for nor
    // disturbs whoever listens: a live one answers EPROTOTYPE, a dead one ECONNREFUSED.
    match UnixDatagram::unbound().and_then(|probe| probe.connect(path)) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(fail)
        }
        Err(error) if error.raw_os_error() != Some(libc::EPROTOTYPE) => Err(fail(error)),
        _ => Err(UnixSocketError::InUse { path: path.to_path_buf() }),
    }
}

/// Connect to the stream socket at `path` and return a non-blocking stream.
///
/// # Errors
/// `WouldBlock` when the listener's queue is full; otherwise as connect(2).
pub fn connect(path: &Path) -> io::Result<UnixStream> {
    let bytes = path.as_os_str().as_bytes();
    if bytes.len() > MAX_PATH || bytes.contains(&0) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut address = libc::sockaddr_un {
        sun_family: libc::sa_family_t::try_from(libc::AF_UNIX).unwrap_or_default(),
        sun_path: [0; MAX_PATH + 1],
    };
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = libc::c_char::from_ne_bytes([*from]);
    }
    let kind = libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: no pointer is passed.
    let fd = unsafe { libc::socket(libc::AF_UNIX, kind, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just returned `fd`, and nobody else knows it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let length = libc::socklen_t::try_from(size_of_val(&address)).unwrap_or_default();
    // SAFETY: the address lives across the call, is `length` bytes long and ends with a zero.
    let rc = unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), length) };
    if rc < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(UnixStream::from(socket))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_goes_with_the_socket() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let socket = UnixSocket::bind(&path).unwrap();
        assert_eq!(socket.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        connect(&path).unwrap();
        socket.accept().unwrap();
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn the_file_of_a_successor_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let first = UnixSocket::bind(&path).unwrap();
        fs::rename(&path, dir.path().join("moved")).unwrap();
        let _second = UnixSocket::bind(&path).unwrap();
        drop(first);
        connect(&path).unwrap();
    }

    #[test]
    fn a_dead_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let live = UnixSocket::bind(&path).unwrap();
        let error = UnixSocket::bind(&path).unwrap_err();
        assert!(matches!(error, UnixSocketError::InUse { .. }), "{error}");
        assert_eq!(live.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn refuses_what_cannot_be_a_socket() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "kept").unwrap();
        let error = UnixSocket::bind(&file).unwrap_err();
        assert!(matches!(error, UnixSocketError::NotASocket { .. }), "{error}");
        assert_eq!(fs::read(&file).unwrap(), b"kept");

        let long = dir.path().join("x".repeat(MAX_PATH));
        let error = UnixSocket::bind(&long).unwrap_err();
        assert!(error.to_string().contains("107"), "{error}");
        assert_eq!(connect(&long).unwrap_err().kind(), io::ErrorKind::InvalidInput);

        let error = UnixSocket::bind(&dir.path().join("no/such")).unwrap_err();
        assert!(matches!(error, UnixSocketError::Listen { .. }), "{error}");
    }

    #[test]
    fn connecting_to_a_full_queue_does_not_wait() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let socket = UnixSocket::bind(&path).unwrap();
        // SAFETY: no pointer is passed.
        assert_eq!(unsafe { libc::listen(socket.as_raw_fd(), 0) }, 0);
        let _first = connect(&path).unwrap();
        assert_eq!(connect(&path).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }
}
