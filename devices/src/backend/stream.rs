// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Reading and writing without blocking, over descriptors whose flags are not ours to change.
//!
//! `O_NONBLOCK` belongs to the open file description, which a descriptor that was handed to us shares
//! with the one who gave it: were it set on a terminal, the user's shell and every program that shares
//! the terminal would see `EAGAIN`, also after we are gone. So each kind of file gets its own way:
//! - a socket: a flag of the single call;
//! - a terminal or FIFO: opened anew through /proc/self/fd, which makes a description of our own;
//! - one of these that we may not open (another user's terminal): poll(2) first, then one byte, the
//!   most that is certain to fit;
//! - anything else (regular files, /dev/null): as it is; these do not block.

use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};

/// Device number of /dev/ptmx (Linux, Documentation/admin-guide/devices.txt).
const PTMX: libc::dev_t = libc::makedev(5, 2);

/// What a stream is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    Input,
    Output,
}

#[derive(Debug)]
enum Mode {
    /// The file never makes its user wait.
    Plain,
    /// `MSG_DONTWAIT` on each call.
    Socket,
    /// poll(2) before each call.
    Ask,
}

/// One direction of a byte stream. Calls that would have to wait fail with `WouldBlock`.
#[derive(Debug)]
pub(crate) struct Stream {
    file: File,
    mode: Mode,
}

impl Stream {
    pub(crate) fn new(fd: OwnedFd, direction: Direction) -> io::Result<Self> {
        let file = File::from(fd);
        let metadata = file.metadata()?;
        if metadata.file_type().is_socket() {
            return Ok(Self { file, mode: Mode::Socket });
        }
        if !metadata.file_type().is_fifo() && !file.is_terminal() {
            return Ok(Self { file, mode: Mode::Plain });
        }
        // A pseudo-terminal's master cannot be opened again: that would make a new terminal.
        if metadata.rdev() != PTMX
            && let Ok(own) = own_description(&file, direction)
        {
            return Ok(Self { file: own, mode: Mode::Plain });
        }
        Ok(Self { file, mode: Mode::Ask })
    }

    pub(crate) fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.mode {
            Mode::Plain => (&self.file).read(buffer),
            Mode::Socket => receive(&self.file, buffer),
            Mode::Ask => {
                self.ask(libc::POLLIN)?;
                (&self.file).read(buffer)
            }
        }
    }

    pub(crate) fn write(&self, buffer: &[u8]) -> io::Result<usize> {
        match self.mode {
            Mode::Plain => (&self.file).write(buffer),
            Mode::Socket => send(&self.file, buffer),
            Mode::Ask => {
                self.ask(libc::POLLOUT)?;
                (&self.file).write(buffer.get(..1).unwrap_or_default())
            }
        }
    }

    /// `WouldBlock` unless one of `events` (or an error, which the call will report) is there now.
    fn ask(&self, events: libc::c_short) -> io::Result<()> {
        let mut poll = libc::pollfd { fd: self.as_raw_fd(), events, revents: 0 };
        // SAFETY: one valid entry, which outlives the call.
        match unsafe { libc::poll(&raw mut poll, 1, 0) } {
            0 => Err(io::ErrorKind::WouldBlock.into()),
            n if n < 0 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    }
}

impl AsRawFd for Stream {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

/// Take what a socket has received, without waiting.
pub(crate) fn receive(socket: &impl AsRawFd, buffer: &mut [u8]) -> io::Result<usize> {
    let (data, length) = (buffer.as_mut_ptr(), buffer.len());
    // SAFETY: the buffer is valid for writes of its length during the call.
    let n = unsafe { libc::recv(socket.as_raw_fd(), data.cast(), length, libc::MSG_DONTWAIT) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// Send on a socket, without waiting and without SIGPIPE.
pub(crate) fn send(socket: &impl AsRawFd, buffer: &[u8]) -> io::Result<usize> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: the buffer is valid for reads of its length during the call.
    let n = unsafe { libc::send(socket.as_raw_fd(), buffer.as_ptr().cast(), buffer.len(), flags) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

fn own_description(file: &File, direction: Direction) -> io::Result<File> {
    OpenOptions::new()
        .read(direction == Direction::Input)
        .write(direction == Direction::Output)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    fn is_nonblocking(fd: &impl AsRawFd) -> bool {
        // SAFETY: no pointer is passed.
        unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) & libc::O_NONBLOCK != 0 }
    }

    /// Write until it would block; the number of bytes that went.
    fn fill(stream: &Stream) -> usize {
        let mut total = 0;
        loop {
            match stream.write(&[7; 4096]) {
                Ok(n) => total += n,
                Err(error) => {
                    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                    return total;
                }
            }
        }
    }

    #[test]
    fn a_pipe_does_not_block_and_keeps_its_flags() {
        let (reader, writer) = io::pipe().unwrap();
        let theirs = writer.try_clone().unwrap();
        let output = Stream::new(writer.into(), Direction::Output).unwrap();
        let sent = fill(&output);
        assert!(!is_nonblocking(&theirs));
        let input = Stream::new(reader.into(), Direction::Input).unwrap();
        let mut got = 0;
        let mut buffer = [0; 5000];
        while let Ok(n) = input.read(&mut buffer) {
            got += n;
        }
        assert_eq!(got, sent);
    }

    #[test]
    fn a_socket_does_not_block_and_keeps_its_flags() {
        let (a, _b) = UnixStream::pair().unwrap();
        let theirs = a.try_clone().unwrap();
        let stream = Stream::new(a.into(), Direction::Output).unwrap();
        assert!(fill(&stream) > 0);
        assert_eq!(stream.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        assert!(!is_nonblocking(&theirs));
    }

    #[test]
    fn what_cannot_be_opened_again_is_asked_first() {
        let (reader, writer) = io::pipe().unwrap();
        let output = Stream { file: File::from(OwnedFd::from(writer)), mode: Mode::Ask };
        let sent = fill(&output);
        assert!(sent > 0);
        let input = Stream { file: File::from(OwnedFd::from(reader)), mode: Mode::Ask };
        let mut got = 0;
        while let Ok(n) = input.read(&mut [0; 4096]) {
            got += n;
        }
        assert_eq!(got, sent);
    }
}
