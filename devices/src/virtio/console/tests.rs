// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use proptest::prelude::*;
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};

use super::control::{
    CONSOLE_PORT, Control, DEVICE_READY, PORT_ADD, PORT_NAME, PORT_OPEN, PORT_READY,
};
use super::*;
use crate::backend::chardev::{Chardev, ChardevSpec};
use crate::io_thread::IoThread;
use crate::memory::{GuestMemory, GuestMemoryHandle};
use crate::virtio::test_driver::{Driver, INDIRECT, NEXT, WRITE};
use crate::virtio::test_interrupt::RecordedInterrupt;

const MEMORY: usize = 1 << 20;
const SIZE: u16 = 16;
/// Each queue has its rings and, behind them, a buffer for each descriptor.
const QUEUE_SPACE: u64 = 0x10000;
const BUFFERS: u64 = 0x1000;
const BUFFER: u64 = 0x200;

/// A console with a console port and a named port, and a driver that sets it up.
struct Rig {
    interrupt: Arc<RecordedInterrupt>,
    memory: GuestMemory,
    drivers: Vec<Driver>,
    kicks: Vec<EventFd>,
    /// How many buffers each queue was given.
    given: Vec<u64>,
    console: Console,
    chardevs: Vec<Chardev>,
    dir: TempDir,
    _thread: IoThread,
}

impl Rig {
    fn new() -> Self {
        let thread = IoThread::spawn("test", Box::new(|why| panic!("{why}"))).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let chardevs = ["console", "agent"].map(|name| {
            let spec = ChardevSpec::Unix { path: dir.path().join(name) };
            Chardev::open(spec, &thread.handle()).unwrap()
        });
        let ports = vec![
            PortConfig { console: true, name: None, chardev: chardevs[0].port() },
            PortConfig { console: false, name: Some("agent".into()), chardev: chardevs[1].port() },
        ];
        let console = Console::new(ports, thread.handle()).unwrap();
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        let queues = 0..console.queue_max_sizes().len() as u64;
        Self {
            interrupt: Arc::default(),
            drivers: queues.map(|n| Driver::new(&memory, n * QUEUE_SPACE, SIZE)).collect(),
            kicks: Vec::new(),
            given: vec![0; console.queue_max_sizes().len()],
            memory,
            console,
            chardevs: chardevs.into(),
            dir,
            _thread: thread,
        }
    }

    fn activate(&mut self, features: u64) {
        let queues = (0..).zip(&self.drivers).map(|(index, driver)| ActiveQueue {
            index,
            queue: driver.queue(),
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
        });
        let queues: Vec<ActiveQueue> = queues.collect();
        self.kicks = queues.iter().map(|queue| queue.kick.try_clone().unwrap()).collect();
        let context = Activation {
            memory: GuestMemoryHandle::new(self.memory.clone()),
            features,
            queues,
            interrupt: Arc::clone(&self.interrupt) as Arc<_>,
        };
        self.console.activate(context).unwrap();
    }

    fn client(&self, name: &str) -> UnixStream {
        let client = UnixStream::connect(self.dir.path().join(name)).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        client
    }

    /// The buffer for the next descriptor of `queue`.
    fn next_buffer(&mut self, queue: usize) -> u64 {
        let slot = self.given[queue] % u64::from(SIZE);
        self.given[queue] += 1;
        queue as u64 * QUEUE_SPACE + BUFFERS + slot * BUFFER
    }

    /// Give `queue` an empty buffer.
    fn give(&mut self, queue: usize) {
        let address = self.next_buffer(queue);
        self.drivers[queue].add(&[(address, BUFFER as u32, true)]);
        self.kicks[queue].write(1).unwrap();
    }

    /// The content of the next buffer that `queue` filled.
    fn take(&mut self, queue: usize) -> Vec<u8> {
        let mut used = None;
        self.interrupt.wait_until(|| {
            used = self.drivers[queue].used();
            used.is_some()
        });
        let (id, written) = used.unwrap();
        let base = queue as u64 * QUEUE_SPACE + BUFFERS;
        let mut data = vec![0; written as usize];
        self.memory.read_slice(&mut data, GuestAddress(base + u64::from(id) * BUFFER)).unwrap();
        data
    }

    /// Send `data` on `queue` and wait until the device has taken it.
    fn send(&mut self, queue: usize, data: &[u8]) {
        let address = self.next_buffer(queue);
        self.memory.write_slice(data, GuestAddress(address)).unwrap();
        self.drivers[queue].add(&[(address, data.len() as u32, false)]);
        self.kicks[queue].write(1).unwrap();
        let driver = &mut self.drivers[queue];
        self.interrupt.wait_until(|| driver.used().is_some());
    }

    fn control(&mut self, id: u32, event: u16, value: u16) {
        self.send(3, &Control { id, event, value }.to_bytes());
    }

    fn expect_control(&mut self, id: u32, event: u16, text: &[u8]) {
        let mut expected = Control { id, event, value: 1 }.to_bytes().to_vec();
        expected.extend(text);
        assert_eq!(self.take(2), expected);
    }

    /// What Linux does when it finds the device.
    fn bring_up(&mut self) {
        self.activate(F_MULTIPORT);
        for _ in 0..8 {
            self.give(2);
        }
        self.control(0, DEVICE_READY, 1);
        self.expect_control(0, PORT_ADD, &[]);
        self.expect_control(1, PORT_ADD, &[]);
        self.control(0, PORT_READY, 1);
        self.expect_control(0, CONSOLE_PORT, &[]);
        self.expect_control(0, PORT_OPEN, &[]);
        self.control(1, PORT_READY, 1);
        self.expect_control(1, PORT_NAME, b"agent");
    }
}

#[test]
fn describes_itself() {
    let rig = Rig::new();
    assert_eq!(rig.console.device_type(), 3);
    assert_eq!(rig.console.queue_max_sizes(), [128, 128, 32, 32, 128, 128]);
    let mut config = [0xff; 16];
    rig.console.config_read(0, &mut config);
    assert_eq!(config, [0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    rig.console.config_read(u64::MAX, &mut config);
    assert_eq!(config, [0; 16]);
    let error = Console::new(Vec::new(), rig.console.io.clone()).unwrap_err();
    assert!(matches!(error, ConsoleError::Ports(0)));
}

#[test]
fn a_console_speaks_both_ways() {
    let mut rig = Rig::new();
    rig.bring_up();
    rig.send(1, b"nobody listens, and the buffer comes back");
    let mut client = rig.client("console");
    client.write_all(b"typed ahead").unwrap();
    rig.control(0, PORT_OPEN, 1);
    rig.give(0);
    assert_eq!(rig.take(0), b"typed ahead");
    while !rig.chardevs[0].is_open() {
        std::thread::yield_now();
    }
    rig.send(1, b"login: ");
    let mut prompt = [0; 7];
    client.read_exact(&mut prompt).unwrap();
    assert_eq!(&prompt, b"login: ");
    assert!(rig.chardevs[0].tail().starts_with(b"nobody listens"));
}

#[test]
fn a_named_port_hears_who_comes_and_goes() {
    let mut rig = Rig::new();
    rig.bring_up();
    let mut client = rig.client("agent");
    rig.expect_control(1, PORT_OPEN, &[]);
    rig.control(1, PORT_OPEN, 1);
    client.write_all(b"hello").unwrap();
    rig.give(4);
    assert_eq!(rig.take(4), b"hello");
    rig.send(5, b"world");
    let mut answer = [0; 5];
    client.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"world");
    drop(client);
    let closed = Control { id: 1, event: PORT_OPEN, value: 0 };
    assert_eq!(rig.take(2), closed.to_bytes());
}

#[test]
fn a_driver_without_multiport_has_one_open_port() {
    let mut rig = Rig::new();
    rig.activate(0);
    let mut client = rig.client("console");
    rig.give(0);
    client.write_all(b"x").unwrap();
    assert_eq!(rig.take(0), b"x");
}

#[test]
fn input_longer_than_buffers_arrives_in_pieces() {
    let mut rig = Rig::new();
    rig.bring_up();
    rig.control(0, PORT_OPEN, 1);
    let text: Vec<u8> = (0..=255).cycle().take(20_000).collect();
    let mut client = rig.client("console");
    client.write_all(&text).unwrap();
    let mut got = Vec::new();
    while got.len() < text.len() {
        rig.give(0);
        got.extend(rig.take(0));
    }
    assert_eq!(got, text);
}

#[test]
fn queues_come_back_where_they_were_and_go_on() {
    let mut rig = Rig::new();
    rig.bring_up();
    rig.control(0, PORT_OPEN, 1);
    rig.send(1, b"before");
    let state = rig.console.save();
    let queues = rig.console.deactivate();
    assert_eq!(queues.len(), 6);
    assert!(rig.console.deactivate().is_empty());
    assert!(state.ports[0] != PortState::default());
    rig.console.restore(&state);
    rig.kicks = queues.iter().map(|queue| queue.kick.try_clone().unwrap()).collect();
    let context = Activation {
        memory: GuestMemoryHandle::new(rig.memory.clone()),
        features: F_MULTIPORT,
        queues,
        interrupt: Arc::clone(&rig.interrupt) as Arc<_>,
    };
    rig.console.activate(context).unwrap();
    rig.send(1, b" and after");
    assert_eq!(rig.chardevs[0].tail(), b"before and after");
    // The port is still open.
    rig.client("console").write_all(b"x").unwrap();
    rig.give(0);
    assert_eq!(rig.take(0), b"x");
}

#[test]
fn a_broken_ring_asks_for_a_reset_and_other_queues_go_on() {
    let mut rig = Rig::new();
    rig.bring_up();
    rig.drivers[5].set_available_index(SIZE + 1);
    rig.kicks[5].write(1).unwrap();
    rig.interrupt.wait_for_reset();
    rig.send(1, b"still here");
    assert_eq!(rig.chardevs[0].tail(), b"still here");
}

#[test]
fn a_chain_of_gigabytes_is_cut() {
    let mut rig = Rig::new();
    rig.bring_up();
    // The whole of memory, sixteen times.
    let buffers = [(0, MEMORY as u32, false); SIZE as usize];
    rig.drivers[1].add(&buffers);
    rig.kicks[1].write(1).unwrap();
    let driver = &mut rig.drivers[1];
    rig.interrupt.wait_until(|| driver.used().is_some());
    assert!(!rig.chardevs[0].tail().is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn hostile_rings_and_messages_do_no_harm(
        descriptors in prop::collection::vec(
            (0..6usize, 0..SIZE, prop_oneof![0..MEMORY as u64, any::<u64>()],
             prop_oneof![0..64u32, any::<u32>()], 0..8u16, 0..SIZE + 2), 0..40),
        messages in prop::collection::vec(any::<[u8; 8]>(), 0..20),
        heads in prop::collection::vec((0..6usize, any::<u16>()), 0..20),
    ) {
        let mut rig = Rig::new();
        rig.activate(F_MULTIPORT);
        for message in messages {
            rig.send(3, &message);
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
        prop_assert_eq!(rig.console.deactivate().len(), 6);
    }
}
