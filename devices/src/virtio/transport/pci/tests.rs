// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! A driver that does what Linux does, a device that does next to nothing, and guests that do their worst.

use parking_lot::Mutex;
use proptest::prelude::*;
use virtio_queue::QueueT;
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::memory::GuestMemory;
use crate::pci::testing::{FakeDoorbells, FakeLine, FakeMsi, REQUESTER};
use crate::virtio::transport::session::feature;
use crate::virtio::{ActivateError, Activation, ActiveQueue};

const QUEUE_SIZES: [u16; 2] = [8, 16];
const DEVICE_FEATURE: u64 = 1 << 5;
const BAR: u64 = 0xC000_0000;

/// What the device and its test share.
#[derive(Default)]
struct Shared {
    active: Option<Activation>,
    stopped: u32,
    refuse: bool,
    config: [u8; 4],
}

struct Toy(Arc<Mutex<Shared>>);

impl VirtioDevice for Toy {
    fn device_type(&self) -> u32 {
        4
    }
    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }
    fn features(&self) -> u64 {
        DEVICE_FEATURE
    }
    fn config_read(&self, offset: u64, data: &mut [u8]) {
        let shared = self.0.lock();
        let config = shared.config.iter().skip(offset as usize);
        data.iter_mut().zip(config).for_each(|(to, from)| *to = *from);
    }
    fn config_write(&mut self, offset: u64, data: &[u8]) {
        let mut shared = self.0.lock();
        let config = shared.config.iter_mut().skip(offset as usize);
        config.zip(data).for_each(|(to, from)| *to = *from);
    }
    fn activate(&mut self, context: Activation) -> Result<(), ActivateError> {
        let mut shared = self.0.lock();
        if shared.refuse {
            let source = std::io::ErrorKind::NotFound.into();
            return Err(ActivateError { attempted: "open nothing".into(), source });
        }
        shared.active = Some(context);
        Ok(())
    }
    fn deactivate(&mut self) -> Vec<ActiveQueue> {
        let mut shared = self.0.lock();
        let Some(active) = shared.active.take() else { return Vec::new() };
        shared.stopped += 1;
        active.queues
    }
}

struct Driver {
    function: VirtioPci,
    shared: Arc<Mutex<Shared>>,
    msi: Arc<FakeMsi>,
    line: Arc<FakeLine>,
    doorbells: Arc<FakeDoorbells>,
}

/// Offsets in the virtio BAR.
const STATUS: u64 = 20;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;

impl Driver {
    fn new() -> Self {
        let shared = Arc::new(Mutex::new(Shared::default()));
        let (msi, line) = (Arc::new(FakeMsi::default()), Arc::new(FakeLine::default()));
        let doorbells = Arc::new(FakeDoorbells::default());
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
        let wiring = Wiring {
            vectors: 0,
            memory: GuestMemoryHandle::new(memory),
            msi: Arc::clone(&msi) as Arc<dyn MsiSink>,
            requester: REQUESTER,
            intx: IrqLine::new(Arc::clone(&line) as Arc<dyn crate::irq::IrqSink>),
            doorbells: Arc::clone(&doorbells) as Arc<dyn DoorbellSink>,
        };
        let mut function = VirtioPci::new(Box::new(Toy(Arc::clone(&shared))), wiring);
        function.bar_moved(layout::VIRTIO_BAR, Some(BAR));
        Self { function, shared, msi, line, doorbells }
    }

    fn read<const N: usize>(&mut self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        assert_eq!(self.function.bar_read(layout::VIRTIO_BAR, offset, &mut data), Access::Done);
        data
    }

    fn read8(&mut self, offset: u64) -> u8 {
        self.read::<1>(offset)[0]
    }

    fn read16(&mut self, offset: u64) -> u16 {
        u16::from_le_bytes(self.read(offset))
    }

    fn read32(&mut self, offset: u64) -> u32 {
        u32::from_le_bytes(self.read(offset))
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        assert_eq!(self.function.bar_write(layout::VIRTIO_BAR, offset, data), Access::Done);
    }

    fn write16(&mut self, offset: u64, value: u16) {
        self.write(offset, &value.to_le_bytes());
    }

    fn write32(&mut self, offset: u64, value: u32) {
        self.write(offset, &value.to_le_bytes());
    }

    fn add_status(&mut self, bit: u8) -> u8 {
        let status = self.read8(STATUS) | bit;
        self.write(STATUS, &[status]);
        self.read8(STATUS)
    }

    fn negotiate(&mut self, features: u64) -> u8 {
        self.add_status(status::ACKNOWLEDGE);
        self.add_status(status::DRIVER);
        for (select, half) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.write32(8, select);
            self.write32(12, half);
        }
        self.add_status(status::FEATURES_OK)
    }

    fn set_up_queue(&mut self, index: u16, size: u16, descriptors: u64) {
        self.write16(22, index);
        self.write16(24, size);
        for (offset, distance) in [(32, 0u64), (40, 0x1000), (48, 0x2000)] {
            let address = descriptors.wrapping_add(distance);
            self.write32(offset, address as u32);
            self.write32(offset + 4, (address >> 32) as u32);
        }
        self.write16(28, 1);
    }

    /// As far as Linux comes with one queue.
    fn start(&mut self) {
        self.negotiate(feature::VERSION_1 | feature::EVENT_IDX);
        self.set_up_queue(1, 8, 0x1000);
        let status = self.add_status(status::DRIVER_OK);
        assert_eq!(status, 15);
    }

    /// MSI-X on; each vector sends its number.
    fn enable_msix(&mut self) {
        for vector in 0..3u32 {
            for (offset, value) in [(0, 0xFEE0_0000), (8, vector), (12, 0)] {
                let offset = u64::from(vector) * 16 + offset;
                let value = u32::to_le_bytes(value);
                let access = self.function.bar_write(layout::MSIX_BAR, offset, &value);
                assert_eq!(access, Access::Done);
            }
        }
        let at = self.function.msix_capability + msix::control::OFFSET;
        self.function.config_write(at, &msix::control::ENABLE.to_le_bytes());
    }

    fn interrupt(&self) -> Arc<dyn VirtioInterrupt> {
        self.function.interrupt()
    }

    fn line(&self) -> bool {
        *self.line.0.lock()
    }

    fn active<T>(&self, look: impl FnOnce(&mut Activation) -> T) -> T {
        look(self.shared.lock().active.as_mut().unwrap())
    }
}

#[test]
fn capabilities_lead_to_all_structures() {
    let mut driver = Driver::new();
    let mut config = |offset: u16| {
        let mut data = [0; 4];
        driver.function.config_read(offset, &mut data);
        u32::from_le_bytes(data)
    };
    assert_eq!(config(0), 0x1044_1AF4);
    let mut found = Vec::new();
    let mut at = config(0x34) as u16;
    while at != 0 {
        let header = config(at).to_le_bytes();
        found.push((header[0], header[3], config(at + 4), config(at + 8), header[2]));
        at = header[1].into();
    }
    let virtio = [
        (9, 1, 4, 0x0000, 16),
        (9, 3, 4, 0x1000, 16),
        (9, 4, 4, 0x2000, 16),
        (9, 2, 4, 0x3000, 20),
        (9, 5, 0, 0, 20),
    ];
    assert_eq!(found[0].0, 0x11);
    assert_eq!(found[1..], virtio);
    assert_eq!(driver.read16(18), 2);
}

#[test]
fn features_are_agreed_on_or_refused() {
    let mut driver = Driver::new();
    let offered = [0u32, 1, 2].map(|select| {
        driver.write32(0, select);
        driver.read32(4)
    });
    let all = DEVICE_FEATURE | feature::INDIRECT_DESC | feature::EVENT_IDX;
    assert_eq!(offered, [all as u32, 1, 0]);
    for refused in [0, DEVICE_FEATURE, feature::VERSION_1 | 1 << 6, feature::VERSION_1 | 1 << 40] {
        let mut driver = Driver::new();
        let status = driver.negotiate(refused);
        assert_eq!(status & status::FEATURES_OK, 0, "{refused:#x}");
        assert_eq!(driver.add_status(status::DRIVER_OK) & status::DRIVER_OK, 0);
        assert!(driver.shared.lock().active.is_none());
    }
    assert_eq!(driver.negotiate(feature::VERSION_1 | DEVICE_FEATURE), 11);
    driver.write32(8, 0);
    driver.write32(12, 0);
    assert_eq!(driver.read32(12), DEVICE_FEATURE as u32, "no change after FEATURES_OK");
}

#[test]
fn driver_ok_hands_over_the_enabled_queues() {
    let mut driver = Driver::new();
    driver.start();
    driver.active(|active| {
        assert_eq!(active.features, feature::VERSION_1 | feature::EVENT_IDX);
        assert_eq!(active.queues.len(), 1);
        let ActiveQueue { index, queue, .. } = &active.queues[0];
        assert_eq!((*index, queue.size(), queue.ready()), (1, 8, true));
        assert!(queue.event_idx_enabled());
        assert_eq!(
            (queue.desc_table(), queue.avail_ring(), queue.used_ring()),
            (0x1000, 0x2000, 0x3000)
        );
    });
    assert_eq!((driver.read16(24), driver.read16(28), driver.read16(30)), (8, 1, 1));
    driver.write16(24, 2);
    assert_eq!(driver.read16(24), 8, "an enabled queue does not change");
    driver.set_up_queue(0, 8, 0x4000);
    driver.write16(22, 0);
    assert_eq!(driver.read16(28), 0, "no queue is added to a running device");
    driver.write16(22, 7);
    assert_eq!((driver.read16(24), driver.read16(26)), (0, 0xffff), "there is no such queue");
}

#[test]
fn kicks_arrive_by_doorbell_or_by_bus() {
    let mut driver = Driver::new();
    driver.write16(NOTIFY + 4, 1);
    driver.start();
    assert_eq!(*driver.doorbells.0.lock(), [BAR + NOTIFY + 4]);
    driver.write16(NOTIFY + 4, 1);
    driver.write16(NOTIFY, 0);
    assert_eq!(driver.active(|active| active.queues[0].kick.read().unwrap()), 1);
    driver.function.bar_moved(layout::VIRTIO_BAR, Some(0x80_0000_0000));
    assert_eq!(*driver.doorbells.0.lock(), [0x80_0000_0000 + NOTIFY + 4]);
    driver.function.bar_moved(layout::VIRTIO_BAR, None);
    assert!(driver.doorbells.0.lock().is_empty());
    driver.function.bar_moved(layout::VIRTIO_BAR, Some(BAR));
    driver.write(STATUS, &[0]);
    assert!(driver.doorbells.0.lock().is_empty());
}

#[test]
fn reset_brings_everything_back_and_the_device_starts_again() {
    let mut driver = Driver::new();
    driver.enable_msix();
    driver.write16(16, 0);
    driver.start();
    driver.interrupt().needs_reset();
    driver.write(STATUS, &[0]);
    assert_eq!((driver.read8(STATUS), driver.shared.lock().stopped), (0, 1));
    driver.write16(22, 1);
    assert_eq!((driver.read16(24), driver.read16(28), driver.read16(16)), (16, 0, 0xffff));
    assert_eq!((driver.read32(32), driver.read32(12)), (0, 0));
    driver.start();
    driver.function.reset();
    assert_eq!((driver.read8(STATUS), driver.shared.lock().stopped), (0, 2));
    assert!(!driver.function.msix.is_enabled());
}

#[test]
fn with_msix_each_queue_has_its_vector() {
    let mut driver = Driver::new();
    driver.enable_msix();
    driver.write16(16, 0);
    driver.write16(22, 1);
    driver.write16(26, 2);
    assert_eq!(driver.read16(26), 2);
    driver.start();
    let interrupt = driver.interrupt();
    interrupt.queue(1);
    interrupt.queue(0);
    assert_eq!(driver.msi.take(), [2], "queue 0 has no vector");
    let generation = driver.read8(21);
    interrupt.config();
    assert_eq!(driver.msi.take(), [0]);
    assert_ne!(driver.read8(21), generation);
    driver.write16(26, 3);
    assert_eq!(driver.read16(26), 0xffff, "there is no such vector");
    assert!(!driver.line());
}

#[test]
fn without_msix_the_pin_follows_the_isr() {
    let mut driver = Driver::new();
    driver.start();
    let interrupt = driver.interrupt();
    interrupt.queue(0);
    interrupt.config();
    assert!(driver.line());
    let mut status = [0; 2];
    driver.function.config_read(config::offset::STATUS, &mut status);
    assert_eq!(u16::from_le_bytes(status) & config::status::INTERRUPT, config::status::INTERRUPT);
    let disable = command::INTERRUPT_DISABLE.to_le_bytes();
    driver.function.config_write(config::offset::COMMAND, &disable);
    assert!(!driver.line());
    driver.function.config_write(config::offset::COMMAND, &[0, 0]);
    assert!(driver.line());
    assert_eq!((driver.read8(ISR), driver.line(), driver.read8(ISR)), (3, false, 0));
    interrupt.queue(0);
    driver.enable_msix();
    assert!(!driver.line(), "messages replace the pin");
    assert!(driver.msi.take().is_empty());
}

#[test]
fn a_queue_that_cannot_work_needs_a_reset() {
    for (size, descriptors) in [
        (0, 0x1000),
        (3, 0x1000),
        (32, 0x1000),
        (8, 0x1001),
        (8, 0xF000),
        (8, 0x1_0000_0000),
        (8, !0xfff),
    ] {
        let mut driver = Driver::new();
        driver.enable_msix();
        driver.write16(16, 1);
        driver.negotiate(feature::VERSION_1);
        driver.set_up_queue(1, size, descriptors);
        let status = driver.add_status(status::DRIVER_OK);
        assert_ne!(status & status::NEEDS_RESET, 0, "{size} {descriptors:#x}");
        assert!(driver.shared.lock().active.is_none());
        assert_eq!(driver.msi.take(), [1], "the driver is told");
        driver.write(STATUS, &[0]);
        assert_eq!(driver.read8(STATUS), 0);
        driver.start();
    }
}

#[test]
fn a_device_that_cannot_start_needs_a_reset() {
    let mut driver = Driver::new();
    driver.shared.lock().refuse = true;
    driver.negotiate(feature::VERSION_1);
    driver.set_up_queue(0, 8, 0x1000);
    let status = driver.add_status(status::DRIVER_OK);
    assert_ne!(status & status::NEEDS_RESET, 0);
    assert!(driver.doorbells.0.lock().is_empty());
}

#[test]
fn nobody_is_interrupted_before_the_driver_is_ready() {
    let mut driver = Driver::new();
    let interrupt = driver.interrupt();
    interrupt.config();
    assert!(!driver.line());
    driver.start();
    interrupt.config();
    assert!(driver.line());
}

#[test]
fn an_eventfd_stands_for_a_vector_and_not_for_a_pin() {
    let mut driver = Driver::new();
    let refused = driver.interrupt().queue_eventfd(0).unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::Unsupported);
    driver.enable_msix();
    driver.write16(22, 0);
    driver.write16(26, 1);
    let eventfd: EventFd = driver.interrupt().queue_eventfd(0).unwrap();
    eventfd.write(1).unwrap();
    let data = driver.msi.routes.lock()[0].map(|message| message.data);
    assert_eq!(data, Some(1));
    driver.interrupt().queue_eventfd(1).unwrap();
    assert_eq!(driver.msi.routes.lock().len(), 1, "a queue without vector needs no route");
}

#[test]
fn bars_can_be_reached_through_configuration_space() {
    let mut driver = Driver::new();
    let window = driver.function.window_capability;
    let config_write32 = |driver: &mut Driver, offset: u16, value: u32| {
        driver.function.config_write(window + offset, &value.to_le_bytes());
    };
    config_write32(&mut driver, 4, layout::VIRTIO_BAR.into());
    config_write32(&mut driver, 8, DEVICE as u32);
    config_write32(&mut driver, 12, 2);
    config_write32(&mut driver, 16, 0xDDCC_BBAA);
    assert_eq!(driver.shared.lock().config, [0xAA, 0xBB, 0, 0]);
    driver.shared.lock().config[0] = 0x55;
    let mut data = [0; 4];
    driver.function.config_read(window + 16, &mut data);
    assert_eq!(data, [0x55, 0xBB, 0, 0]);
    config_write32(&mut driver, 12, 3);
    config_write32(&mut driver, 16, 0);
    assert_eq!(driver.shared.lock().config, [0x55, 0xBB, 0, 0], "no access has three bytes");
}

#[test]
fn device_configuration_is_passed_on() {
    let mut driver = Driver::new();
    driver.write(DEVICE + 1, &[7]);
    assert_eq!(driver.read::<4>(DEVICE), [0, 7, 0, 0]);
    assert_eq!(driver.read::<4>(DEVICE + 0x100), [0; 4]);
}

proptest! {
    #[test]
    fn no_access_panics(
        accesses in prop::collection::vec(
            (prop::sample::select(vec![0u8, 1, 4]), any::<bool>(), 0u64..0x4100, 0usize..9, any::<[u8; 8]>()),
            0..200),
        common in prop::collection::vec((0u64..64, 1usize..9, any::<[u8; 8]>()), 0..100),
        statuses in prop::collection::vec(any::<u8>(), 0..20),
    ) {
        let mut driver = Driver::new();
        let interrupt = driver.interrupt();
        let mut statuses = statuses.into_iter().cycle();
        for (offset, len, mut data) in common {
            let _ = driver.function.bar_write(layout::VIRTIO_BAR, offset, &data[..len]);
            let _ = driver.function.bar_read(layout::VIRTIO_BAR, offset, &mut data[..len]);
            driver.function.write_status(statuses.next().unwrap_or(0));
            interrupt.queue(offset as u16);
            interrupt.config();
        }
        for (bar, is_config, offset, len, mut data) in accesses {
            if is_config {
                driver.function.config_write(offset as u16, &data[..len.min(4)]);
                driver.function.config_read(offset as u16, &mut data[..len.min(4)]);
            } else {
                let _ = driver.function.bar_write(bar, offset, &data[..len]);
                let _ = driver.function.bar_read(bar, offset, &mut data[..len]);
            }
            interrupt.needs_reset();
        }
        driver.function.reset();
        prop_assert_eq!(driver.read8(STATUS), 0);
        prop_assert!(!driver.line());
    }
}
