// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What a frame costs the host, each way: from the kick or the arrival to the interrupt, through an I/O thread,
//! over a pair of sockets, so that no bridge is measured.

// A benchmark that cannot go on should stop.
#![allow(clippy::unwrap_used)]

#[path = "../src/virtio/test_driver.rs"]
mod test_driver;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use ecr_devices::backend::tap::{HEADER_SIZE, NetBackend};
use ecr_devices::io_thread::IoThread;
use ecr_devices::memory::{GuestMemory, GuestMemoryHandle};
use ecr_devices::virtio::net::{Net, NetConfig};
use ecr_devices::virtio::{Activation, ActiveQueue, VirtioDevice, VirtioInterrupt};
use test_driver::Driver;
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const QUEUE_SIZE: u16 = 256;
const MERGEABLE: u64 = 1 << 15;
const DATA: u64 = 0x10_0000;
/// What Linux gives for each buffer, and more than a frame.
const BUFFER: u32 = 4096;

#[derive(Debug)]
struct Cable(UnixDatagram);

impl NetBackend for Cable {
    fn offloads(&self) -> u32 {
        0
    }
    fn set_offloads(&self, _offloads: u32) -> io::Result<()> {
        Ok(())
    }
    fn set_enabled(&self, _enabled: bool) -> io::Result<()> {
        Ok(())
    }
}

impl AsRawFd for Cable {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

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
    fn queue_eventfd(&self, _index: u16) -> io::Result<EventFd> {
        EventFd::new(EFD_NONBLOCK)
    }
}

/// A device, the benchmark as its driver, and the host's end.
struct Machine {
    device: Net,
    queues: [Driver; 2],
    kicks: [EventFd; 2],
    host: UnixDatagram,
    interrupts: mpsc::Receiver<()>,
    _thread: IoThread,
}

impl Machine {
    fn new() -> Self {
        let (end, host) = UnixDatagram::pair().unwrap();
        end.set_nonblocking(true).unwrap();
        let thread = IoThread::spawn("bench-io0", Box::new(|why| panic!("{why}"))).unwrap();
        let config = NetConfig {
            mac: [2, 0, 0, 0, 0, 1],
            mtu: None,
            queue_size: QUEUE_SIZE,
            backends: vec![Arc::new(Cable(end))],
        };
        let mut device = Net::new(config, vec![thread.handle()]).unwrap();
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 8 << 20)]).unwrap();
        let queues = [0x1000, 0x8000].map(|base| Driver::new(&memory, base, QUEUE_SIZE));
        let kicks = [(); 2].map(|()| EventFd::new(EFD_NONBLOCK).unwrap());
        let active = (0..).zip(queues.iter().zip(&kicks)).map(|(index, (driver, kick))| {
            ActiveQueue { index, queue: driver.queue(), kick: kick.try_clone().unwrap() }
        });
        let (wake, interrupts) = mpsc::channel();
        device
            .activate(Activation {
                memory: GuestMemoryHandle::new(memory),
                features: MERGEABLE,
                queues: active.collect(),
                interrupt: Arc::new(Wake(wake)),
            })
            .unwrap();
        Self { device, queues, kicks, host, interrupts, _thread: thread }
    }

    /// Wait until `count` chains of a queue are used.
    fn wait(&mut self, queue: usize, count: usize) {
        let mut left = count;
        while left > 0 {
            match self.queues[queue].used() {
                Some(_) => left -= 1,
                None => self.interrupts.recv().unwrap(),
            }
        }
    }

    /// Send `count` frames of `len` bytes to the host, started by one kick.
    fn transmit(&mut self, count: usize, len: u32) {
        for n in 0..count as u64 {
            self.queues[1].add(&[(DATA + n * u64::from(BUFFER), len, false)]);
        }
        self.kicks[1].write(1).unwrap();
        let mut frame = [0; BUFFER as usize];
        for _ in 0..count {
            self.host.recv(&mut frame).unwrap();
        }
        self.wait(1, count);
    }

    /// Have `count` frames of `len` bytes from the host.
    fn receive(&mut self, count: usize, len: usize) {
        for n in 0..count as u64 {
            self.queues[0].add(&[(DATA + n * u64::from(BUFFER), BUFFER, true)]);
        }
        self.kicks[0].write(1).unwrap();
        let frame = [0; BUFFER as usize];
        for _ in 0..count {
            self.host.send(&frame[..len]).unwrap();
        }
        self.wait(0, count);
    }
}

fn net(criterion: &mut Criterion) {
    for depth in [1, 64] {
        for len in [64, 1514] {
            let len = HEADER_SIZE + len;
            let mut machine = Machine::new();
            let mut group = criterion.benchmark_group("net");
            group.measurement_time(Duration::from_secs(3));
            group.throughput(Throughput::Elements(depth as u64));
            group.bench_function(format!("tx/{len}/depth-{depth}"), |bench| {
                bench.iter(|| machine.transmit(depth, len as u32));
            });
            group.bench_function(format!("rx/{len}/depth-{depth}"), |bench| {
                bench.iter(|| machine.receive(depth, len));
            });
            group.finish();
            machine.device.deactivate();
        }
    }
}

criterion_group!(benches, net);
criterion_main!(benches);
