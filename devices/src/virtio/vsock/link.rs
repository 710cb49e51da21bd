// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! A connection together with its socket.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use vmm_sys_util::epoll::EventSet;

use super::connection::{Connection, Received, ToGuest};
use super::packet::Header;
use crate::backend::stream;

/// See the module.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) connection: Connection,
    stream: UnixStream,
    /// The socket may have bytes or an end; until it says `WouldBlock`.
    readable: bool,
    /// The socket may take bytes; until it says `WouldBlock`.
    writable: bool,
    /// The socket's directions have been shut down after the guest's.
    write_is_shut: bool,
    read_is_shut: bool,
    /// It stands in the muxer's queue.
    pub(super) queued: bool,
}

impl Link {
    pub(super) fn new(connection: Connection, stream: UnixStream) -> Self {
        Self {
            connection,
            stream,
            readable: true,
            writable: true,
            write_is_shut: false,
            read_is_shut: false,
            queued: false,
        }
    }

    /// A packet from the guest. Returns whether the connection goes on.
    pub(super) fn receive(&mut self, header: &Header, payload: &[u8], host_port: u32) -> bool {
        match self.connection.receive(header, payload) {
            Received::Nothing => {}
            Received::Accepted => self.greet(host_port),
            Received::Ended => {
                self.flush();
                return false;
            }
        }
        self.flush();
        true
    }

    /// Tell the client that it is connected. Nothing was sent to it before, so a socket that does not
    /// take this line at once is dead.
    fn greet(&mut self, host_port: u32) {
        let line = format!("OK {host_port}\n");
        if !stream::send(&self.stream, line.as_bytes()).is_ok_and(|sent| sent == line.len()) {
            self.connection.break_off();
        }
    }

    pub(super) fn on_event(&mut self, events: EventSet) {
        let ended = events.intersects(EventSet::HANG_UP | EventSet::ERROR);
        self.readable |= ended || events.contains(EventSet::IN);
        self.writable |= ended || events.contains(EventSet::OUT);
        if ended {
            if self.connection.is_connecting() {
                self.connection.break_off();
            }
            self.connection.host_went_deaf();
        }
        self.flush();
    }

    /// Give the host what it takes of the guest's bytes, and the ends that the guest has declared.
    fn flush(&mut self) {
        while self.writable && !self.connection.to_host().is_empty() {
            match stream::send(&self.stream, self.connection.to_host()) {
                Ok(count) => self.connection.host_took(count),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.writable = false,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => self.connection.host_went_deaf(),
            }
        }
        // Either may fail when the host has left already, which is as well.
        if !self.write_is_shut && self.connection.host_has_all() {
            self.write_is_shut = true;
            let _ = self.stream.shutdown(Shutdown::Write);
        }
        if !self.read_is_shut && self.connection.guest_is_deaf() {
            self.read_is_shut = true;
            let _ = self.stream.shutdown(Shutdown::Read);
        }
    }

    pub(super) fn has_next(&self) -> bool {
        self.connection.has_next(self.readable)
    }

    /// The next packet for the guest.
    pub(super) fn next(&mut self, payload: &mut [u8]) -> Option<ToGuest> {
        let (stream, readable) = (&self.stream, self.readable);
        self.connection.next(payload, readable, |buffer| {
            let result = stream::receive(stream, buffer);
            self.readable = !matches!(&result, Err(e) if e.kind() == io::ErrorKind::WouldBlock);
            result
        })
    }

    pub(super) fn is_spent(&self) -> bool {
        self.connection.is_spent()
    }
}
