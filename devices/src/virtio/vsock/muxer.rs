// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Carries packets between the guest and unix sockets of the host, as Firecracker documents it:
//! - a client of the listening socket says `CONNECT <port>\n`, is connected to that port of the guest and
//!   hears `OK <its own port>\n`; it is disconnected if the guest refuses;
//! - a guest that connects to port P of the host reaches the unix socket `<path>_P`.
//!
//! Knows no queues: packets go in by [`Muxer::receive`] and come out of [`Muxer::next`]. It waits for its
//! sockets with an epoll instance of its own, whose descriptor is readable when [`Muxer::poll`] has work.
//! Interest is edge-triggered: what is readable and writable is remembered, so a connection that waits
//! for credit costs neither system calls nor wake-ups.
//!
//! No timers: a client that never says its line, or a guest that never says its last word, is dropped
//! when its place is needed.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::connection::Connection;
use super::handshake::{Handshake, Progress};
use super::link::Link;
use super::packet::{Header, TYPE_STREAM, op};
use crate::backend::unix_socket::{self, UnixSocket};

/// Context id of the host.
pub const HOST_CID: u64 = 2;

/// Most connections at a time; each may keep [`super::connection::BUFFER`] bytes.
pub const MAX_CONNECTIONS: usize = 512;
/// Most clients that have not said where they want to go; the oldest leaves first.
pub const MAX_HANDSHAKES: usize = 64;
/// Most refusals kept until the guest gives buffers. Then it must, before it can send more.
const MAX_REFUSALS: usize = 128;

/// Stands for any port in a socket address, and is none itself.
const PORT_ANY: u32 = u32::MAX;
/// Ports of connecting clients begin here, far from those that a guest connects to.
const FIRST_CLIENT_PORT: u32 = 1 << 30;

const EVENTS_PER_POLL: usize = 64;

/// A connection's ports. As a number it names its socket in epoll; no connection has host port
/// [`PORT_ANY`], which leaves numbers for other sockets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    host: u32,
    guest: u32,
}

impl Key {
    fn token(self) -> u64 {
        u64::from(self.host) << 32 | u64::from(self.guest)
    }
}

/// What a number in epoll stands for.
enum Token {
    Listener,
    Handshake(u32),
    Link(Key),
}

const LISTENER: u64 = u64::MAX;

impl From<u64> for Token {
    fn from(token: u64) -> Self {
        let [a, b, c, d, e, f, g, h] = token.to_be_bytes();
        let (host, guest) = (u32::from_be_bytes([a, b, c, d]), u32::from_be_bytes([e, f, g, h]));
        match (host, token) {
            (_, LISTENER) => Self::Listener,
            (PORT_ANY, _) => Self::Handshake(guest),
            _ => Self::Link(Key { host, guest }),
        }
    }
}

fn handshake_token(id: u32) -> u64 {
    u64::from(PORT_ANY) << 32 | u64::from(id)
}

/// See the module.
#[derive(Debug)]
pub struct Muxer {
    // Configuration.
    guest_cid: u64,
    // Wiring.
    listener: Arc<UnixSocket>,
    epoll: Epoll,
    // State.
    links: HashMap<Key, Link>,
    /// Links that may have a packet for the guest; each once.
    ready: VecDeque<Key>,
    /// RSTs for packets of no connection; at most [`MAX_REFUSALS`].
    refusals: VecDeque<Header>,
    handshakes: BTreeMap<u32, Handshake>,
    next_handshake: u32,
    next_port: u32,
}

impl Muxer {
    /// A muxer for the guest with context id `guest_cid`, whose clients come to `listener`.
    ///
    /// # Errors
    /// No epoll instance could be made.
    pub fn new(guest_cid: u64, listener: Arc<UnixSocket>) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, LISTENER);
        epoll.ctl(ControlOperation::Add, listener.as_raw_fd(), event)?;
        Ok(Self {
            guest_cid,
            listener,
            epoll,
            links: HashMap::new(),
            ready: VecDeque::new(),
            refusals: VecDeque::new(),
            handshakes: BTreeMap::new(),
            next_handshake: 0,
            next_port: FIRST_CLIENT_PORT,
        })
    }

    /// Whether [`Self::receive`] may be called: what it may have to answer has a place.
    pub fn can_receive(&self) -> bool {
        self.refusals.len() < MAX_REFUSALS
    }

    /// Whether [`Self::next`] may have a packet.
    pub fn has_next(&self) -> bool {
        !self.refusals.is_empty() || !self.ready.is_empty()
    }

    /// A packet from the guest.
    pub fn receive(&mut self, header: &Header, payload: &[u8]) {
        // Somebody else's packets are not answered: the answer would go to the wrong one.
        if header.src_cid != self.guest_cid || header.dst_cid != HOST_CID {
            return;
        }
        let key = Key { host: header.dst_port, guest: header.src_port };
        if header.kind != TYPE_STREAM || key.host == PORT_ANY {
            self.refuse(header);
            return;
        }
        if let Some(link) = self.links.get_mut(&key) {
            if link.receive(header, payload, key.host) {
                self.mark(key);
            } else {
                self.drop_link(key);
            }
        } else if header.op == op::REQUEST {
            match self.connect_to_host(key, header) {
                Ok(()) => self.mark(key),
                Err(error) => {
                    log::debug!("guest connects to port {}: {error}", key.host);
                    self.refuse(header);
                }
            }
        } else {
            self.refuse(header);
        }
    }

    fn refuse(&mut self, header: &Header) {
        if header.op != op::RST && self.can_receive() {
            self.refusals.push_back(Header { kind: TYPE_STREAM, ..header.reset() });
        }
    }

    fn connect_to_host(&mut self, key: Key, request: &Header) -> io::Result<()> {
        let mut path = self.listener.path().as_os_str().to_owned();
        path.push(format!("_{}", key.host));
        self.make_room()?;
        let stream = unix_socket::connect(&PathBuf::from(path))?;
        self.add_link(key, Connection::from_guest(request), stream)
    }

    fn add_link(&mut self, key: Key, connection: Connection, stream: UnixStream) -> io::Result<()> {
        let events = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
        let event = EpollEvent::new(events, key.token());
        self.epoll.ctl(ControlOperation::Add, stream.as_raw_fd(), event)?;
        self.links.insert(key, Link::new(connection, stream));
        Ok(())
    }

    /// Make sure that one more link has a place: drop one for which only the guest's RST is missing.
    fn make_room(&mut self) -> io::Result<()> {
        if self.links.len() < MAX_CONNECTIONS {
            return Ok(());
        }
        let spent = self.links.iter().find(|(_, link)| link.is_spent()).map(|(key, _)| *key);
        match spent {
            Some(key) => {
                self.drop_link(key);
                Ok(())
            }
            None => Err(io::Error::other(format!("there are {MAX_CONNECTIONS} connections"))),
        }
    }

    fn drop_link(&mut self, key: Key) {
        if self.links.remove(&key).is_some_and(|link| link.queued) {
            self.ready.retain(|ready| *ready != key);
        }
    }

    /// Have `key` asked for a packet.
    fn mark(&mut self, key: Key) {
        if let Some(link) = self.links.get_mut(&key)
            && !link.queued
            && link.has_next()
        {
            link.queued = true;
            self.ready.push_back(key);
        }
    }

    /// The next packet for the guest. Its payload, if any, is in the first `len` bytes of `payload`.
    pub fn next(&mut self, payload: &mut [u8]) -> Option<Header> {
        if let Some(refusal) = self.refusals.pop_front() {
            return Some(refusal);
        }
        // The first of the ready links that has something; links without are no longer ready.
        while let Some(key) = self.ready.pop_front() {
            let Some(link) = self.links.get_mut(&key) else { continue };
            link.queued = false;
            let Some(packet) = link.next(payload) else { continue };
            let (buf_alloc, fwd_cnt) = link.connection.credit_fields();
            if packet.op == op::RST {
                self.links.remove(&key);
            } else {
                self.mark(key);
            }
            return Some(Header {
                src_cid: HOST_CID,
                dst_cid: self.guest_cid,
                src_port: key.host,
                dst_port: key.guest,
                len: packet.len,
                kind: TYPE_STREAM,
                op: packet.op,
                flags: packet.flags,
                buf_alloc,
                fwd_cnt,
            });
        }
        None
    }

    /// See what has happened to the sockets. Does a bounded amount of work; the descriptor stays
    /// readable while there is more.
    ///
    /// # Errors
    /// epoll_wait(2) failed.
    pub fn poll(&mut self) -> io::Result<()> {
        let mut events = [EpollEvent::default(); EVENTS_PER_POLL];
        let count = match self.epoll.wait(0, &mut events) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            result => result?,
        };
        for event in &events[..count] {
            match Token::from(event.data()) {
                Token::Listener => self.accept(),
                Token::Handshake(id) => self.advance(id),
                Token::Link(key) => {
                    if let Some(link) = self.links.get_mut(&key) {
                        link.on_event(event.event_set());
                        self.mark(key);
                    }
                }
            }
        }
        Ok(())
    }

    /// Take the clients that wait. Those that cannot be taken, for want of descriptors, are tried again
    /// when another one comes.
    fn accept(&mut self) {
        loop {
            let stream = match self.listener.accept() {
                Ok(stream) => stream,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    log::warn!("accept a vsock client on {:?}: {error}", self.listener.path());
                    return;
                }
            };
            if self.handshakes.len() >= MAX_HANDSHAKES {
                self.handshakes.pop_first();
            }
            let id = self.next_handshake;
            // The largest number would be the listener's.
            self.next_handshake = (id + 1) % PORT_ANY;
            let event = EpollEvent::new(EventSet::IN, handshake_token(id));
            match self.epoll.ctl(ControlOperation::Add, stream.as_raw_fd(), event) {
                Ok(()) => drop(self.handshakes.insert(id, Handshake::new(stream))),
                Err(error) => log::warn!("watch a vsock client: {error}"),
            }
        }
    }

    /// Read on in what a new client says.
    fn advance(&mut self, id: u32) {
        let Some(mut handshake) = self.handshakes.remove(&id) else { return };
        let port = match handshake.advance() {
            Progress::Waiting => {
                self.handshakes.insert(id, handshake);
                return;
            }
            Progress::Connect(port) => port,
            Progress::Failed(error) => {
                log::debug!("vsock client: {error}");
                return;
            }
        };
        let stream = handshake.into_stream();
        if let Err(error) = self.connect_to_guest(port, stream) {
            log::warn!("connect a vsock client to port {port} of the guest: {error}");
        }
    }

    fn connect_to_guest(&mut self, port: u32, stream: UnixStream) -> io::Result<()> {
        self.make_room()?;
        // From now on it is watched as a link.
        let event = EpollEvent::default();
        self.epoll.ctl(ControlOperation::Delete, stream.as_raw_fd(), event)?;
        let key = self.free_key(port);
        self.add_link(key, Connection::from_host(), stream)?;
        self.mark(key);
        Ok(())
    }

    /// A key for a client that connects to `guest`. There are more ports than connections.
    fn free_key(&mut self, guest: u32) -> Key {
        loop {
            let key = Key { host: self.next_port, guest };
            self.next_port = match self.next_port + 1 {
                PORT_ANY => FIRST_CLIENT_PORT,
                port => port,
            };
            if !self.links.contains_key(&key) {
                return key;
            }
        }
    }
}

impl AsRawFd for Muxer {
    fn as_raw_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }
}

#[cfg(test)]
mod tests;
