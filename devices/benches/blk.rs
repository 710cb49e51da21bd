// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What a block request costs the host: from the kick to the interrupt, through an io thread, on a file in
//! the page cache, so that no disk is measured.

// A benchmark that cannot go on should stop.
#![allow(clippy::unwrap_used)]

#[path = "../src/virtio/test_driver.rs"]
mod test_driver;

use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use ecr_devices::backend::block::{BlockFile, IoEngine};
use ecr_devices::io_thread::IoThread;
use ecr_devices::memory::{GuestMemory, GuestMemoryHandle};
use ecr_devices::virtio::blk::{Blk, BlkConfig};
use ecr_devices::virtio::{Activation, ActiveQueue, VirtioDevice, VirtioInterrupt};
use tempfile::NamedTempFile;
use test_driver::Driver;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const QUEUE_SIZE: u16 = 256;
const FILE_SIZE: u64 = 64 << 20;
const BLOCK: u32 = 4096;
const HEADERS: u64 = 0x10_0000;
const DATA: u64 = 0x20_0000;
const OUT: u32 = 1;

struct Wake(mpsc::Sender<()>);

impl VirtioInterrupt for Wake {
    fn queue(&self, _index: u16) {
        // The last interrupt may come when the benchmark is over.
        let _ = self.0.send(());
    }
    fn config(&self) {}
    fn needs_reset(&self) {
        panic!("the benchmark breaks a rule");
    }
    fn queue_eventfd(&self, _index: u16) -> std::io::Result<EventFd> {
        EventFd::new(EFD_NONBLOCK)
    }
}

/// A disk and the benchmark as its driver.
struct Machine {
    device: Blk,
    driver: Driver,
    kick: EventFd,
    interrupts: mpsc::Receiver<()>,
    _thread: IoThread,
}

impl Machine {
    fn new(io: IoEngine) -> Option<Self> {
        let image = NamedTempFile::new().unwrap();
        image.as_file().set_len(FILE_SIZE).unwrap();
        let file = BlockFile::open(image.path(), false, false).unwrap();
        let thread = IoThread::spawn("bench-io0", Box::new(|why| panic!("{why}"))).unwrap();
        let serial = String::new();
        let config = BlkConfig { file, serial, queues: 1, queue_size: QUEUE_SIZE, io };
        let mut device = Blk::new(config, vec![thread.handle()])
            .inspect_err(|error| eprintln!("skipped: {error}"))
            .ok()?;
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 8 << 20)]).unwrap();
        let driver = Driver::new(&memory, 0x1000, QUEUE_SIZE);
        let kick = EventFd::new(EFD_NONBLOCK).unwrap();
        let (wake, interrupts) = mpsc::channel();
        let queue =
            ActiveQueue { index: 0, queue: driver.queue(), kick: kick.try_clone().unwrap() };
        device
            .activate(Activation {
                memory: GuestMemoryHandle::new(memory),
                features: device.features(),
                queues: vec![queue],
                interrupt: Arc::new(Wake(wake)),
            })
            .unwrap();
        Some(Self { device, driver, kick, interrupts, _thread: thread })
    }

    /// Do `count` requests of `kind`, of one block each, started by one kick.
    fn batch(&mut self, kind: u32, count: u16) {
        for n in 0..u64::from(count) {
            let (header, data) = (HEADERS + n * 32, DATA + n * u64::from(BLOCK));
            let sector = n * 8;
            self.driver.memory.write_obj(kind, GuestAddress(header)).unwrap();
            self.driver.memory.write_obj(sector, GuestAddress(header + 8)).unwrap();
            self.driver.add(&[
                (header, 16, false),
                (data, BLOCK, kind != OUT),
                (header + 16, 1, true),
            ]);
        }
        self.kick.write(1).unwrap();
        let mut left = count;
        while left > 0 {
            match self.driver.used() {
                Some(_) => left -= 1,
                None => self.interrupts.recv().unwrap(),
            }
        }
    }
}

fn blk(criterion: &mut Criterion) {
    for (engine, io) in [("sync", IoEngine::Sync), ("uring", IoEngine::Uring)] {
        for (name, kind) in [("read", 0), ("write", OUT)] {
            for depth in [1, 64] {
                let Some(mut machine) = Machine::new(io) else { continue };
                // The file has no blocks before they are written.
                machine.batch(OUT, depth);
                let mut group = criterion.benchmark_group("blk");
                group.measurement_time(Duration::from_secs(3));
                group.throughput(Throughput::Elements(u64::from(depth)));
                group.bench_function(format!("{engine}/{name}/depth-{depth}"), |bench| {
                    bench.iter(|| machine.batch(kind, depth));
                });
                group.finish();
                machine.device.deactivate();
            }
        }
    }
}

criterion_group!(benches, blk);
criterion_main!(benches);
