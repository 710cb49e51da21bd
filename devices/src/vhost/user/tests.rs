// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::peer::{Misdeed, Nature, Peer, request};
use super::{FsConfig, VhostUserError, VhostUserFs};
use crate::io_thread::IoThread;
use crate::memory::{GuestMemory, GuestMemoryHandle, MemoryListener, MemoryRegion, SharedFile};
use crate::virtio::test_driver::Driver;
use crate::virtio::{ActivateError, Activation, ActiveQueue, VirtioDevice, VirtioInterrupt};

const SIZE: u64 = 0x10_0000;
const SECOND: u64 = 0x1000_0000;
const FEATURES: u64 = 1 << 32 | 1 << 29;

/// An interrupt whose triggers the test keeps.
#[derive(Default)]
struct Triggers(Mutex<Vec<EventFd>>);

impl VirtioInterrupt for Triggers {
    fn queue(&self, _index: u16) {}
    fn config(&self) {}
    fn needs_reset(&self) {}
    fn queue_eventfd(&self, _index: u16) -> std::io::Result<EventFd> {
        let trigger = EventFd::new(EFD_NONBLOCK)?;
        self.0.lock().push(trigger.try_clone()?);
        Ok(trigger)
    }
}

struct Setup {
    device: VhostUserFs,
    listener: Box<dyn MemoryListener>,
    memory: GuestMemory,
    file: File,
    drivers: Vec<Driver>,
    kicks: Vec<EventFd>,
    triggers: Arc<Triggers>,
    lost: mpsc::Receiver<()>,
    _io: IoThread,
}

fn try_new(peer: &Peer, queues: u16) -> Result<Setup, VhostUserError> {
    let io = IoThread::spawn("ecr-test", Box::new(|why| panic!("{why}"))).unwrap();
    let config =
        FsConfig { socket: peer.socket(), tag: "hostShared".into(), queues, queue_size: 64 };
    let (tell, lost) = mpsc::channel();
    let on_lost = Box::new(move || {
        let _ = tell.send(());
    });
    let device = VhostUserFs::new(&config, &io.handle(), on_lost)?;
    let file = tempfile::tempfile().unwrap();
    file.set_len(2 * SIZE).unwrap();
    let ranges = [(0, 0), (SECOND, SIZE)].map(|(guest, offset)| {
        let file = FileOffset::new(file.try_clone().unwrap(), offset);
        (GuestAddress(guest), SIZE as usize, Some(file))
    });
    let memory = GuestMemory::from_ranges_with_files(ranges).unwrap();
    Ok(Setup {
        listener: device.memory_listener(),
        device,
        memory,
        file,
        drivers: Vec::new(),
        kicks: Vec::new(),
        triggers: Arc::default(),
        lost,
        _io: io,
    })
}

impl Setup {
    fn new(peer: &Peer) -> Self {
        try_new(peer, 2).unwrap()
    }

    fn regions(&self) -> [MemoryRegion; 2] {
        [(0, 0), (SECOND, SIZE)].map(|(guest, offset)| MemoryRegion {
            guest: GuestAddress(guest),
            size: SIZE,
            host: self.memory.find_region(GuestAddress(guest)).unwrap().as_ptr() as u64,
            read_only: false,
            shared: Some(SharedFile { fd: self.file.as_raw_fd(), offset }),
        })
    }

    fn share_memory(&mut self) {
        for region in self.regions() {
            self.listener.add(&region).unwrap();
        }
    }

    fn activate(&mut self) -> Result<(), ActivateError> {
        let count = self.device.queue_max_sizes().len() as u64;
        self.drivers =
            (0..count).map(|n| Driver::new(&self.memory, 0x1000 * (n + 1), 64)).collect();
        self.kicks = (0..count).map(|_| EventFd::new(EFD_NONBLOCK).unwrap()).collect();
        let queues = (0..).zip(&self.drivers).zip(&self.kicks);
        let queues = queues.map(|((index, driver), kick)| ActiveQueue {
            index,
            queue: driver.queue(),
            kick: kick.try_clone().unwrap(),
        });
        self.device.activate(Activation {
            memory: GuestMemoryHandle::new(self.memory.clone()),
            features: FEATURES,
            queues: queues.collect(),
            interrupt: Arc::clone(&self.triggers) as _,
        })
    }
}

fn u64_at(body: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(body[at..at + 8].try_into().unwrap())
}

#[test]
fn the_guest_sees_a_file_system() {
    let peer = Peer::start(Nature::default());
    let s = Setup::new(&peer);
    assert_eq!((s.device.device_type(), s.device.features()), (26, 0));
    assert_eq!(s.device.queue_max_sizes(), [64; 3]);
    let mut space = [0xff; 44];
    s.device.config_read(0, &mut space);
    assert_eq!(&space[..11], b"hostShared\0");
    assert_eq!((&space[36..40], &space[40..]), (&[2, 0, 0, 0][..], &[0; 4][..]));
    let mut part = [0xff; 4];
    s.device.config_read(u64::MAX, &mut part);
    assert_eq!(part, [0; 4]);
}

#[test]
fn there_are_as_many_queues_as_the_daemon_serves() {
    let few = |queues| Peer::start(Nature { queues, ..Nature::default() });
    assert_eq!(try_new(&few(2), 4).unwrap().device.queue_max_sizes().len(), 2);
    let error = try_new(&few(1), 4).err().unwrap().to_string();
    assert!(error.contains("it serves 1 queues, and a file system needs 2"), "{error}");
}

#[test]
fn only_what_the_daemon_can_do_is_offered() {
    let features = 1 << 32 | 1 << 30;
    let peer = Peer::start(Nature { features, ..Nature::default() });
    assert_eq!(Setup::new(&peer).device.ring_features(), features);
    let legacy = Peer::start(Nature { features: 1 << 30, ..Nature::default() });
    assert!(try_new(&legacy, 1).err().unwrap().to_string().contains("legacy devices only"));
}

#[test]
fn queues_go_over_and_come_back() {
    let peer = Peer::start(Nature::default());
    let mut s = Setup::new(&peer);
    s.share_memory();
    s.activate().unwrap();
    peer.heard(|heard| {
        assert_eq!(u64_at(heard.all(request::SET_FEATURES)[0], 0), FEATURES | 1 << 30);
        let addresses = heard.all(request::SET_VRING_ADDR);
        assert_eq!(addresses.len(), 3);
        // Of queue 1, in this process.
        let host = s.regions()[0].host;
        assert_eq!(u64_at(addresses[1], 8), host + 0x2000);
        assert_eq!(heard.all(request::SET_VRING_ENABLE).len(), 3);
    });
    for queue in 0..3u8 {
        // The doorbell was rung once at the beginning.
        let mut count = [0; 8];
        peer.heard(|heard| (&heard.kicks[&queue]).read_exact(&mut count)).unwrap();
        s.kicks[usize::from(queue)].write(1).unwrap();
        peer.heard(|heard| (&heard.kicks[&queue]).read_exact(&mut count)).unwrap();
        peer.heard(|heard| (&heard.calls[&queue]).write_all(&1u64.to_ne_bytes())).unwrap();
        assert_eq!(s.triggers.0.lock()[usize::from(queue)].read().unwrap(), 1);
    }
    let queues = s.device.deactivate();
    use virtio_queue::QueueT;
    let indices: Vec<_> = queues.iter().map(|q| (q.index, q.queue.next_avail())).collect();
    assert_eq!(indices, [(0, 7), (1, 7), (2, 7)]);
    // A driver may begin anew.
    s.activate().unwrap();
    assert_eq!(s.device.deactivate().len(), 3);
    assert_eq!(s.device.deactivate().len(), 0);
    drop(s);
}

#[test]
fn the_daemon_has_memory_before_the_guest() {
    // With and without acknowledgements.
    for protocol in [0b1001, 0b0001] {
        let peer = Peer::start(Nature { protocol, ..Nature::default() });
        let mut s = Setup::new(&peer);
        s.file.write_all_at(b"guest", SIZE + 0x42).unwrap();
        s.share_memory();
        peer.heard(|heard| {
            let tables = heard.all(request::SET_MEM_TABLE);
            assert_eq!(tables.len(), 2, "{protocol:#b}");
            let second = &tables[1][8 + 32..];
            let fields: Vec<_> = (0..4).map(|n| u64_at(second, 8 * n)).collect();
            assert_eq!(fields, [SECOND, SIZE, s.regions()[1].host, SIZE]);
            let mut data = [0; 5];
            heard.memory[1].read_exact_at(&mut data, SIZE + 0x42).unwrap();
            assert_eq!(&data, b"guest");
        });
        let region = s.regions()[1];
        s.listener.remove(&region);
        let last = peer.heard(|heard| heard.all(request::SET_MEM_TABLE)[2].to_vec());
        assert_eq!((last[0], last.len()), (1, 8 + 32));
        // What is not shared is no business of the daemon's.
        s.listener.add(&MemoryRegion { shared: None, ..region }).unwrap();
        assert_eq!(peer.heard(|heard| heard.all(request::SET_MEM_TABLE).len()), 3);
    }
}

#[test]
fn memory_that_the_daemon_refuses_is_taken_back() {
    let misdeed = Some((request::SET_MEM_TABLE, 1, Misdeed::Refuse));
    let peer = Peer::start(Nature { misdeed, ..Nature::default() });
    let mut s = Setup::new(&peer);
    let [first, second] = s.regions();
    s.listener.add(&first).unwrap();
    let error = s.listener.add(&second).unwrap_err().to_string();
    assert!(error.contains("give it a table of 2 memory regions"), "{error}");
    peer.heard(|heard| {
        let counts: Vec<_> = heard.all(request::SET_MEM_TABLE).iter().map(|t| t[0]).collect();
        assert_eq!(counts, [1, 2, 1], "the old table is told again");
    });
    assert!(s.lost.try_recv().is_err(), "a refusal is no loss");
}

#[test]
fn queues_that_the_daemon_refuses_are_all_stopped() {
    let misdeed = Some((request::SET_VRING_ENABLE, 1, Misdeed::Refuse));
    let peer = Peer::start(Nature { misdeed, ..Nature::default() });
    let mut s = Setup::new(&peer);
    s.share_memory();
    let error = std::error::Error::source(&s.activate().unwrap_err()).unwrap().to_string();
    assert!(error.contains("give it 3 queues"), "{error}");
    assert_eq!(peer.heard(|heard| heard.all(request::GET_VRING_BASE).len()), 3);
    assert!(s.lost.try_recv().is_err(), "a refusal is no loss");
}

#[test]
fn a_daemon_that_dies_is_noticed_at_once() {
    let peer = Peer::start(Nature::default());
    let mut s = Setup::new(&peer);
    s.share_memory();
    s.activate().unwrap();
    peer.kill();
    s.lost.recv_timeout(Duration::from_secs(5)).unwrap();
    // The device can still be stopped, and does not start again; memory may come.
    assert_eq!(s.device.deactivate().len(), 3);
    let error = s.activate().unwrap_err().to_string();
    assert!(error.contains("start a file system device"), "{error}");
    let region = s.regions()[1];
    s.listener.remove(&region);
    s.listener.add(&region).unwrap();
    assert!(s.lost.recv_timeout(Duration::from_millis(50)).is_err(), "it is told once");
}

#[test]
fn a_device_that_is_taken_away_loses_nobody() {
    let peer = Peer::start(Nature::default());
    let s = Setup::new(&peer);
    let Setup { device, lost, mut listener, memory: _memory, _io, .. } = s;
    drop(device);
    assert_eq!(
        lost.recv_timeout(Duration::from_millis(100)),
        Err(mpsc::RecvTimeoutError::Disconnected)
    );
    let region = MemoryRegion {
        guest: GuestAddress(0),
        size: SIZE,
        host: 0,
        read_only: false,
        shared: Some(SharedFile { fd: 0, offset: 0 }),
    };
    listener.add(&region).unwrap();
}

#[test]
fn a_daemon_that_misbehaves_ends_nothing_but_itself() {
    for kind in [Misdeed::Silence, Misdeed::Nonsense, Misdeed::Leave] {
        for at in [request::SET_VRING_BASE, request::SET_VRING_ENABLE, request::SET_FEATURES] {
            let peer = Peer::start(Nature { misdeed: Some((at, 0, kind)), ..Nature::default() });
            let mut s = Setup::new(&peer);
            s.share_memory();
            let begin = Instant::now();
            let error = s.activate().unwrap_err();
            assert!(begin.elapsed() < Duration::from_secs(3), "{kind:?} at {at}: {error}");
            s.lost.recv_timeout(Duration::from_secs(5)).unwrap();
        }
        let misdeed = Some((request::GET_VRING_BASE, 1, kind));
        let peer = Peer::start(Nature { misdeed, ..Nature::default() });
        let mut s = Setup::new(&peer);
        s.share_memory();
        s.activate().unwrap();
        assert_eq!(s.device.deactivate().len(), 3);
        s.lost.recv_timeout(Duration::from_secs(5)).unwrap();
    }
}

#[test]
fn a_daemon_that_misbehaves_from_the_start_is_refused() {
    for kind in [Misdeed::Nonsense, Misdeed::Leave] {
        for at in [request::SET_OWNER, request::GET_FEATURES, request::GET_QUEUE_NUM] {
            // Before acknowledgements are agreed on, only questions are answered.
            let peer = Peer::start(Nature { misdeed: Some((at, 0, kind)), ..Nature::default() });
            let error = try_new(&peer, 1).err().unwrap().to_string();
            assert!(error.starts_with("vhost-user daemon at /"), "{kind:?} at {at}: {error}");
        }
    }
    let nobody = std::path::PathBuf::from("/nonexistent/socket");
    let io = IoThread::spawn("ecr-test", Box::new(|why| panic!("{why}"))).unwrap();
    let config = FsConfig { socket: nobody, tag: "t".into(), queues: 1, queue_size: 64 };
    let error = VhostUserFs::new(&config, &io.handle(), Box::new(|| ())).unwrap_err().to_string();
    assert!(error.contains("is its daemon running?"), "{error}");
}
