// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

use std::os::unix::fs::FileExt;
use std::sync::Arc;

use proptest::prelude::*;
use tempfile::NamedTempFile;
use virtio_bindings::virtio_blk::*;
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::backend::block::{BlockFile, IoEngine};
use crate::io_thread::IoThread;
use crate::memory::{GuestMemory, GuestMemoryHandle};
use crate::virtio::test_driver::Driver;
use crate::virtio::test_interrupt::RecordedInterrupt;
use crate::virtio::{Activation, ActiveQueue, VirtioDevice};

const SECTORS: u64 = 256;
const QUEUE_SIZE: u16 = 16;
const HEADER: u64 = 0x8000;
const DATA: u64 = 0x10000;
const STATUS: u64 = 0x9000;
const END: u64 = 0x40000;
const OK: u8 = VIRTIO_BLK_S_OK as u8;
const IOERR: u8 = VIRTIO_BLK_S_IOERR as u8;
const UNSUPP: u8 = VIRTIO_BLK_S_UNSUPP as u8;

/// A disk whose driver is the test.
struct Machine {
    device: Blk,
    image: NamedTempFile,
    memory: GuestMemory,
    interrupt: Arc<RecordedInterrupt>,
    drivers: Vec<Driver>,
    kicks: Vec<EventFd>,
    _threads: Vec<IoThread>,
}

impl Machine {
    fn new(io: IoEngine, queues: u16, readonly: bool) -> Result<Self, BlkError> {
        let image = NamedTempFile::new().unwrap();
        image.as_file().set_len(SECTORS * 512).unwrap();
        let file = BlockFile::open(image.path(), false, readonly).unwrap();
        let threads: Vec<_> = (0..2)
            .map(|n| IoThread::spawn(&format!("ecr-io{n}"), Box::new(|why| panic!("{why}"))))
            .collect::<Result<_, _>>()
            .unwrap();
        let config =
            BlkConfig { file, serial: "disk-7".into(), queues, queue_size: QUEUE_SIZE, io };
        let device = Blk::new(config, threads.iter().map(IoThread::handle).collect())?;
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), END as usize)]).unwrap();
        let drivers = (0..queues)
            .map(|n| Driver::new(&memory, 0x1000 * (u64::from(n) + 1), QUEUE_SIZE))
            .collect();
        let kicks = (0..queues).map(|_| EventFd::new(EFD_NONBLOCK).unwrap()).collect();
        let interrupt = Arc::new(RecordedInterrupt::default());
        Ok(Self { device, image, memory, interrupt, drivers, kicks, _threads: threads })
    }

    /// A machine with one queue that is running.
    fn running(io: IoEngine) -> Result<Self, BlkError> {
        let mut machine = Self::new(io, 1, false)?;
        machine.activate_new(machine.device.features());
        Ok(machine)
    }

    fn activate_new(&mut self, features: u64) {
        let queues = (0..).zip(self.drivers.iter().zip(&self.kicks));
        let queues = queues
            .map(|(index, (driver, kick))| ActiveQueue {
                index,
                queue: driver.queue(),
                kick: kick.try_clone().unwrap(),
            })
            .collect();
        self.activate(features, queues);
    }

    fn activate(&mut self, features: u64, queues: Vec<ActiveQueue>) {
        let memory = GuestMemoryHandle::new(self.memory.clone());
        let interrupt = Arc::clone(&self.interrupt) as _;
        self.device.activate(Activation { memory, features, queues, interrupt }).unwrap();
    }

    fn put_header(&self, kind: u32, sector: u64) {
        self.memory.write_obj(kind, GuestAddress(HEADER)).unwrap();
        self.memory.write_obj(0u32, GuestAddress(HEADER + 4)).unwrap();
        self.memory.write_obj(sector, GuestAddress(HEADER + 8)).unwrap();
        self.memory.write_obj(0xeeu8, GuestAddress(STATUS)).unwrap();
    }

    /// Kick queue `index` and wait until a chain is used: its head and the bytes written.
    fn kick_and_wait(&mut self, index: usize) -> (u32, u32) {
        self.kicks[index].write(1).unwrap();
        self.wait(index)
    }

    fn wait(&mut self, index: usize) -> (u32, u32) {
        let (driver, mut used) = (&mut self.drivers[index], None);
        self.interrupt.wait_until(|| {
            used = used.or_else(|| driver.used());
            used.is_some()
        });
        used.unwrap()
    }

    /// Do a request with data at `DATA`: its status, and the bytes written to the chain.
    fn request(&mut self, kind: u32, sector: u64, len: u32, to_guest: bool) -> (u8, u32) {
        self.put_header(kind, sector);
        let data = (DATA, len, to_guest);
        self.drivers[0].add(&[(HEADER, 16, false), data, (STATUS, 1, true)]);
        let (_, written) = self.kick_and_wait(0);
        (self.status(), written)
    }

    fn status(&self) -> u8 {
        self.memory.read_obj(GuestAddress(STATUS)).unwrap()
    }

    fn fill(&self, byte: u8, len: usize) {
        self.memory.write_slice(&vec![byte; len], GuestAddress(DATA)).unwrap();
    }

    fn data(&self, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.memory.read_slice(&mut data, GuestAddress(DATA)).unwrap();
        data
    }

    fn on_disk(&self, sector: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.image.as_file().read_exact_at(&mut data, sector * 512).unwrap();
        data
    }

    /// Write a range for a discard or a write of zeros, and request that.
    fn range_request(&mut self, kind: u32, sector: u64, count: u32, flags: u32) -> u8 {
        self.memory.write_obj(sector, GuestAddress(DATA)).unwrap();
        self.memory.write_obj(count, GuestAddress(DATA + 8)).unwrap();
        self.memory.write_obj(flags, GuestAddress(DATA + 12)).unwrap();
        self.request(kind, 0, 16, false).0
    }
}

/// Run `test` on each engine that this host has.
fn on_each_engine(make: impl Fn(IoEngine) -> Result<Machine, BlkError>, test: impl Fn(Machine)) {
    for io in [IoEngine::Sync, IoEngine::Uring] {
        match make(io) {
            Ok(machine) => test(machine),
            Err(error) => println!("skipped {io:?}: {error}"),
        }
    }
}

#[test]
fn sectors_are_written_and_read() {
    on_each_engine(Machine::running, |mut m| {
        m.fill(0x5a, 1024);
        assert_eq!(m.request(VIRTIO_BLK_T_OUT, 3, 1024, false), (OK, 1));
        assert_eq!(m.on_disk(3, 1024), [0x5a; 1024]);
        assert_eq!(m.on_disk(5, 512), [0; 512]);
        assert_eq!(m.request(VIRTIO_BLK_T_FLUSH, 0, 0, false), (OK, 1));
        m.fill(0, 1024);
        assert_eq!(m.request(VIRTIO_BLK_T_IN, 3, 1024, true), (OK, 1025));
        assert_eq!(m.data(1024), [0x5a; 1024]);
    });
}

#[test]
fn the_cut_of_a_request_does_not_matter() {
    on_each_engine(Machine::running, |mut m| {
        m.image.as_file().write_all_at(&[7; 512], 512).unwrap();
        m.put_header(VIRTIO_BLK_T_IN, 1);
        // The header in two pieces; the status in one piece with the end of the data.
        m.memory.write_slice(&[0xee; 513], GuestAddress(DATA)).unwrap();
        m.drivers[0].add(&[
            (HEADER, 3, false),
            (HEADER + 3, 13, false),
            (DATA, 100, true),
            (DATA + 100, 413, true),
        ]);
        assert_eq!(m.kick_and_wait(0), (0, 513));
        assert_eq!(m.data(513), [[7; 512].as_slice(), &[OK]].concat());
    });
}

#[test]
fn the_serial_number_is_read() {
    on_each_engine(Machine::running, |mut m| {
        m.fill(0xee, 32);
        assert_eq!(m.request(VIRTIO_BLK_T_GET_ID, 0, 20, true), (OK, 21));
        assert_eq!(m.data(21), [b"disk-7".as_slice(), &[0; 14], &[0xee]].concat());
        // What does not fit is cut off.
        m.fill(0xee, 32);
        assert_eq!(m.request(VIRTIO_BLK_T_GET_ID, 0, 4, true), (OK, 5));
        assert_eq!(m.data(5), b"disk\xee");
    });
}

#[test]
fn sectors_are_discarded_and_zeroed() {
    on_each_engine(Machine::running, |mut m| {
        for (kind, flags) in [
            (VIRTIO_BLK_T_DISCARD, 0),
            (VIRTIO_BLK_T_WRITE_ZEROES, 0),
            (VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP),
        ] {
            m.image.as_file().write_all_at(&[0xff; 32 * 512], 0).unwrap();
            assert_eq!(m.range_request(kind, 8, 16, flags), OK);
            assert_eq!(m.on_disk(8, 16 * 512), [0; 16 * 512]);
            assert_eq!(m.on_disk(7, 512), [0xff; 512]);
            assert_eq!(m.on_disk(24, 512), [0xff; 512]);
            assert_eq!(m.range_request(kind, 8, 0, flags), OK);
        }
    });
}

#[test]
fn ranges_outside_of_the_disk_are_refused() {
    on_each_engine(Machine::running, |mut m| {
        let outside = [(SECTORS, 1), (SECTORS - 1, 2), (u64::MAX, 1), (u64::MAX / 512, 1)];
        for (sector, count) in outside {
            let len = count * 512;
            assert_eq!(m.request(VIRTIO_BLK_T_IN, sector, len, true), (IOERR, 1), "{sector}");
            assert_eq!(m.request(VIRTIO_BLK_T_OUT, sector, len, false), (IOERR, 1));
            for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
                assert_eq!(m.range_request(kind, sector, count, 0), IOERR);
            }
        }
        assert_eq!(m.image.as_file().metadata().unwrap().len(), SECTORS * 512);
        assert_eq!(m.request(VIRTIO_BLK_T_IN, SECTORS - 1, 512, true).0, OK);
    });
}

#[test]
fn requests_that_make_no_sense_get_a_status() {
    on_each_engine(Machine::running, |mut m| {
        for kind in [2, 3, 9, VIRTIO_BLK_T_SECURE_ERASE, 0x8000_0000, u32::MAX] {
            assert_eq!(m.request(kind, 0, 512, false), (UNSUPP, 1), "{kind}");
        }
        assert_eq!(m.request(VIRTIO_BLK_T_IN, 0, 511, true), (IOERR, 1), "part of a sector");
        assert_eq!(m.request(VIRTIO_BLK_T_OUT, 0, 513, false), (IOERR, 1), "part of a sector");
        assert_eq!(m.request(VIRTIO_BLK_T_IN, 0, 0, true), (OK, 1), "nothing");
        assert_eq!(m.request(VIRTIO_BLK_T_DISCARD, 0, 15, false), (IOERR, 1), "part of a range");
        assert_eq!(m.request(VIRTIO_BLK_T_DISCARD, 0, 32, false), (IOERR, 1), "two ranges");
        assert_eq!(m.range_request(VIRTIO_BLK_T_DISCARD, 0, 1, 1), UNSUPP, "unmap of a discard");
        assert_eq!(m.range_request(VIRTIO_BLK_T_WRITE_ZEROES, 0, 1, 2), UNSUPP, "unknown flag");
        m.put_header(VIRTIO_BLK_T_IN, 0);
        m.drivers[0].add(&[(HEADER, 15, false), (STATUS, 1, true)]);
        m.kick_and_wait(0);
        assert_eq!(m.status(), IOERR, "part of a header");
        assert_eq!(m.interrupt.resets(), 0);
    });
}

#[test]
fn a_read_only_disk_refuses_what_changes_it() {
    let make = |io| {
        let mut machine = Machine::new(io, 1, true)?;
        machine.activate_new(machine.device.features());
        Ok(machine)
    };
    on_each_engine(make, |mut m| {
        let features = m.device.features();
        assert_ne!(features & 1 << VIRTIO_BLK_F_RO, 0);
        assert_eq!(features & (1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES), 0);
        assert_eq!(m.request(VIRTIO_BLK_T_OUT, 0, 512, false), (IOERR, 1));
        assert_eq!(m.range_request(VIRTIO_BLK_T_DISCARD, 0, 1, 0), IOERR);
        assert_eq!(m.range_request(VIRTIO_BLK_T_WRITE_ZEROES, 0, 1, 0), IOERR);
        assert_eq!(m.request(VIRTIO_BLK_T_IN, 0, 512, true), (OK, 513));
        assert_eq!(m.request(VIRTIO_BLK_T_FLUSH, 0, 0, false), (OK, 1));
    });
}

#[test]
fn a_disk_that_shrinks_gives_errors_and_goes_on() {
    on_each_engine(Machine::running, |mut m| {
        m.image.as_file().set_len(512).unwrap();
        assert_eq!(m.request(VIRTIO_BLK_T_IN, 100, 512, true), (IOERR, 1));
        assert_eq!(m.request(VIRTIO_BLK_T_IN, 0, 1024, true), (IOERR, 1));
        assert_eq!(m.request(VIRTIO_BLK_T_IN, 0, 512, true), (OK, 513));
        assert_eq!(m.interrupt.resets(), 0);
    });
}

#[test]
fn a_chain_without_a_status_asks_for_a_reset() {
    on_each_engine(Machine::running, |mut m| {
        m.put_header(VIRTIO_BLK_T_OUT, 0);
        m.drivers[0].add(&[(HEADER, 16, false), (DATA, 512, false)]);
        m.kicks[0].write(1).unwrap();
        m.interrupt.wait_for_reset();
        assert_eq!(m.device.deactivate().len(), 1);
    });
}

#[test]
fn a_broken_queue_can_be_reset_and_used_again() {
    on_each_engine(Machine::running, |mut m| {
        m.drivers[0].set_available_index(QUEUE_SIZE + 1);
        m.kicks[0].write(1).unwrap();
        m.interrupt.wait_for_reset();
        m.device.deactivate();

        m.memory.write_slice(&[0; 0x1000], GuestAddress(0x1000)).unwrap();
        m.drivers[0] = Driver::new(&m.memory, 0x1000, QUEUE_SIZE);
        m.activate_new(m.device.features());
        assert_eq!(m.request(VIRTIO_BLK_T_IN, 0, 512, true), (OK, 513));
    });
}

#[test]
fn queues_come_back_with_their_indices_and_go_on() {
    on_each_engine(Machine::running, |mut m| {
        for _ in 0..3 {
            assert_eq!(m.request(VIRTIO_BLK_T_FLUSH, 0, 0, false).0, OK);
        }
        let queues = m.device.deactivate();
        let [queue] = queues.as_slice() else { panic!("one queue") };
        assert_eq!((queue.index, queue.queue.next_avail(), queue.queue.next_used()), (0, 3, 3));
        m.activate(m.device.features(), queues);
        assert_eq!(m.request(VIRTIO_BLK_T_FLUSH, 0, 0, false).0, OK);
    });
}

#[test]
fn what_is_in_flight_is_done_before_the_queues_come_back() {
    on_each_engine(Machine::running, |mut m| {
        m.fill(0x77, 512);
        m.put_header(VIRTIO_BLK_T_OUT, 9);
        for _ in 0..5 {
            let data = (DATA, 512, false);
            m.drivers[0].add(&[(HEADER, 16, false), data, (STATUS, 1, true)]);
        }
        m.kicks[0].write(1).unwrap();
        let queue = &m.device.deactivate()[0].queue;
        assert_eq!(queue.next_avail(), queue.next_used(), "nothing is between available and used");
        let served = queue.next_used();
        assert_eq!((0..9).map_while(|_| m.drivers[0].used()).count(), usize::from(served));
    });
}

#[test]
fn a_head_that_is_in_use_must_not_come_again() {
    // Only with io_uring can a request be in flight while the next is read.
    let Ok(mut m) = Machine::running(IoEngine::Uring) else {
        println!("skipped: no io_uring");
        return;
    };
    m.put_header(VIRTIO_BLK_T_IN, 0);
    let head = m.drivers[0].add(&[(HEADER, 16, false), (DATA, 512, true), (STATUS, 1, true)]);
    m.drivers[0].publish(head);
    m.kicks[0].write(1).unwrap();
    m.interrupt.wait_for_reset();
}

#[test]
fn each_queue_is_served() {
    let make = |io| {
        let mut machine = Machine::new(io, 4, false)?;
        machine.activate_new(machine.device.features());
        Ok(machine)
    };
    on_each_engine(make, |mut m| {
        for index in 0..4 {
            m.put_header(VIRTIO_BLK_T_OUT, index as u64);
            m.fill(index as u8 + 1, 512);
            m.drivers[index].add(&[(HEADER, 16, false), (DATA, 512, false), (STATUS, 1, true)]);
            assert_eq!(m.kick_and_wait(index), (0, 1));
            assert_eq!(m.on_disk(index as u64, 512), [index as u8 + 1; 512]);
        }
        assert_eq!(m.interrupt.queues(), [0, 1, 2, 3]);
        let indices: Vec<_> = m.device.deactivate().iter().map(|queue| queue.index).collect();
        assert_eq!(indices, [0, 1, 2, 3]);
    });
}

#[test]
fn the_configuration_space_is_that_of_the_specification() {
    let mut m = Machine::new(IoEngine::Sync, 4, false).unwrap();
    let field = |m: &Machine, offset: usize, len: usize| {
        let mut data = [0; 8];
        m.device.config_read(offset as u64, &mut data[..len]);
        u64::from_le_bytes(data)
    };
    macro_rules! check {
        ($($field:ident: $len:literal = $value:expr),* $(,)?) => {$(
            let offset = std::mem::offset_of!(virtio_blk_config, $field);
            assert_eq!(field(&m, offset, $len), $value, stringify!($field));
        )*};
    }
    check! {
        capacity: 8 = SECTORS, size_max: 4 = 0, seg_max: 4 = 14, blk_size: 4 = 512,
        alignment_offset: 1 = 0, min_io_size: 2 = 1, opt_io_size: 4 = 0, wce: 1 = 1,
        num_queues: 2 = 4, max_discard_sectors: 4 = 1 << 22, max_discard_seg: 4 = 1,
        discard_sector_alignment: 4 = 1, max_write_zeroes_sectors: 4 = 1 << 16,
        max_write_zeroes_seg: 4 = 1, write_zeroes_may_unmap: 1 = 1,
    }
    // Outside of it there is nothing.
    assert_eq!(field(&m, 57, 8), 0);
    let mut data = [0xff; 4];
    m.device.config_read(u64::MAX, &mut data);
    assert_eq!(data, [0; 4]);
    // Without the feature the cache mode is not the driver's.
    m.device.config_write(32, &[0]);
    check! { wce: 1 = 1 }
}

#[test]
fn the_cache_mode_is_the_drivers_if_it_can_have_it() {
    let mut m = Machine::new(IoEngine::Sync, 1, false).unwrap();
    let writeback = |m: &Machine| {
        let mut data = [0];
        m.device.config_read(32, &mut data);
        data[0]
    };
    let (flush, wce) = (1 << VIRTIO_BLK_F_FLUSH, 1 << VIRTIO_BLK_F_CONFIG_WCE);
    for (features, mode) in [(0, 0), (flush, 1), (flush | wce, 1)] {
        m.activate_new(features);
        assert_eq!(writeback(&m), mode, "{features:#x}");
        m.device.deactivate();
    }
    m.device.config_write(30, &[9, 9, 0]);
    assert_eq!(writeback(&m), 0);
    m.device.config_write(33, &[1]);
    m.device.config_write(u64::MAX, &[1]);
    assert_eq!(writeback(&m), 0);
    m.device.config_write(32, &[1]);
    assert_eq!(writeback(&m), 1);
}

#[test]
fn devices_that_cannot_work_are_refused() {
    let image = NamedTempFile::new().unwrap();
    image.as_file().set_len(512).unwrap();
    let file = BlockFile::open(image.path(), false, false).unwrap();
    let thread = IoThread::spawn("ecr-test", Box::new(|why| panic!("{why}"))).unwrap();
    let make = |queues, queue_size, threads| {
        let config = BlkConfig {
            file: file.clone(),
            serial: String::new(),
            queues,
            queue_size,
            io: IoEngine::Sync,
        };
        Blk::new(config, threads).map(drop)
    };
    assert!(matches!(make(0, 16, vec![thread.handle()]), Err(BlkError::NothingToServe { .. })));
    assert!(matches!(make(1, 16, vec![]), Err(BlkError::NothingToServe { .. })));
    for size in [0, 2, 3, 100, 65535] {
        let refused = make(1, size, vec![thread.handle()]);
        assert!(matches!(refused, Err(BlkError::QueueSize(_))), "{size}");
    }
    make(1, 4, vec![thread.handle()]).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever is in the rings and headers, the device lives, and gives its queue back.
    #[test]
    fn random_rings_never_hurt(
        descriptors in prop::collection::vec(
            (
                prop_oneof![Just(HEADER), Just(DATA), Just(STATUS), 0..END, any::<u64>()],
                prop_oneof![Just(16u32), Just(512), Just(1), 0..4096u32, any::<u32>()],
                0..8u16,
                0..QUEUE_SIZE + 1,
            ),
            usize::from(QUEUE_SIZE),
        ),
        kind in prop_oneof![0..16u32, any::<u32>()],
        sector in prop_oneof![0..SECTORS + 2, any::<u64>()],
        heads in prop::collection::vec(0..QUEUE_SIZE + 1, 1..8),
    ) {
        on_each_engine(Machine::running, |mut m| {
            for (index, &(address, len, flags, next)) in (0..).zip(&descriptors) {
                m.drivers[0].descriptor(index, address, len, flags, next);
            }
            m.put_header(kind, sector);
            for head in &heads {
                m.drivers[0].publish(*head);
            }
            m.kicks[0].write(1).unwrap();
            assert_eq!(m.device.deactivate().len(), 1);
            assert_eq!(m.image.as_file().metadata().unwrap().len(), SECTORS * 512);
        });
    }
}
