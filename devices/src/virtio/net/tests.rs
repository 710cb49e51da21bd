// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use proptest::prelude::*;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::receive::FRAME_MAX;
use super::*;
use crate::backend::tap::{HEADER_SIZE, NetBackend};
use crate::io_thread::IoThread;
use crate::memory::GuestMemoryHandle;
use crate::virtio::test_driver::Driver;
use crate::virtio::test_interrupt::RecordedInterrupt;
use crate::virtio::{Activation, ActiveQueue, VirtioDevice};

const MERGEABLE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
const EVENT_IDX: u64 = 1 << 29;
const OFFLOADS: u32 = libc::TUN_F_CSUM | libc::TUN_F_TSO4;
/// Rings of queue N begin at N times this.
const RING: u64 = 0x1_0000;
const DATA: u64 = 0x10_0000;
const QUEUE_SIZE: u16 = 8;

/// The near end of a pair of sockets, in place of a tap.
#[derive(Debug)]
struct Cable {
    end: UnixDatagram,
    offloads: AtomicU32,
    enabled: AtomicBool,
}

impl NetBackend for Cable {
    fn offloads(&self) -> u32 {
        OFFLOADS
    }
    fn set_offloads(&self, offloads: u32) -> io::Result<()> {
        self.offloads.store(offloads, Ordering::SeqCst);
        Ok(())
    }
    fn set_enabled(&self, enabled: bool) -> io::Result<()> {
        self.enabled.store(enabled, Ordering::SeqCst);
        Ok(())
    }
}

impl AsRawFd for Cable {
    fn as_raw_fd(&self) -> RawFd {
        self.end.as_raw_fd()
    }
}

/// A device, the test as its driver, and the host's ends of its cables.
struct Setup {
    device: Net,
    cables: Vec<Arc<Cable>>,
    host: Vec<UnixDatagram>,
    queues: Vec<Driver>,
    kicks: Vec<EventFd>,
    interrupt: Arc<RecordedInterrupt>,
    _io: IoThread,
}

impl Setup {
    fn new(pairs: usize, features: u64) -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x40_0000)]).unwrap();
        let (cables, host): (Vec<_>, Vec<_>) = (0..pairs)
            .map(|_| {
                let (end, host) = UnixDatagram::pair().unwrap();
                end.set_nonblocking(true).unwrap();
                host.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
                let enabled = AtomicBool::new(true);
                (Arc::new(Cable { end, offloads: AtomicU32::new(0), enabled }), host)
            })
            .unzip();
        let io = IoThread::spawn("ecr-test", Box::new(|why| panic!("{why}"))).unwrap();
        let backends = cables.iter().map(|cable| Arc::clone(cable) as Arc<dyn NetBackend>);
        let config = NetConfig {
            mac: [2, 0, 0, 0, 0, 1],
            mtu: None,
            queue_size: QUEUE_SIZE,
            backends: backends.collect(),
        };
        let mut device = Net::new(config, vec![io.handle()]).unwrap();
        let interrupt = Arc::new(RecordedInterrupt::default());
        let count = if features >> VIRTIO_NET_F_MQ & 1 != 0 { 2 * pairs + 1 } else { 3 };
        let queues: Vec<_> =
            (1..).take(count).map(|n| Driver::new(&memory, n * RING, QUEUE_SIZE)).collect();
        let kicks: Vec<_> = queues.iter().map(|_| EventFd::new(EFD_NONBLOCK).unwrap()).collect();
        let active = (0..).zip(&queues).zip(&kicks).map(|((index, driver), kick)| ActiveQueue {
            index,
            queue: driver.queue(),
            kick: kick.try_clone().unwrap(),
        });
        let context = Activation {
            memory: GuestMemoryHandle::new(memory),
            features,
            queues: active.collect(),
            interrupt: Arc::clone(&interrupt) as _,
        };
        device.activate(context).unwrap();
        Self { device, cables, host, queues, kicks, interrupt, _io: io }
    }

    /// Give queue `index` a chain of `buffers`, and kick.
    fn give(&mut self, index: usize, buffers: &[(u64, u32, bool)]) -> u16 {
        let head = self.queues[index].add(buffers);
        self.kicks[index].write(1).unwrap();
        head
    }

    /// The next used chain of queue `index`.
    fn used(&mut self, index: usize) -> (u32, u32) {
        // Not by interrupts: with EVENT_IDX this driver asks for none.
        for _ in 0..5000 {
            if let Some(used) = self.queues[index].used() {
                return used;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        panic!("nothing is used in queue {index}");
    }

    fn bytes(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.queues[0].memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    /// Send a command and say what the answer is.
    fn command(&mut self, class: u8, command: u8, data: &[u8]) -> u8 {
        let control = self.queues.len() - 1;
        let bytes = [&[class, command], data].concat();
        self.queues[0].memory.write_slice(&bytes, GuestAddress(DATA)).unwrap();
        self.queues[0].memory.write_obj(0xffu8, GuestAddress(DATA + 256)).unwrap();
        self.give(control, &[(DATA, bytes.len() as u32, false), (DATA + 256, 1, true)]);
        assert_eq!(self.used(control).1, 1);
        self.bytes(DATA + 256, 1)[0]
    }
}

/// A frame behind a header, as a tap would hand it over: the count of buffers is not filled in.
fn frame(len: usize) -> Vec<u8> {
    let payload = (0..len).map(|n| (n % 251) as u8);
    [0; HEADER_SIZE].into_iter().chain(payload).collect()
}

#[test]
fn a_frame_goes_out_whole_and_in_order() {
    let mut s = Setup::new(1, 0);
    let sent = frame(1000);
    s.queues[1].memory.write_slice(&sent, GuestAddress(DATA)).unwrap();
    s.give(1, &[(DATA, 12, false), (DATA + 12, 500, false), (DATA + 512, 500, false)]);
    s.give(1, &[(DATA, 100, false)]);
    for len in [1012, 100] {
        let mut seen = vec![0; 2000];
        assert_eq!(s.host[0].recv(&mut seen).unwrap(), len);
        assert_eq!(seen[..len], sent[..len]);
    }
    assert_eq!(s.used(1), (0, 0));
    assert_eq!(s.used(1), (3, 0));
}

#[test]
fn what_is_no_frame_is_dropped_and_its_buffers_come_back() {
    let mut s = Setup::new(1, 0);
    let runt = s.give(1, &[(DATA, 20, false)]);
    let giant = s.give(1, &[(DATA, FRAME_MAX as u32 + 1, false)]);
    let wrong_way = s.give(1, &[(DATA, 200, true)]);
    let good = s.give(1, &[(DATA, 60, false)]);
    for head in [runt, giant, wrong_way, good] {
        assert_eq!(s.used(1), (head.into(), 0));
    }
    assert_eq!(s.host[0].recv(&mut [0; 100]).unwrap(), 60);
    assert_eq!(s.interrupt.resets(), 0);
}

#[test]
fn a_host_that_takes_no_frames_is_waited_for() {
    const FRAMES: usize = 600;
    let mut s = Setup::new(1, EVENT_IDX);
    let mut taken = 0;
    for n in 0..FRAMES {
        s.give(1, &[(DATA, 60 + n as u32, false)]);
        // The host takes nothing until the guest has no descriptor left.
        while n + 1 - taken >= usize::from(QUEUE_SIZE) + 200 {
            let mut seen = [0; 2000];
            assert_eq!(s.host[0].recv(&mut seen).unwrap(), 60 + taken);
            taken += 1;
        }
        if n >= usize::from(QUEUE_SIZE) - 1 {
            // Its descriptors come back one by one, or when the host takes something.
            while s.queues[1].used().is_none() {
                let mut seen = [0; 2000];
                assert_eq!(s.host[0].recv(&mut seen).unwrap(), 60 + taken);
                taken += 1;
            }
        }
    }
    for n in taken..FRAMES {
        assert_eq!(s.host[0].recv(&mut [0; 2000]).unwrap(), 60 + n);
    }
}

#[test]
fn a_frame_comes_in() {
    let mut s = Setup::new(1, 0);
    let head = s.give(0, &[(DATA, 7, true), (DATA + 0x100, 4, true), (DATA + 0x200, 1600, true)]);
    s.host[0].send(&frame(900)).unwrap();
    assert_eq!(s.used(0), (head.into(), 912));
    let all = [s.bytes(DATA, 7), s.bytes(DATA + 0x100, 4), s.bytes(DATA + 0x200, 901)].concat();
    // The two bytes of the count of buffers lie in two buffers.
    let mut expected = frame(900);
    expected[10] = 1;
    assert_eq!(all, expected);
}

#[test]
fn frames_wait_for_buffers() {
    for features in [0, EVENT_IDX, MERGEABLE, MERGEABLE | EVENT_IDX] {
        let mut s = Setup::new(1, features);
        for len in [100, 200, 300] {
            s.host[0].send(&frame(len)).unwrap();
        }
        for (n, len) in [100, 200, 300].into_iter().enumerate() {
            let head = s.give(0, &[(DATA, 1600, true)]);
            assert_eq!(s.used(0), (head.into(), len + 12), "frame {n} with {features:#x}");
            assert_eq!(s.bytes(DATA, len as usize + 12)[12..], frame(len as usize)[12..]);
        }
    }
}

#[test]
fn a_large_frame_takes_several_buffers() {
    let mut s = Setup::new(1, MERGEABLE | EVENT_IDX);
    // The second one is expected, the first one was not.
    for _ in 0..2 {
        for n in 0..4 {
            s.queues[0].add(&[(DATA + n * 0x1000, 1000, true)]);
        }
        s.kicks[0].write(1).unwrap();
        let sent = frame(2700);
        s.host[0].send(&sent).unwrap();
        let lengths: Vec<_> = (0..3).map(|_| s.used(0).1).collect();
        assert_eq!(lengths, [1000, 1000, 712]);
        let parts =
            [s.bytes(DATA, 1000), s.bytes(DATA + 0x1000, 1000), s.bytes(DATA + 0x2000, 712)];
        let seen = parts.concat();
        assert_eq!(seen[10..12], [3, 0]);
        assert_eq!(seen[12..], sent[12..]);
        s.host[0].send(&frame(50)).unwrap();
        assert_eq!(s.used(0).1, 62, "the fourth buffer is still there");
    }
}

#[test]
fn a_frame_that_has_begun_waits_for_the_rest_of_its_buffers() {
    let mut s = Setup::new(1, MERGEABLE);
    s.give(0, &[(DATA, 1000, true)]);
    s.host[0].send(&frame(2500)).unwrap();
    s.host[0].send(&frame(70)).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(s.queues[0].used(), None);
    s.give(0, &[(DATA + 0x1000, 1000, true)]);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(s.queues[0].used(), None);
    s.queues[0].add(&[(DATA + 0x2000, 1000, true)]);
    s.give(0, &[(DATA + 0x3000, 1000, true)]);
    let lengths: Vec<_> = (0..4).map(|_| s.used(0).1).collect();
    assert_eq!(lengths, [1000, 1000, 512, 82]);
    let parts = [s.bytes(DATA, 1000), s.bytes(DATA + 0x1000, 1000), s.bytes(DATA + 0x2000, 512)];
    assert_eq!(parts.concat()[12..], frame(2500)[12..]);
}

#[test]
fn a_frame_that_never_fits_is_dropped_and_the_next_one_comes() {
    // Without mergeable buffers a frame has one chain, and with them a queue has only so many.
    for (features, len) in [(0, 2000), (MERGEABLE, 1000 * usize::from(QUEUE_SIZE))] {
        let mut s = Setup::new(1, features);
        s.host[0].send(&frame(len)).unwrap();
        s.host[0].send(&frame(80)).unwrap();
        for n in 0..u64::from(QUEUE_SIZE) {
            s.give(0, &[(DATA + n * 0x1000, 1000, true)]);
        }
        assert_eq!(s.used(0), (0, 92), "{features:#x}");
        assert_eq!(s.bytes(DATA, 92)[12..], frame(80)[12..]);
        assert_eq!(s.interrupt.resets(), 0);
    }
}

#[test]
fn a_large_frame_fits_exactly() {
    let mut s = Setup::new(1, MERGEABLE);
    let sent = frame(65535 + 14);
    for n in 0..u64::from(QUEUE_SIZE) {
        s.give(0, &[(DATA + n * 0x4000, 0x4000, true)]);
    }
    s.host[0].send(&sent).unwrap();
    let mut left = sent.len() as u32;
    for n in 0..5 {
        let here = left.min(0x4000);
        assert_eq!(s.used(0), (n, here));
        left -= here;
    }
    assert_eq!(s.bytes(DATA, sent.len())[12..], sent[12..]);
}

#[test]
fn a_host_that_hangs_up_leaves_the_device_alone() {
    let mut s = Setup::new(1, 0);
    s.give(0, &[(DATA, 1600, true)]);
    s.host.clear();
    s.give(1, &[(DATA, 100, false)]);
    assert_eq!(s.used(1), (0, 0));
    assert_eq!(s.interrupt.resets(), 0);
    let queues = s.device.deactivate();
    assert_eq!(queues.iter().map(|queue| queue.index).collect::<Vec<_>>(), [0, 1, 2]);
}

#[test]
fn buffers_that_break_a_rule_ask_for_a_reset() {
    // Too small for a header; nothing to write at all.
    for buffer in [(DATA, 11, true), (DATA, 1600, false)] {
        let mut s = Setup::new(1, MERGEABLE);
        s.give(0, &[buffer]);
        s.host[0].send(&frame(10)).unwrap();
        s.interrupt.wait_for_reset();
        // The other queues go on.
        s.give(1, &[(DATA, 100, false)]);
        assert_eq!(s.host[0].recv(&mut [0; 200]).unwrap(), 100);
    }
    let mut s = Setup::new(1, 0);
    s.give(1, &[(0x4000_0000, 100, false)]);
    s.interrupt.wait_for_reset();
}

#[test]
fn pairs_are_used_as_the_driver_says() {
    let mq = 1 << VIRTIO_NET_F_MQ | 1 << VIRTIO_NET_F_CTRL_VQ;
    let mut s = Setup::new(3, mq);
    let enabled = |s: &Setup| -> Vec<bool> {
        s.cables.iter().map(|cable| cable.enabled.load(Ordering::SeqCst)).collect()
    };
    assert_eq!(enabled(&s), [true, false, false]);
    assert_eq!(s.command(4, 0, &2u16.to_le_bytes()), 0);
    assert_eq!(enabled(&s), [true, true, false]);
    for wrong in [&[0, 0][..], &[4, 0], &[2], &[2, 0, 0], &[]] {
        assert_eq!(s.command(4, 0, wrong), 1, "{wrong:?}");
    }
    assert_eq!(enabled(&s), [true, true, false]);
    // Frames of each pair go to its own cable.
    for pair in 0..3 {
        let head = s.give(2 * pair, &[(DATA + 0x1000, 1600, true)]);
        s.host[pair].send(&frame(100 + pair)).unwrap();
        assert_eq!(s.used(2 * pair), (head.into(), 112 + pair as u32));
        s.give(2 * pair + 1, &[(DATA, 60 + pair as u32, false)]);
        assert_eq!(s.host[pair].recv(&mut [0; 100]).unwrap(), 60 + pair);
    }
}

#[test]
fn offloads_are_what_the_driver_accepts() {
    let offloads = 1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_TSO4;
    let control = 1 << VIRTIO_NET_F_CTRL_VQ | 1 << VIRTIO_NET_F_CTRL_GUEST_OFFLOADS;
    let mut s = Setup::new(1, offloads | control);
    let told = |s: &Setup| s.cables[0].offloads.load(Ordering::SeqCst);
    assert_eq!(told(&s), OFFLOADS);
    assert_eq!(s.command(5, 0, &(1u64 << VIRTIO_NET_F_GUEST_CSUM).to_le_bytes()), 0);
    assert_eq!(told(&s), libc::TUN_F_CSUM);
    assert_eq!(s.command(5, 0, &0u64.to_le_bytes()), 0);
    assert_eq!(told(&s), 0);
    // More than was negotiated.
    assert_eq!(s.command(5, 0, &u64::MAX.to_le_bytes()), 1);
    // Commands whose features are not offered, and that do not exist.
    for (class, command) in [(0, 0), (1, 1), (2, 0), (4, 0), (4, 1), (5, 1), (200, 7)] {
        assert_eq!(s.command(class, command, &[1, 0]), 1, "{class} {command}");
    }
    let control = s.queues.len() - 1;
    s.give(control, &[(DATA, 1, false), (DATA + 256, 1, true)]);
    assert_eq!(s.used(control).1, 1);
    s.give(control, &[(DATA, 4, false)]);
    s.interrupt.wait_for_reset();
}

#[test]
fn queues_begin_where_they_were() {
    let mut s = Setup::new(1, MERGEABLE | EVENT_IDX);
    s.give(0, &[(DATA, 1000, true)]);
    s.give(0, &[(DATA + 0x1000, 1000, true)]);
    s.host[0].send(&frame(100)).unwrap();
    assert_eq!(s.used(0), (0, 112));
    let queues = s.device.deactivate();
    use virtio_queue::QueueT;
    assert_eq!((queues[0].queue.next_avail(), queues[0].queue.next_used()), (1, 1));
}

#[test]
fn what_cannot_be_is_refused() {
    let io = IoThread::spawn("ecr-test", Box::new(|why| panic!("{why}"))).unwrap();
    let config = || NetConfig { mac: [2; 6], mtu: None, queue_size: 256, backends: Vec::new() };
    let error = Net::new(config(), vec![io.handle()]).unwrap_err();
    assert!(error.to_string().starts_with("0 pairs of queues of 256 entries"), "{error}");
    assert!(matches!(Net::new(config(), Vec::new()), Err(NetError::NoThread)));
}

#[derive(Debug, Clone)]
enum Act {
    Give { queue: usize, buffers: Vec<(u64, u32, bool)> },
    Raw { queue: usize, index: u16 },
    Frame(usize),
}

fn act() -> impl Strategy<Value = Act> {
    let buffer = (
        prop_oneof![DATA..DATA + 0x1000, Just(0x3f_ff00), any::<u64>()],
        prop_oneof![0u32..3000, any::<u32>()],
        any::<bool>(),
    );
    prop_oneof![
        4 => (0usize..3, prop::collection::vec(buffer, 1..4))
            .prop_map(|(queue, buffers)| Act::Give { queue, buffers }),
        1 => (0usize..3, any::<u16>()).prop_map(|(queue, index)| Act::Raw { queue, index }),
        2 => (0usize..5000).prop_map(Act::Frame),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever a guest does, the device can be stopped, and its thread lives.
    #[test]
    fn a_hostile_driver_harms_itself_only(
        features in prop_oneof![Just(0), Just(MERGEABLE), Just(MERGEABLE | EVENT_IDX)],
        acts in prop::collection::vec(act(), 0..20),
    ) {
        let mut s = Setup::new(1, features);
        s.host[0].set_nonblocking(true).unwrap();
        for act in acts {
            match act {
                Act::Give { queue, buffers } => { s.give(queue, &buffers); }
                Act::Raw { queue, index } => s.queues[queue].set_available_index(index),
                Act::Frame(len) => { let _ = s.host[0].send(&frame(len)); }
            }
        }
        prop_assert_eq!(s.device.deactivate().len(), 3);
    }
}
