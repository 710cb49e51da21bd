// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! One stream connection as a state machine, section 5.10.6.3 to 5.10.6.6: no sockets, no queues.
//!
//! It says which packet the guest is to get next and which bytes the host is to get; the muxer carries
//! them. Credit works both ways: the guest may fill [`BUFFER`] bytes that the host has not taken yet,
//! and gets no more than it has room for.

use std::collections::VecDeque;
use std::io;

use super::packet::{Header, op, shutdown};

/// Most bytes from the guest that are kept for a slow host, and the credit that the guest is given.
pub const BUFFER: u32 = 64 << 10;

/// What a packet from the guest meant for the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Received {
    /// Nothing beyond the connection itself.
    Nothing,
    /// The guest has accepted the host's request.
    Accepted,
    /// The connection has ended, and nobody expects a word about it.
    Ended,
}

/// A packet for the guest: operation, flags, and how many bytes of payload were filled in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ToGuest {
    /// One of [`op`].
    pub op: u16,
    /// Depends on the operation.
    pub flags: u32,
    /// Bytes of payload.
    pub len: u32,
}

/// One connection. Sizes are in bytes, counters modulo 2^32.
#[derive(Debug)]
pub struct Connection {
    /// The guest has not answered the host's request yet.
    connecting: bool,
    /// The connection must end with an RST from us, which is all that is left to do.
    broken: bool,

    // From guest to host.
    /// Received, not yet taken by the host; at most [`BUFFER`].
    buffer: VecDeque<u8>,
    /// Counts what has left `buffer`.
    fwd_cnt: u32,
    /// The `fwd_cnt` that the guest knows.
    fwd_cnt_told: u32,
    /// The guest has said that it will send no more.
    guest_sent_all: bool,
    /// The host takes no more: what the guest sends is dropped.
    host_is_deaf: bool,

    // From host to guest.
    /// Counts what was sent to the guest.
    sent: u32,
    /// Size of the guest's buffer and what has left it.
    peer_buf_alloc: u32,
    peer_fwd_cnt: u32,
    /// The guest has been asked for credit since it last ran out.
    credit_requested: bool,
    /// The host will send no more.
    host_sent_all: bool,
    /// The guest has said that it will receive no more.
    guest_is_deaf: bool,

    // What the guest has yet to be told.
    request_due: bool,
    response_due: bool,
    credit_due: bool,
    shutdown_due: bool,
}

impl Connection {
    fn new(connecting: bool) -> Self {
        Self {
            connecting,
            broken: false,
            buffer: VecDeque::new(),
            fwd_cnt: 0,
            fwd_cnt_told: 0,
            guest_sent_all: false,
            host_is_deaf: false,
            sent: 0,
            peer_buf_alloc: 0,
            peer_fwd_cnt: 0,
            credit_requested: false,
            host_sent_all: false,
            guest_is_deaf: false,
            request_due: connecting,
            response_due: !connecting,
            credit_due: false,
            shutdown_due: false,
        }
    }

    /// The host asks the guest.
    pub fn from_host() -> Self {
        Self::new(true)
    }

    /// The guest has asked with `request`, and the host accepts.
    pub fn from_guest(request: &Header) -> Self {
        let mut connection = Self::new(false);
        connection.learn_credit(request);
        connection
    }

    /// A packet from the guest.
    pub fn receive(&mut self, header: &Header, payload: &[u8]) -> Received {
        if header.op == op::RST {
            return Received::Ended;
        }
        self.learn_credit(header);
        match (header.op, self.connecting) {
            (op::RESPONSE, true) => {
                self.connecting = false;
                return Received::Accepted;
            }
            (op::RW, false) => self.receive_payload(payload),
            (op::SHUTDOWN, false) => {
                self.guest_is_deaf |= header.flags & shutdown::RCV != 0;
                self.guest_sent_all |= header.flags & shutdown::SEND != 0;
            }
            (op::CREDIT_UPDATE, false) => {}
            (op::CREDIT_REQUEST, false) => self.credit_due = true,
            _ => self.break_off(),
        }
        Received::Nothing
    }

    fn receive_payload(&mut self, payload: &[u8]) {
        let room = (BUFFER as usize).saturating_sub(self.buffer.len());
        if payload.len() > room || self.guest_sent_all {
            self.break_off();
            return;
        }
        self.buffer.extend(payload);
        if self.host_is_deaf {
            self.host_took(payload.len());
        }
    }

    fn learn_credit(&mut self, header: &Header) {
        self.peer_buf_alloc = header.buf_alloc;
        self.peer_fwd_cnt = header.fwd_cnt;
        self.credit_requested &= self.credit() == 0;
    }

    /// How many bytes the guest has room for. A guest that counts wrongly gets nothing.
    fn credit(&self) -> u32 {
        self.peer_buf_alloc.saturating_sub(self.sent.wrapping_sub(self.peer_fwd_cnt))
    }

    /// End the connection with an RST.
    pub fn break_off(&mut self) {
        self.broken = true;
        self.buffer.clear();
    }

    /// Bytes for the host; not all of them when they lie in two pieces.
    pub fn to_host(&self) -> &[u8] {
        self.buffer.as_slices().0
    }

    /// The host has taken the first `count` bytes of [`Self::to_host`].
    pub fn host_took(&mut self, count: usize) {
        let taken = self.buffer.drain(..count.min(self.buffer.len())).len();
        // At most BUFFER, so nothing is cut off.
        self.fwd_cnt = self.fwd_cnt.wrapping_add(u32::try_from(taken).unwrap_or(BUFFER));
        // Often enough that a guest which waits for credit gets it, and not for every packet.
        self.credit_due |= self.fwd_cnt.wrapping_sub(self.fwd_cnt_told) >= BUFFER / 2;
    }

    /// The host takes no more.
    pub fn host_went_deaf(&mut self) {
        if !self.host_is_deaf {
            self.host_is_deaf = true;
            self.shutdown_due = true;
            self.host_took(self.buffer.len());
        }
    }

    /// The host has got all that the guest will ever send.
    pub fn host_has_all(&self) -> bool {
        self.broken || (self.guest_sent_all && self.buffer.is_empty())
    }

    /// The guest has not answered the host's request yet.
    pub fn is_connecting(&self) -> bool {
        self.connecting
    }

    /// The guest wants nothing more from the host.
    pub fn guest_is_deaf(&self) -> bool {
        self.guest_is_deaf
    }

    /// Nothing is left to do but to wait for the guest's RST, which it owes us and may never send.
    pub fn is_spent(&self) -> bool {
        self.host_sent_all && self.host_is_deaf && !self.shutdown_due
    }

    /// Whether bytes of the host could go to the guest now.
    fn takes_payload(&self) -> bool {
        !self.connecting && !self.host_sent_all && !self.guest_is_deaf && self.credit() > 0
    }

    /// Whether both directions have ended and the guest waits for our RST.
    fn has_ended(&self) -> bool {
        self.host_has_all() && (self.guest_is_deaf || (self.host_sent_all && !self.shutdown_due))
    }

    /// Whether [`Self::next`] has something to say; `readable`: whether the host has bytes, or an end.
    pub fn has_next(&self, readable: bool) -> bool {
        self.broken
            || self.request_due
            || self.response_due
            || (!self.connecting
                && (self.shutdown_due
                    || self.has_ended()
                    || self.credit_due
                    || (readable && (self.takes_payload() || self.must_request_credit()))))
    }

    fn must_request_credit(&self) -> bool {
        !self.connecting
            && !self.host_sent_all
            && !self.guest_is_deaf
            && self.credit() == 0
            && !self.credit_requested
    }

    /// The next packet for the guest. `read` is asked for bytes of the host, at most once, with a buffer
    /// that is not empty: 0 means that it will send no more, `WouldBlock` that there is nothing now, any
    /// other error breaks the connection. An [`op::RST`] is the last packet.
    pub fn next(
        &mut self,
        payload: &mut [u8],
        readable: bool,
        read: impl FnOnce(&mut [u8]) -> io::Result<usize>,
    ) -> Option<ToGuest> {
        let mut len = 0;
        if readable && !self.broken && !self.response_due && self.takes_payload() {
            len = self.read_payload(payload, read);
        }
        let (op, flags) = if self.broken {
            (op::RST, 0)
        } else if std::mem::take(&mut self.request_due) {
            (op::REQUEST, 0)
        } else if std::mem::take(&mut self.response_due) {
            (op::RESPONSE, 0)
        } else if self.connecting {
            return None;
        } else if len > 0 {
            (op::RW, 0)
        } else if self.has_ended() {
            (op::RST, 0)
        } else if std::mem::take(&mut self.shutdown_due) {
            (op::SHUTDOWN, self.shutdown_flags())
        } else if readable && self.must_request_credit() {
            self.credit_requested = true;
            (op::CREDIT_REQUEST, 0)
        } else if self.credit_due {
            (op::CREDIT_UPDATE, 0)
        } else {
            return None;
        };
        // Every packet carries our side of the credit.
        self.credit_due = false;
        self.fwd_cnt_told = self.fwd_cnt;
        Some(ToGuest { op, flags, len })
    }

    fn read_payload(
        &mut self,
        payload: &mut [u8],
        read: impl FnOnce(&mut [u8]) -> io::Result<usize>,
    ) -> u32 {
        let limit = payload.len().min(self.credit() as usize);
        if limit == 0 {
            return 0;
        }
        match read(&mut payload[..limit]) {
            Ok(0) => {
                self.host_sent_all = true;
                self.shutdown_due = true;
                0
            }
            Ok(count) => {
                let count = u32::try_from(count.min(limit)).unwrap_or_default();
                self.sent = self.sent.wrapping_add(count);
                count
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
            Err(_) => {
                self.break_off();
                0
            }
        }
    }

    fn shutdown_flags(&self) -> u32 {
        let receive = if self.host_is_deaf { shutdown::RCV } else { 0 };
        let send = if self.host_sent_all { shutdown::SEND } else { 0 };
        receive | send
    }

    /// Our side of the credit, for the header of a packet: `buf_alloc` and `fwd_cnt`.
    pub fn credit_fields(&self) -> (u32, u32) {
        (BUFFER, self.fwd_cnt)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header(op: u16) -> Header {
        Header { op, buf_alloc: 1000, ..Header::default() }
    }

    fn nothing(_: &mut [u8]) -> io::Result<usize> {
        Err(io::ErrorKind::WouldBlock.into())
    }

    fn next(connection: &mut Connection) -> Option<(u16, u32)> {
        let packet = connection.next(&mut [0; 64], true, nothing);
        packet.map(|packet| (packet.op, packet.flags))
    }

    /// The next packet while the host has `data`, and its flags or length; none has both.
    fn next_with(connection: &mut Connection, data: &[u8]) -> Option<(u16, u32)> {
        let mut payload = vec![0; 4096];
        let packet = connection.next(&mut payload, true, |buffer| {
            let n = buffer.len().min(data.len());
            buffer[..n].copy_from_slice(&data[..n]);
            Ok(n)
        });
        packet.map(|packet| (packet.op, packet.len + packet.flags))
    }

    /// A connection that the guest has asked for and heard of.
    fn established() -> Connection {
        let mut connection = Connection::from_guest(&header(op::REQUEST));
        assert_eq!(next(&mut connection), Some((op::RESPONSE, 0)));
        connection
    }

    #[test]
    fn the_host_asks_and_the_guest_accepts() {
        let mut connection = Connection::from_host();
        assert_eq!(next_with(&mut connection, b"early"), Some((op::REQUEST, 0)));
        assert_eq!(next_with(&mut connection, b"early"), None);
        assert_eq!(connection.receive(&header(op::RESPONSE), &[]), Received::Accepted);
        assert_eq!(next_with(&mut connection, b"early"), Some((op::RW, 5)));
    }

    #[test]
    fn the_host_asks_and_the_guest_refuses() {
        let mut connection = Connection::from_host();
        next(&mut connection);
        assert_eq!(connection.receive(&header(op::RST), &[]), Received::Ended);
    }

    #[test]
    fn what_makes_no_sense_ends_with_a_reset() {
        for operation in [0, op::REQUEST, op::RESPONSE, 8, u16::MAX] {
            let mut connection = established();
            connection.receive(&header(operation), &[]);
            assert_eq!(next_with(&mut connection, b"data"), Some((op::RST, 0)), "{operation}");
        }
        for operation in [0, op::REQUEST, op::RW, op::SHUTDOWN, op::CREDIT_REQUEST] {
            let mut connection = Connection::from_host();
            connection.receive(&header(operation), &[]);
            assert_eq!(next(&mut connection), Some((op::RST, 0)), "{operation}");
        }
    }

    #[test]
    fn a_guest_that_sends_beyond_its_credit_is_reset() {
        let mut connection = established();
        connection.receive(&header(op::RW), &[0; BUFFER as usize - 1]);
        connection.receive(&header(op::RW), &[0; 1]);
        assert_eq!(next(&mut connection), None);
        connection.receive(&header(op::RW), &[0; 1]);
        assert_eq!(next(&mut connection), Some((op::RST, 0)));
        assert!(connection.to_host().is_empty());
    }

    #[test]
    fn the_guest_hears_of_room_before_it_needs_to_ask() {
        let mut connection = established();
        connection.receive(&header(op::RW), &[0; BUFFER as usize]);
        connection.host_took(BUFFER as usize / 2 - 1);
        assert_eq!(next(&mut connection), None);
        connection.host_took(1);
        assert_eq!(next(&mut connection), Some((op::CREDIT_UPDATE, 0)));
        assert_eq!(connection.credit_fields(), (BUFFER, BUFFER / 2));
        assert_eq!(next(&mut connection), None);
        connection.receive(&header(op::CREDIT_REQUEST), &[]);
        assert_eq!(next(&mut connection), Some((op::CREDIT_UPDATE, 0)));
    }

    #[test]
    fn the_guest_gets_no_more_than_it_has_room_for() {
        let mut connection = established();
        assert_eq!(next_with(&mut connection, &[1; 4096]), Some((op::RW, 1000)));
        assert_eq!(next_with(&mut connection, &[1; 4096]), Some((op::CREDIT_REQUEST, 0)));
        assert_eq!(next_with(&mut connection, &[1; 4096]), None);
        let update = Header { fwd_cnt: 300, ..header(op::CREDIT_UPDATE) };
        connection.receive(&update, &[]);
        assert_eq!(next_with(&mut connection, &[1; 4096]), Some((op::RW, 300)));
        // Nonsense: more was forwarded than sent.
        let update = Header { fwd_cnt: 5000, ..header(op::CREDIT_UPDATE) };
        connection.receive(&update, &[]);
        assert_eq!(next_with(&mut connection, &[1; 4096]), Some((op::CREDIT_REQUEST, 0)));
    }

    #[test]
    fn the_host_ends_first() {
        let mut connection = established();
        connection.receive(&header(op::RW), b"still on its way");
        assert_eq!(next_with(&mut connection, &[]), Some((op::SHUTDOWN, shutdown::SEND)));
        assert_eq!(next_with(&mut connection, &[]), None);
        let both = Header { flags: shutdown::BOTH, ..header(op::SHUTDOWN) };
        connection.receive(&both, &[]);
        assert_eq!(next(&mut connection), None);
        assert_eq!(connection.to_host(), b"still on its way");
        connection.host_took(16);
        assert!(connection.host_has_all());
        assert_eq!(next(&mut connection), Some((op::RST, 0)));
    }

    #[test]
    fn the_guest_ends_one_direction_and_goes_on_in_the_other() {
        let mut connection = established();
        let send = Header { flags: shutdown::SEND, ..header(op::SHUTDOWN) };
        connection.receive(&send, &[]);
        assert!(connection.host_has_all());
        assert_eq!(next_with(&mut connection, b"answer"), Some((op::RW, 6)));
        assert_eq!(next_with(&mut connection, &[]), Some((op::SHUTDOWN, shutdown::SEND)));
        assert_eq!(next(&mut connection), Some((op::RST, 0)));
    }

    #[test]
    fn a_deaf_host_costs_no_memory_and_is_announced() {
        let mut connection = established();
        connection.receive(&header(op::RW), &[0; 100]);
        connection.host_went_deaf();
        assert_eq!(next(&mut connection), Some((op::SHUTDOWN, shutdown::RCV)));
        for _ in 0..10 {
            connection.receive(&header(op::RW), &[0; BUFFER as usize]);
        }
        assert!(connection.to_host().is_empty());
        assert!(!connection.is_spent());
        assert_eq!(next_with(&mut connection, &[]), Some((op::SHUTDOWN, shutdown::BOTH)));
        assert!(connection.is_spent());
    }

    #[derive(Debug, Clone)]
    enum Step {
        Guest { op: u16, flags: u32, buf_alloc: u32, fwd_cnt: u32, len: usize },
        HostTakes(usize),
        HostSends(usize),
        HostGoesDeaf,
    }

    fn step() -> impl Strategy<Value = Step> {
        let operation = prop_oneof![4 => Just(op::RW), 1 => 0..10u16];
        let number = prop_oneof![0..2000u32, any::<u32>()];
        prop_oneof![
            (operation, 0..4u32, number.clone(), number, 0..=BUFFER as usize).prop_map(
                |(op, flags, buf_alloc, fwd_cnt, len)| {
                    Step::Guest { op, flags, buf_alloc, fwd_cnt, len }
                }
            ),
            (0..100_000usize).prop_map(Step::HostTakes),
            (0..5000usize).prop_map(Step::HostSends),
            Just(Step::HostGoesDeaf),
        ]
    }

    proptest! {
        #[test]
        fn whatever_the_guest_does_memory_and_credit_are_bounded(
            asked in any::<bool>(),
            steps in prop::collection::vec(step(), 0..60),
        ) {
            let mut connection = if asked {
                Connection::from_guest(&header(op::REQUEST))
            } else {
                Connection::from_host()
            };
            let zeros = vec![0; BUFFER as usize];
            for step in steps {
                match step {
                    Step::Guest { op, flags, buf_alloc, fwd_cnt, len } => {
                        let header = Header { op, flags, buf_alloc, fwd_cnt, ..Header::default() };
                        if connection.receive(&header, &zeros[..len]) == Received::Ended {
                            return Ok(());
                        }
                    }
                    Step::HostTakes(count) => connection.host_took(count),
                    Step::HostGoesDeaf => connection.host_went_deaf(),
                    Step::HostSends(count) => {
                        let credit = connection.credit();
                        let mut payload = [0; 4096];
                        let packet = connection.next(&mut payload, true, |buffer| {
                            assert!(!buffer.is_empty());
                            Ok(buffer.len().min(count))
                        });
                        let len = packet.map_or(0, |packet| packet.len);
                        prop_assert!(len <= credit.min(4096));
                        if packet.is_some_and(|packet| packet.op == op::RST) {
                            return Ok(());
                        }
                    }
                }
                prop_assert!(connection.buffer.len() <= BUFFER as usize);
                if !connection.has_next(false) {
                    prop_assert_eq!(connection.next(&mut [0; 64], false, nothing), None);
                }
            }
        }
    }
}
