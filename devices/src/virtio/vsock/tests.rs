// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use proptest::prelude::*;
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::common::{EVENT, RX, TX};
use super::connection::BUFFER as CREDIT;
use super::muxer::HOST_CID;
use super::packet::{HEADER_SIZE, Header, TYPE_STREAM, op};
use super::*;
use crate::io_thread::IoThread;
use crate::memory::{GuestMemory, GuestMemoryHandle};
use crate::virtio::test_driver::{Driver, INDIRECT, NEXT, WRITE};
use crate::virtio::test_interrupt::RecordedInterrupt;

const CID: u64 = 42;
const MEMORY: usize = 4 << 20;
const SIZE: u16 = 16;
/// Each queue has its rings and, behind them, a buffer for each descriptor.
const QUEUE_SPACE: u64 = 0x10_0000;
const BUFFERS: u64 = 0x1000;
const BUFFER: u64 = 0x1000;

/// A device and a driver of it.
struct Rig {
    interrupt: Arc<RecordedInterrupt>,
    memory: GuestMemory,
    drivers: Vec<Driver>,
    kicks: Vec<EventFd>,
    /// How many buffers each queue was given.
    given: [u64; 3],
    vsock: Vsock,
    dir: TempDir,
    _thread: IoThread,
}

impl Rig {
    fn new() -> Self {
        let thread = IoThread::spawn("test", Box::new(|why| panic!("{why}"))).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let vsock = Vsock::new(CID, &dir.path().join("v"), thread.handle()).unwrap();
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        let drivers: Vec<_> = (0..3).map(|n| Driver::new(&memory, n * QUEUE_SPACE, SIZE)).collect();
        let mut rig = Self {
            interrupt: Arc::default(),
            drivers,
            kicks: Vec::new(),
            given: [0; 3],
            memory,
            vsock,
            dir,
            _thread: thread,
        };
        let queues = (0..).zip(&rig.drivers).map(|(index, driver)| ActiveQueue {
            index,
            queue: driver.queue(),
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
        });
        let queues = queues.collect();
        rig.activate(queues);
        rig
    }

    fn activate(&mut self, queues: Vec<ActiveQueue>) {
        self.kicks = queues.iter().map(|queue| queue.kick.try_clone().unwrap()).collect();
        let context = Activation {
            memory: GuestMemoryHandle::new(self.memory.clone()),
            features: 0,
            queues,
            interrupt: Arc::clone(&self.interrupt) as Arc<_>,
        };
        self.vsock.activate(context).unwrap();
    }

    fn path(&self, suffix: &str) -> std::path::PathBuf {
        self.dir.path().join(format!("v{suffix}"))
    }

    fn client(&self, says: &[u8]) -> UnixStream {
        let mut client = UnixStream::connect(self.path("")).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        client.write_all(says).unwrap();
        client
    }

    /// The buffer for the next descriptor of `queue`.
    fn next_buffer(&mut self, queue: u16) -> u64 {
        let given = &mut self.given[usize::from(queue)];
        let slot = *given % u64::from(SIZE);
        *given += 1;
        u64::from(queue) * QUEUE_SPACE + BUFFERS + slot * BUFFER
    }

    fn give(&mut self, queue: u16) {
        let address = self.next_buffer(queue);
        self.drivers[usize::from(queue)].add(&[(address, BUFFER as u32, true)]);
        self.kicks[usize::from(queue)].write(1).unwrap();
    }

    /// The content of the next buffer that `queue` filled.
    fn take(&mut self, queue: u16) -> Vec<u8> {
        let driver = &mut self.drivers[usize::from(queue)];
        let mut used = None;
        self.interrupt.wait_until(|| {
            used = driver.used();
            used.is_some()
        });
        let (id, written) = used.unwrap();
        let base = u64::from(queue) * QUEUE_SPACE + BUFFERS;
        let mut data = vec![0; written as usize];
        self.memory.read_slice(&mut data, GuestAddress(base + u64::from(id) * BUFFER)).unwrap();
        data
    }

    /// The next packet.
    fn packet(&mut self) -> (Header, Vec<u8>) {
        self.give(RX);
        let mut packet = self.take(RX);
        let payload = packet.split_off(HEADER_SIZE);
        let header = Header::from_bytes(packet.as_slice().try_into().unwrap());
        assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, CID));
        assert_eq!(header.len as usize, payload.len());
        (header, payload)
    }

    /// Send bytes, cut into two buffers at `cut`, and wait until the device has taken them.
    fn send_bytes(&mut self, bytes: &[u8], cut: usize) {
        let buffers: Vec<_> = [&bytes[..cut], &bytes[cut..]]
            .into_iter()
            .map(|part| {
                let address = self.next_buffer(TX);
                self.memory.write_slice(part, GuestAddress(address)).unwrap();
                (address, part.len() as u32, false)
            })
            .collect();
        let driver = &mut self.drivers[usize::from(TX)];
        driver.add(&buffers);
        self.kicks[usize::from(TX)].write(1).unwrap();
        self.interrupt.wait_until(|| driver.used().is_some());
    }

    fn send(&mut self, (guest, host): (u32, u32), op: u16, payload: &[u8]) {
        let header = Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            src_port: guest,
            dst_port: host,
            len: payload.len() as u32,
            kind: TYPE_STREAM,
            op,
            buf_alloc: 1 << 18,
            ..Header::default()
        };
        let bytes = [&header.to_bytes(), payload].concat();
        // Drivers cut anywhere.
        self.send_bytes(&bytes, bytes.len() * 2 / 3);
    }
}

#[test]
fn describes_itself_and_checks_its_cid() {
    let rig = Rig::new();
    assert_eq!((rig.vsock.device_type(), rig.vsock.features()), (19, 0));
    assert_eq!(rig.vsock.queue_max_sizes(), [128; 3]);
    let mut config = [0; 8];
    rig.vsock.config_read(0, &mut config);
    assert_eq!(u64::from_le_bytes(config), CID);
    for cid in [0, 2, u64::MAX] {
        let error = Vsock::new(cid, &rig.path("x"), rig.vsock.io.clone()).unwrap_err();
        assert!(matches!(error, VsockError::Cid(_)), "{error}");
    }
}

#[test]
fn a_host_client_talks_with_the_guest() {
    let mut rig = Rig::new();
    let mut client = rig.client(b"CONNECT 1024\n");
    let (request, _) = rig.packet();
    assert_eq!((request.op, request.dst_port), (op::REQUEST, 1024));
    assert_eq!(request.buf_alloc, CREDIT);
    let ports = (1024, request.src_port);
    rig.send(ports, op::RESPONSE, &[]);
    client.write_all(b"hello, guest").unwrap();
    let (data, payload) = rig.packet();
    assert_eq!((data.op, payload.as_slice()), (op::RW, b"hello, guest".as_slice()));
    rig.send(ports, op::RW, b"hello, host");
    let expected = format!("OK {}\nhello, host", request.src_port);
    let mut heard = vec![0; expected.len()];
    client.read_exact(&mut heard).unwrap();
    assert_eq!(String::from_utf8(heard).unwrap(), expected);
    drop(client);
    assert_eq!(rig.packet().0.op, op::SHUTDOWN);
}

#[test]
fn the_guest_reaches_a_service_of_the_host() {
    let mut rig = Rig::new();
    let service = UnixListener::bind(rig.path("_9000")).unwrap();
    rig.send((7, 9000), op::REQUEST, &[]);
    assert_eq!(rig.packet().0.op, op::RESPONSE);
    let (mut stream, _) = service.accept().unwrap();
    let text: Vec<u8> = (0..=255).cycle().take(100_000).collect();
    let sender = std::thread::spawn({
        let text = text.clone();
        move || stream.write_all(&text)
    });
    let mut got = Vec::new();
    while got.len() < text.len() {
        let (header, payload) = rig.packet();
        assert_eq!(header.op, op::RW);
        got.extend(payload);
    }
    assert_eq!(got, text);
    sender.join().unwrap().unwrap();
}

#[test]
fn packets_that_lie_about_their_length_break_their_connection() {
    let mut rig = Rig::new();
    let _service = UnixListener::bind(rig.path("_1")).unwrap();
    for len in [5, CREDIT + 1, u32::MAX] {
        rig.send((7, 1), op::REQUEST, &[]);
        assert_eq!(rig.packet().0.op, op::RESPONSE);
        let header = Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            src_port: 7,
            dst_port: 1,
            len,
            kind: TYPE_STREAM,
            op: op::RW,
            ..Header::default()
        };
        let bytes = [header.to_bytes().as_slice(), b"four"].concat();
        rig.send_bytes(&bytes, 10);
        assert_eq!(rig.packet().0.op, op::RST, "{len}");
    }
    // Too short to be a packet at all.
    rig.send_bytes(&[0; HEADER_SIZE - 1], 10);
    assert_eq!(rig.interrupt.resets(), 0);
}

#[test]
fn a_guest_without_buffers_is_not_read_for_ever() {
    let mut rig = Rig::new();
    let header = Header { src_cid: CID, dst_cid: HOST_CID, op: op::RW, ..Header::default() };
    let address = rig.next_buffer(TX);
    rig.memory.write_slice(&header.to_bytes(), GuestAddress(address)).unwrap();
    let mut taken = 0;
    // Twenty times the ring: more than the refusals that are kept.
    for _ in 0..20 * SIZE {
        let driver = &mut rig.drivers[usize::from(TX)];
        driver.descriptor(0, address, HEADER_SIZE as u32, 0, 0);
        driver.publish(0);
        rig.kicks[usize::from(TX)].write(1).unwrap();
        let deadline = std::time::Instant::now() + Duration::from_millis(200);
        while driver.used().is_none() {
            if std::time::Instant::now() > deadline {
                // It waits for us. Its refusals come, and then it goes on.
                for _ in 0..taken {
                    assert_eq!(rig.packet().0.op, op::RST);
                }
                let driver = &mut rig.drivers[usize::from(TX)];
                rig.interrupt.wait_until(|| driver.used().is_some());
                return;
            }
        }
        taken += 1;
    }
    panic!("it took {taken} packets without a place for answers");
}

#[test]
fn who_continues_is_told_that_connections_are_lost() {
    let mut rig = Rig::new();
    let mut client = rig.client(b"CONNECT 1\n");
    rig.packet();
    rig.give(EVENT);
    let queues = rig.vsock.deactivate();
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
    let state = rig.vsock.save();
    rig.vsock.restore(&state);
    rig.activate(queues);
    assert_eq!(rig.take(EVENT), [0; 4]);
    // The socket is the same, and works.
    let _client = rig.client(b"CONNECT 5\n");
    assert_eq!(rig.packet().0.dst_port, 5);
}

#[test]
fn a_buffer_without_room_for_a_header_is_the_drivers_mistake() {
    let mut rig = Rig::new();
    let address = rig.next_buffer(RX);
    rig.drivers[usize::from(RX)].add(&[(address, HEADER_SIZE as u32 - 1, true)]);
    let _client = rig.client(b"CONNECT 1\n");
    rig.interrupt.wait_for_reset();
    assert_eq!(rig.vsock.deactivate().len(), 3);
}

#[test]
fn the_socket_goes_with_the_device() {
    let rig = Rig::new();
    let path = rig.path("");
    assert!(path.exists());
    drop(rig.vsock);
    assert!(!path.exists());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn hostile_rings_and_packets_do_no_harm(
        packets in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..100), 0..20),
        descriptors in prop::collection::vec(
            (0..3usize, 0..SIZE, prop_oneof![0..MEMORY as u64, any::<u64>()],
             prop_oneof![0..64u32, any::<u32>()], 0..8u16, 0..SIZE + 2), 0..40),
        heads in prop::collection::vec((0..3usize, any::<u16>()), 0..20),
    ) {
        let mut rig = Rig::new();
        for packet in packets {
            rig.send_bytes(&packet, packet.len() / 2);
        }
        for (queue, index, address, len, flags, next) in descriptors {
            let flags = flags & (NEXT | WRITE | INDIRECT);
            rig.drivers[queue].descriptor(index, address, len, flags, next);
        }
        for (queue, head) in heads {
            rig.drivers[queue].publish(head % (SIZE + 1));
            rig.kicks[queue].write(1).unwrap();
        }
        // The worker's thread survives: it gives the queues back.
        prop_assert_eq!(rig.vsock.deactivate().len(), 3);
    }
}
