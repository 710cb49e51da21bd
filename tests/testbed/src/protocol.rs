// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What is said over the virtio-serial port between `ecr-testbed` and pid 1 of the emulated host.
//!
//! A frame is one kind byte, the payload's length (`u32`, little endian), the payload. Structures travel as JSON,
//! program output and file contents as they are. One command runs at a time, so frames carry no identity:
//!
//! ```text
//! init -> Ready
//! ecr-testbed -> Run            init -> Output*, Ended
//!             -> Input*, Kill   (while the command runs)
//! ecr-testbed -> Collect        init -> (FileStart, FileData*)*, Collected
//! ecr-testbed -> PowerOff
//! ```
//!
//! A virtio-serial port has no end of file that can be trusted across a reset of the other side: the emulated host
//! is gone when QEMU's end of the socket closes.

use std::io::{self, Read, Write};
use std::path::PathBuf;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::exec::{CommandSpec, Ending, Stream};

/// The port's name: `/dev/virtio-ports/<this>` where udev runs, `/sys/class/virtio-ports/*/name` everywhere.
pub const PORT_NAME: &str = "ecr.control";

/// The largest payload; anything longer means that the two sides have lost each other.
const MAX_PAYLOAD: usize = 1 << 20;

/// What `ecr-testbed` sends.
#[derive(Debug)]
pub enum ToInit {
    /// Run this command.
    Run(CommandSpec),
    /// Bytes for the running command's standard input; none = end of file.
    Input(Vec<u8>),
    /// Kill the running command and everything it started.
    Kill,
    /// Send every regular file below this directory.
    Collect(PathBuf),
    /// Power the emulated host off.
    PowerOff,
}

/// What pid 1 of the emulated host sends.
#[derive(Debug)]
pub enum FromInit {
    /// The emulated host is up.
    Ready(HostReport),
    /// The command wrote this.
    Output(Stream, Vec<u8>),
    /// The command, and all that it started, is gone.
    Ended(Ending),
    /// A collected file begins.
    FileStart(FileHead),
    /// The next bytes of the file that began last.
    FileData(Vec<u8>),
    /// No more files.
    Collected,
    /// The last request could not be carried out, and why.
    Refused(String),
}

/// What the emulated host says of itself once it is up.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct HostReport {
    /// The kernel's release.
    pub kernel: String,
    /// Seconds since its kernel started.
    pub uptime: f64,
    /// What did not come up, one sentence each: a module, a mount.
    pub troubles: Vec<String>,
}

/// Name and mode of a collected file.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct FileHead {
    /// Relative to the collected directory.
    pub path: PathBuf,
    /// Permission bits.
    pub mode: u32,
}

mod kind {
    pub const RUN: u8 = 1;
    pub const INPUT: u8 = 2;
    pub const KILL: u8 = 3;
    pub const COLLECT: u8 = 4;
    pub const POWER_OFF: u8 = 5;
    pub const READY: u8 = 64;
    pub const STDOUT: u8 = 65;
    pub const STDERR: u8 = 66;
    pub const ENDED: u8 = 67;
    pub const FILE_START: u8 = 68;
    pub const FILE_DATA: u8 = 69;
    pub const COLLECTED: u8 = 70;
    pub const REFUSED: u8 = 71;
}

impl ToInit {
    /// Writes the frame.
    ///
    /// # Errors
    /// Those of the writer.
    pub fn send(&self, to: &mut impl Write) -> io::Result<()> {
        match self {
            Self::Run(spec) => write_json(to, kind::RUN, spec),
            Self::Input(bytes) => write_frame(to, kind::INPUT, bytes),
            Self::Kill => write_frame(to, kind::KILL, &[]),
            Self::Collect(path) => write_json(to, kind::COLLECT, path),
            Self::PowerOff => write_frame(to, kind::POWER_OFF, &[]),
        }
    }

    /// Reads one frame.
    ///
    /// # Errors
    /// Those of the reader, and `InvalidData` for a frame that is none.
    pub fn receive(from: &mut impl Read) -> io::Result<Self> {
        let (kind, payload) = read_frame(from)?;
        match kind {
            kind::RUN => json(&payload).map(Self::Run),
            kind::INPUT => Ok(Self::Input(payload)),
            kind::KILL => Ok(Self::Kill),
            kind::COLLECT => json(&payload).map(Self::Collect),
            kind::POWER_OFF => Ok(Self::PowerOff),
            other => Err(invalid(&format!("frame of kind {other} from ecr-testbed"))),
        }
    }
}

impl FromInit {
    /// Writes the frame, or several for output longer than one may be.
    ///
    /// # Errors
    /// Those of the writer.
    pub fn send(&self, to: &mut impl Write) -> io::Result<()> {
        match self {
            Self::Ready(report) => write_json(to, kind::READY, report),
            Self::Output(Stream::Stdout, bytes) => write_frame(to, kind::STDOUT, bytes),
            Self::Output(Stream::Stderr, bytes) => write_frame(to, kind::STDERR, bytes),
            Self::Ended(ending) => write_json(to, kind::ENDED, ending),
            Self::FileStart(head) => write_json(to, kind::FILE_START, head),
            Self::FileData(bytes) => write_frame(to, kind::FILE_DATA, bytes),
            Self::Collected => write_frame(to, kind::COLLECTED, &[]),
            Self::Refused(why) => write_json(to, kind::REFUSED, why),
        }
    }

    /// Reads one frame.
    ///
    /// # Errors
    /// Those of the reader, and `InvalidData` for a frame that is none.
    pub fn receive(from: &mut impl Read) -> io::Result<Self> {
        let (kind, payload) = read_frame(from)?;
        match kind {
            kind::READY => json(&payload).map(Self::Ready),
            kind::STDOUT => Ok(Self::Output(Stream::Stdout, payload)),
            kind::STDERR => Ok(Self::Output(Stream::Stderr, payload)),
            kind::ENDED => json(&payload).map(Self::Ended),
            kind::FILE_START => json(&payload).map(Self::FileStart),
            kind::FILE_DATA => Ok(Self::FileData(payload)),
            kind::COLLECTED => Ok(Self::Collected),
            kind::REFUSED => json(&payload).map(Self::Refused),
            other => Err(invalid(&format!("frame of kind {other} from the emulated host"))),
        }
    }
}

fn write_json(to: &mut impl Write, kind: u8, value: &impl Serialize) -> io::Result<()> {
    write_frame(to, kind, &serde_json::to_vec(value)?)
}

fn write_frame(to: &mut impl Write, kind: u8, payload: &[u8]) -> io::Result<()> {
    let length = u32::try_from(payload.len())
        .ok()
        .filter(|_| payload.len() <= MAX_PAYLOAD)
        .ok_or_else(|| invalid(&format!("a payload of {} bytes", payload.len())))?;
    // One write: a port of virtio-serial costs an exit of the emulated machine for each.
    let mut frame = Vec::with_capacity(5 + payload.len());
    frame.push(kind);
    frame.extend_from_slice(&length.to_le_bytes());
    frame.extend_from_slice(payload);
    to.write_all(&frame)?;
    to.flush()
}

fn read_frame(from: &mut impl Read) -> io::Result<(u8, Vec<u8>)> {
    let mut head = [0; 5];
    from.read_exact(&mut head)?;
    let [kind, length @ ..] = head;
    let length = u32::from_le_bytes(length) as usize;
    if length > MAX_PAYLOAD {
        return Err(invalid(&format!("a payload of {length} bytes in a frame of kind {kind}")));
    }
    let mut payload = vec![0; length];
    from.read_exact(&mut payload)?;
    Ok((kind, payload))
}

fn json<T: DeserializeOwned>(payload: &[u8]) -> io::Result<T> {
    serde_json::from_slice(payload).map_err(|e| invalid(&e.to_string()))
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the testbed's control channel: {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_follow_each_other() {
        let mut wire = Vec::new();
        FromInit::Output(Stream::Stderr, vec![0, 255, b'\n']).send(&mut wire).unwrap();
        FromInit::Ended(Ending::Exited(77)).send(&mut wire).unwrap();
        let mut from = wire.as_slice();
        match FromInit::receive(&mut from).unwrap() {
            FromInit::Output(Stream::Stderr, bytes) => assert_eq!(bytes, [0, 255, b'\n']),
            other => panic!("{other:?}"),
        }
        assert!(matches!(
            FromInit::receive(&mut from).unwrap(),
            FromInit::Ended(Ending::Exited(77))
        ));
        assert_eq!(FromInit::receive(&mut from).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn garbage_is_refused() {
        for wire in [
            &[200, 0, 0, 0, 0][..],
            &[kind::RUN, 2, 0, 0, 0, b'{', b'x'],
            &[kind::INPUT, 0, 0, 0, 255],
        ] {
            let error = ToInit::receive(&mut { wire }).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{wire:?}");
        }
    }
}
