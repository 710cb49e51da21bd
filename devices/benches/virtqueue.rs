// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What a queue costs: taking checked chains and returning them, on plain memory, without a device.

// A benchmark that cannot go on should stop.
#![allow(clippy::unwrap_used)]

#[path = "../src/virtio/test_driver.rs"]
mod test_driver;

use std::hint::black_box;
use std::sync::Arc;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use ecr_devices::memory::GuestMemory;
use ecr_devices::virtio::queue::{Chain, DeviceQueue};
use ecr_devices::virtio::{ActiveQueue, VirtioInterrupt};
use test_driver::{Driver, INDIRECT, NEXT, WRITE};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Chains in a batch.
const BATCH: u16 = 64;
const QUEUE_SIZE: u16 = 256;
/// `VIRTIO_F_INDIRECT_DESC` and `VIRTIO_F_EVENT_IDX`.
const FEATURES: u64 = 1 << 28 | 1 << 29;
const RINGS: u64 = 0x1000;
const TABLES: u64 = 0x10_0000;
const DATA: u64 = 0x20_0000;

struct Silence;

impl VirtioInterrupt for Silence {
    fn queue(&self, _index: u16) {}
    fn config(&self) {}
    fn needs_reset(&self) {
        panic!("the benchmark breaks a rule");
    }
    fn queue_eventfd(&self, _index: u16) -> std::io::Result<EventFd> {
        EventFd::new(EFD_NONBLOCK)
    }
}

/// Serve a batch of the chains that `make` adds, again and again.
fn measure(criterion: &mut Criterion, name: &str, mut make: impl FnMut(&mut Driver, u16)) {
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 8 << 20)]).unwrap();
    let mut driver = Driver::new(&memory, RINGS, QUEUE_SIZE);
    let active =
        ActiveQueue { index: 0, queue: driver.queue(), kick: EventFd::new(EFD_NONBLOCK).unwrap() };
    let mut queue = DeviceQueue::new(active, FEATURES, Arc::new(Silence));
    let mut chain = Chain::default();
    let mut group = criterion.benchmark_group("virtqueue");
    group.throughput(Throughput::Elements(u64::from(BATCH)));
    group.bench_function(name, |bench| {
        bench.iter(|| {
            (0..BATCH).for_each(|n| make(&mut driver, n));
            let mut take = |chain: &Chain| Ok(Some(black_box(chain).writable().len() as u32));
            queue.serve(&memory, &mut chain, &mut take).unwrap();
            queue.notify(&memory).unwrap();
        });
    });
    group.finish();
}

fn virtqueue(criterion: &mut Criterion) {
    // The shape of a block request: header, 4 KiB of data, status.
    measure(criterion, "direct", |driver, _| {
        driver.add(&[(DATA, 16, false), (DATA + 0x1000, 4096, true), (DATA + 16, 1, true)]);
    });
    measure(criterion, "indirect", |driver, n| {
        let table = TABLES + u64::from(n) * 64;
        driver.descriptor_at(table, 0, DATA, 16, NEXT, 1);
        driver.descriptor_at(table, 1, DATA + 0x1000, 4096, NEXT | WRITE, 2);
        driver.descriptor_at(table, 2, DATA + 16, 1, WRITE, 0);
        driver.descriptor(n, table, 48, INDIRECT, 0);
        driver.publish(n);
    });
}

criterion_group!(benches, virtqueue);
criterion_main!(benches);
