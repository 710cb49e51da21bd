// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The other side of the protocol, for tests: it answers as it is told to, and remembers what it was asked.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::FromRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;

use parking_lot::{Condvar, Mutex};
use tempfile::TempDir;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Requests by their numbers (docs/interop/vhost-user.rst, "Front-end message types").
pub(super) mod request {
    pub(crate) const GET_FEATURES: u32 = 1;
    pub(crate) const SET_FEATURES: u32 = 2;
    pub(crate) const SET_OWNER: u32 = 3;
    pub(crate) const SET_MEM_TABLE: u32 = 5;
    pub(crate) const SET_VRING_ADDR: u32 = 9;
    pub(crate) const SET_VRING_BASE: u32 = 10;
    pub(crate) const GET_VRING_BASE: u32 = 11;
    pub(crate) const SET_VRING_KICK: u32 = 12;
    pub(crate) const SET_VRING_CALL: u32 = 13;
    pub(crate) const GET_PROTOCOL_FEATURES: u32 = 15;
    pub(crate) const GET_QUEUE_NUM: u32 = 17;
    pub(crate) const SET_VRING_ENABLE: u32 = 18;
}
use request::*;

const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// What a peer does at a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Misdeed {
    /// Refuse it.
    Refuse,
    /// Say nothing.
    Silence,
    /// Answer something else.
    Nonsense,
    /// Hang up.
    Leave,
}

/// What a peer is.
#[derive(Debug, Clone)]
pub(super) struct Nature {
    pub(super) features: u64,
    pub(super) protocol: u64,
    pub(super) queues: u64,
    /// At this request, from that occurrence on.
    pub(super) misdeed: Option<(u32, usize, Misdeed)>,
}

impl Default for Nature {
    fn default() -> Self {
        let features = 1 << 32 | 1 << 30 | 1 << 29 | 1 << 28;
        Self { features, protocol: 0b1001, queues: 9, misdeed: None }
    }
}

/// What a peer was told.
#[derive(Debug, Default)]
pub(super) struct Heard {
    pub(super) requests: Vec<(u32, Vec<u8>)>,
    pub(super) memory: Vec<File>,
    /// By queue.
    pub(super) kicks: HashMap<u8, File>,
    pub(super) calls: HashMap<u8, File>,
}

impl Heard {
    /// The bodies of all requests of one kind.
    pub(super) fn all(&self, kind: u32) -> Vec<&[u8]> {
        let of_kind = self.requests.iter().filter(|(request, _)| *request == kind);
        of_kind.map(|(_, body)| body.as_slice()).collect()
    }
}

/// A peer that listens in a directory of its own.
pub(super) struct Peer {
    dir: TempDir,
    heard: Arc<(Mutex<Heard>, Condvar)>,
    stream: Arc<Mutex<Option<UnixStream>>>,
}

impl Peer {
    pub(super) fn start(nature: Nature) -> Self {
        let dir = TempDir::new().unwrap();
        let listener = UnixListener::bind(dir.path().join("socket")).unwrap();
        let peer = Self { dir, heard: Arc::default(), stream: Arc::default() };
        let (heard, kept) = (Arc::clone(&peer.heard), Arc::clone(&peer.stream));
        thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            *kept.lock() = Some(stream.try_clone().unwrap());
            serve(stream, &nature, &heard);
            if let Some(stream) = kept.lock().take() {
                let _ = stream.shutdown(std::net::Shutdown::Both);
            }
        });
        peer
    }

    pub(super) fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    /// Die.
    pub(super) fn kill(&self) {
        if let Some(stream) = self.stream.lock().take() {
            stream.shutdown(std::net::Shutdown::Both).unwrap();
        }
    }

    pub(super) fn heard<T>(&self, look: impl FnOnce(&mut Heard) -> T) -> T {
        look(&mut self.heard.0.lock())
    }
}

/// Serve until somebody hangs up.
fn serve(mut stream: UnixStream, nature: &Nature, heard: &(Mutex<Heard>, Condvar)) {
    loop {
        let mut header = [0; 12];
        let mut fds = [0; 32];
        let Ok((12, count)) = receive(&stream, &mut header, &mut fds) else { return };
        // SAFETY: the descriptors have just been received, so nobody else owns them.
        let files = fds[..count].iter().map(|fd| unsafe { File::from_raw_fd(*fd) });
        let files: Vec<File> = files.collect();
        let field = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
        let (request, flags, size) = (field(0), field(4), field(8));
        let mut body = vec![0; size as usize];
        if stream.read_exact(&mut body).is_err() {
            return;
        }
        let occurrence = remember(&mut heard.0.lock(), request, &body, files);
        heard.1.notify_all();
        let misdeed = nature.misdeed.filter(|&(at, from, _)| at == request && occurrence >= from);
        let mut reply = answer(request, nature, &body);
        if reply.is_none() && flags & NEED_REPLY != 0 && nature.protocol & 0b1000 != 0 {
            reply = Some(0u64.to_le_bytes().to_vec());
        }
        let mut named = request;
        match misdeed.map(|(.., misdeed)| misdeed) {
            None => {}
            Some(Misdeed::Refuse) => reply = Some(1u64.to_le_bytes().to_vec()),
            Some(Misdeed::Silence) => continue,
            Some(Misdeed::Nonsense) => {
                named += 1;
                reply = Some(vec![0xee; 8]);
            }
            Some(Misdeed::Leave) => return,
        }
        let Some(reply) = reply else { continue };
        let mut message = Vec::new();
        for field in [named, 1 | REPLY, reply.len() as u32] {
            message.extend(field.to_le_bytes());
        }
        message.extend(reply);
        if stream.write_all(&message).is_err() {
            return;
        }
    }
}

fn receive(
    stream: &UnixStream,
    header: &mut [u8],
    fds: &mut [i32],
) -> Result<(usize, usize), vmm_sys_util::errno::Error> {
    let mut piece = [libc::iovec { iov_base: header.as_mut_ptr().cast(), iov_len: header.len() }];
    // SAFETY: the piece is borrowed memory, in which any bytes may stand.
    unsafe { stream.recv_with_fds(&mut piece, fds) }
}

/// Take note of a request; says how many of its kind there were before.
fn remember(heard: &mut Heard, request: u32, body: &[u8], files: Vec<File>) -> usize {
    let occurrence = heard.all(request).len();
    let queue = body.first().copied().unwrap_or_default();
    match request {
        SET_MEM_TABLE => heard.memory = files,
        SET_VRING_KICK => heard.kicks.extend(files.into_iter().map(|file| (queue, file))),
        SET_VRING_CALL => heard.calls.extend(files.into_iter().map(|file| (queue, file))),
        _ => {}
    }
    heard.requests.push((request, body.to_vec()));
    occurrence
}

/// The answer that a request has by its nature.
fn answer(request: u32, nature: &Nature, body: &[u8]) -> Option<Vec<u8>> {
    let number = match request {
        GET_FEATURES => nature.features,
        GET_PROTOCOL_FEATURES => nature.protocol,
        GET_QUEUE_NUM => nature.queues,
        GET_VRING_BASE => {
            // The queue's number, and an index by which the test knows it.
            let queue: [u8; 4] = body[..4].try_into().unwrap();
            return Some([queue, 7u32.to_le_bytes()].concat());
        }
        _ => return None,
    };
    Some(number.to_le_bytes().to_vec())
}
