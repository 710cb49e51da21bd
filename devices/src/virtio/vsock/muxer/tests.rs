// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::time::Duration;

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::virtio::vsock::connection::BUFFER;
use crate::virtio::vsock::packet::shutdown;

const CID: u64 = 3;
const PATIENCE: Duration = Duration::from_secs(20);

/// Its ports (the guest's first), operation, flags and payload.
type Packet = ((u32, u32), u16, u32, Vec<u8>);

struct Rig {
    dir: TempDir,
    muxer: Muxer,
}

impl Rig {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = Arc::new(UnixSocket::bind(&dir.path().join("v")).unwrap());
        Self { muxer: Muxer::new(CID, listener).unwrap(), dir }
    }

    fn client(&mut self, says: &[u8]) -> UnixStream {
        let mut client = UnixStream::connect(self.dir.path().join("v")).unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        client.write_all(says).unwrap();
        self.settle();
        client
    }

    /// Somebody on the host who waits for guests at `port`.
    fn service(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.dir.path().join(format!("v_{port}"))).unwrap()
    }

    /// Let the muxer see all that has happened; local sockets report at once.
    fn settle(&mut self) {
        for _ in 0..4 {
            self.muxer.poll().unwrap();
        }
    }

    fn send(&mut self, ports: (u32, u32), op: u16, payload: &[u8]) {
        self.send_flags(ports, op, 0, payload);
    }

    fn send_flags(&mut self, (guest, host): (u32, u32), op: u16, flags: u32, payload: &[u8]) {
        let header = Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            src_port: guest,
            dst_port: host,
            len: u32::try_from(payload.len()).unwrap(),
            kind: TYPE_STREAM,
            op,
            flags,
            buf_alloc: 1 << 20,
            fwd_cnt: 0,
        };
        self.muxer.receive(&header, payload);
    }

    /// The next packet for the guest.
    fn next(&mut self) -> Option<Packet> {
        self.settle();
        let mut payload = vec![0; 4096];
        let header = self.muxer.next(&mut payload)?;
        assert_eq!((header.src_cid, header.dst_cid, header.kind), (HOST_CID, CID, TYPE_STREAM));
        payload.truncate(header.len as usize);
        Some(((header.dst_port, header.src_port), header.op, header.flags, payload))
    }

    fn expect(&mut self, ports: (u32, u32), op: u16, payload: &[u8]) {
        let (to, operation, _, data) = self.next().expect("a packet");
        assert_eq!((to, operation, data.as_slice()), (ports, op, payload));
    }

    /// A client connected to `port` of the guest, and the ports of the connection.
    fn connected(&mut self, port: u32) -> (UnixStream, (u32, u32)) {
        let mut client = self.client(format!("CONNECT {port}\n").as_bytes());
        let (ports, op, ..) = self.next().expect("a request");
        assert_eq!((ports.0, op), (port, op::REQUEST));
        self.send(ports, op::RESPONSE, &[]);
        let mut line = vec![0; format!("OK {}\n", ports.1).len()];
        client.read_exact(&mut line).unwrap();
        assert_eq!(String::from_utf8(line).unwrap(), format!("OK {}\n", ports.1));
        (client, ports)
    }
}

#[test]
fn a_client_talks_with_the_guest() {
    let mut rig = Rig::new();
    let (mut client, ports) = rig.connected(1024);
    client.write_all(b"ping").unwrap();
    rig.expect(ports, op::RW, b"ping");
    rig.send(ports, op::RW, b"pong");
    let mut answer = [0; 4];
    client.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"pong");

    drop(client);
    let (_, operation, flags, _) = rig.next().unwrap();
    assert_eq!((operation, flags), (op::SHUTDOWN, shutdown::BOTH));
    rig.send(ports, op::RST, &[]);
    assert!(rig.muxer.links.is_empty());
    assert_eq!(rig.next(), None);
}

#[test]
fn what_a_client_sends_with_its_line_arrives() {
    let mut rig = Rig::new();
    let _client = rig.client(b"CONNECT 7\nalready here");
    let (ports, op, ..) = rig.next().unwrap();
    assert_eq!(op, op::REQUEST);
    assert_eq!(rig.next(), None);
    rig.send(ports, op::RESPONSE, &[]);
    rig.expect(ports, op::RW, b"already here");
}

#[test]
fn a_client_is_disconnected_when_the_guest_refuses() {
    let mut rig = Rig::new();
    let mut client = rig.client(b"CONNECT 7\n");
    let (ports, ..) = rig.next().unwrap();
    rig.send(ports, op::RST, &[]);
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
}

#[test]
fn a_client_that_leaves_before_the_answer_is_forgotten() {
    let mut rig = Rig::new();
    let client = rig.client(b"CONNECT 7\n");
    let (ports, ..) = rig.next().unwrap();
    drop(client);
    rig.expect(ports, op::RST, &[]);
    assert!(rig.muxer.links.is_empty());
}

#[test]
fn the_guest_talks_with_a_service() {
    let mut rig = Rig::new();
    let service = rig.service(1025);
    let ports = (5000, 1025);
    rig.send(ports, op::REQUEST, &[]);
    rig.expect(ports, op::RESPONSE, &[]);
    let (mut stream, _) = service.accept().unwrap();
    rig.send(ports, op::RW, b"log line");
    rig.send_flags(ports, op::SHUTDOWN, shutdown::SEND, &[]);
    let mut all = Vec::new();
    stream.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"log line");
    // The other direction is still open.
    stream.write_all(b"noted").unwrap();
    rig.expect(ports, op::RW, b"noted");
    drop(stream);
    let (_, operation, flags, _) = rig.next().unwrap();
    assert_eq!((operation, flags), (op::SHUTDOWN, shutdown::BOTH));
    rig.expect(ports, op::RST, &[]);
    assert!(rig.muxer.links.is_empty());
}

#[test]
fn a_slow_service_gets_everything_in_order() {
    let mut rig = Rig::new();
    let service = rig.service(9);
    let ports = (1, 9);
    rig.send(ports, op::REQUEST, &[]);
    rig.expect(ports, op::RESPONSE, &[]);
    let (mut stream, _) = service.accept().unwrap();
    stream.set_nonblocking(true).unwrap();
    let data: Vec<u8> = (0..400_000u32).flat_map(u32::to_le_bytes).collect();
    let (mut sent, mut forwarded, mut received) = (0, 0, Vec::new());
    let mut buffer = [0; 10_000];
    while received.len() < data.len() {
        let window = BUFFER as usize - (sent - forwarded);
        let chunk = &data[sent..data.len().min(sent + window.min(3000))];
        rig.send(ports, op::RW, chunk);
        sent += chunk.len();
        if chunk.is_empty() || sent % 7 == 0 {
            received.extend_from_slice(match stream.read(&mut buffer) {
                Ok(count) => &buffer[..count],
                Err(_) => &[],
            });
        }
        rig.settle();
        let mut payload = [0; 64];
        while let Some(header) = rig.muxer.next(&mut payload) {
            assert_eq!(header.op, op::CREDIT_UPDATE);
            forwarded = header.fwd_cnt as usize;
        }
    }
    assert_eq!(received, data);
}

#[test]
fn nobody_at_a_port_of_the_host_is_a_refusal() {
    let mut rig = Rig::new();
    rig.send((5000, 77), op::REQUEST, &[]);
    rig.expect((5000, 77), op::RST, &[]);
    rig.send((5000, PORT_ANY), op::REQUEST, &[]);
    rig.expect((5000, PORT_ANY), op::RST, &[]);
    rig.send((5000, 77), op::RW, b"stray");
    rig.expect((5000, 77), op::RST, &[]);
    // A reset is not answered, or two sides could go on for ever.
    rig.send((5000, 77), op::RST, &[]);
    assert_eq!(rig.next(), None);
}

#[test]
fn packets_in_the_name_of_others_are_dropped() {
    let mut rig = Rig::new();
    let base = Header { kind: TYPE_STREAM, op: op::REQUEST, ..Header::default() };
    rig.muxer.receive(&Header { src_cid: CID + 1, dst_cid: HOST_CID, ..base }, &[]);
    rig.muxer.receive(&Header { src_cid: CID, dst_cid: 1, ..base }, &[]);
    assert_eq!(rig.next(), None);
    rig.muxer.receive(&Header { src_cid: CID, dst_cid: HOST_CID, kind: 2, ..base }, &[]);
    rig.expect((0, 0), op::RST, &[]);
}

#[test]
fn refusals_wait_for_the_guest_in_a_bounded_queue() {
    let mut rig = Rig::new();
    for port in 0..1000 {
        rig.send((port, 77), op::RW, &[]);
    }
    assert!(!rig.muxer.can_receive());
    assert_eq!(rig.muxer.refusals.len(), MAX_REFUSALS);
    rig.expect((0, 77), op::RST, &[]);
    assert!(rig.muxer.can_receive());
}

#[test]
fn silent_clients_make_place_for_others() {
    let mut rig = Rig::new();
    let mut clients: Vec<_> = (0..=MAX_HANDSHAKES).map(|_| rig.client(b"CONN")).collect();
    assert_eq!(rig.muxer.handshakes.len(), MAX_HANDSHAKES);
    assert_eq!(clients[0].read(&mut [0]).unwrap(), 0);
    clients[MAX_HANDSHAKES].write_all(b"ECT 5\n").unwrap();
    let (ports, ..) = rig.next().unwrap();
    assert_eq!(ports.0, 5);
}

#[test]
fn connections_are_limited_and_spent_ones_make_place() {
    let mut rig = Rig::new();
    let service = rig.service(9);
    let count = u32::try_from(MAX_CONNECTIONS).unwrap();
    for port in 0..count {
        rig.send((port, 9), op::REQUEST, &[]);
        rig.expect((port, 9), op::RESPONSE, &[]);
    }
    rig.send((count, 9), op::REQUEST, &[]);
    rig.expect((count, 9), op::RST, &[]);
    let mut client = rig.client(b"CONNECT 5\n");
    assert_eq!(client.read(&mut [0]).unwrap(), 0);

    drop(service.accept().unwrap());
    rig.expect((0, 9), op::SHUTDOWN, &[]);
    rig.send((count, 9), op::REQUEST, &[]);
    rig.expect((count, 9), op::RESPONSE, &[]);
    assert_eq!(rig.muxer.links.len(), MAX_CONNECTIONS);
}

fn any_packet() -> impl Strategy<Value = (Header, usize)> {
    let cid = prop_oneof![9 => Just(CID), 1 => any::<u64>()];
    let port = prop_oneof![9 => 0..4u32, 1 => any::<u32>()];
    let kind = prop_oneof![9 => Just(TYPE_STREAM), 1 => any::<u16>()];
    let credit = prop_oneof![Just(1 << 20), any::<u32>()];
    let len = 0..=BUFFER as usize;
    (cid, port.clone(), port, kind, 0..9u16, 0..4u32, credit, any::<u32>(), len).prop_map(
        |(src_cid, src_port, dst_port, kind, op, flags, buf_alloc, fwd_cnt, len)| {
            let header = Header {
                src_cid,
                dst_cid: HOST_CID,
                src_port,
                dst_port,
                len: u32::try_from(len).unwrap(),
                kind,
                op,
                flags,
                buf_alloc,
                fwd_cnt,
            };
            (header, len)
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn hostile_packets_neither_panic_nor_grow_us(
        packets in prop::collection::vec((any_packet(), any::<bool>()), 0..200),
    ) {
        let mut rig = Rig::new();
        let _services: Vec<_> = (0..3).map(|port| rig.service(port)).collect();
        let zeros = vec![0; BUFFER as usize];
        let mut payload = [0; 256];
        for ((header, len), read) in packets {
            rig.muxer.receive(&header, &zeros[..len]);
            if read {
                rig.muxer.poll().unwrap();
                rig.muxer.next(&mut payload);
            }
            prop_assert!(rig.muxer.refusals.len() <= MAX_REFUSALS);
            prop_assert!(rig.muxer.ready.len() <= rig.muxer.links.len());
        }
        // Left alone, it comes to rest.
        for _ in 0..10_000 {
            rig.muxer.poll().unwrap();
            if rig.muxer.next(&mut payload).is_none() {
                return Ok(());
            }
        }
        prop_assert!(false, "it never stops talking");
    }
}
