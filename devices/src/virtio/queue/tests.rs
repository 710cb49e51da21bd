// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

use proptest::prelude::*;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EFD_NONBLOCK;

use super::*;
use crate::virtio::test_driver::{Driver, INDIRECT, NEXT, WRITE};
use crate::virtio::test_interrupt::RecordedInterrupt;

const SIZE: u16 = 8;
/// End of guest memory.
const END: u64 = 0x10000;
/// Somewhere above the rings.
const DATA: u64 = 0x2000;
const FEATURES: u64 = 1 << VIRTIO_RING_F_INDIRECT_DESC;
const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;

struct Setup {
    driver: Driver,
    queue: DeviceQueue,
    interrupt: Arc<RecordedInterrupt>,
    memory: GuestMemory,
}

fn setup(features: u64) -> Setup {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), END as usize)]).unwrap();
    let driver = Driver::new(&memory, 0x1000, SIZE);
    let interrupt = Arc::new(RecordedInterrupt::default());
    let active =
        ActiveQueue { index: 3, queue: driver.queue(), kick: EventFd::new(EFD_NONBLOCK).unwrap() };
    let queue = DeviceQueue::new(active, features, Arc::clone(&interrupt) as _);
    Setup { driver, queue, interrupt, memory }
}

impl Setup {
    fn pop(&mut self) -> Result<Option<Chain>, RingError> {
        let mut chain = Chain::default();
        Ok(self.queue.pop(&self.memory, &mut chain)?.then_some(chain))
    }

    /// The error of the next chain.
    fn refused(&mut self) -> RingError {
        self.pop().expect_err("the chain was accepted")
    }
}

fn segments(buffers: Buffers<'_>) -> Vec<(u64, u32)> {
    buffers.segments().map(|segment| (segment.address.0, segment.len)).collect()
}

#[test]
fn a_chain_comes_out_in_two_parts() {
    let mut s = setup(FEATURES);
    let head = s.driver.add(&[(DATA, 16, false), (DATA + 64, 4, false), (DATA + 128, 1, true)]);
    let chain = s.pop().unwrap().unwrap();
    assert_eq!(chain.head(), head);
    assert_eq!(segments(chain.readable()), [(DATA, 16), (DATA + 64, 4)]);
    assert_eq!(segments(chain.writable()), [(DATA + 128, 1)]);
    assert!(s.pop().unwrap().is_none());
}

#[test]
fn direct_descriptors_may_end_in_an_indirect_table() {
    let mut s = setup(FEATURES);
    let table = 0x3000;
    s.driver.descriptor(0, DATA, 16, NEXT, 1);
    // The write flag of an indirect descriptor is ignored.
    s.driver.descriptor(1, table, 3 * 16, INDIRECT | WRITE, 0);
    s.driver.descriptor_at(table, 0, DATA + 64, 8, NEXT, 2);
    s.driver.descriptor_at(table, 2, DATA + 128, 1, WRITE, 0);
    s.driver.publish(0);
    let chain = s.pop().unwrap().unwrap();
    assert_eq!(segments(chain.readable()), [(DATA, 16), (DATA + 64, 8)]);
    assert_eq!(segments(chain.writable()), [(DATA + 128, 1)]);
}

#[test]
fn a_chain_may_be_as_long_as_the_queue_and_no_longer() {
    for (buffers, accepted) in [(SIZE, true), (SIZE + 1, false)] {
        let mut s = setup(FEATURES);
        let table = 0x3000;
        for n in 0..buffers {
            let next = if n + 1 < buffers { NEXT } else { 0 };
            s.driver.descriptor_at(table, n, DATA, 1, next, n + 1);
        }
        s.driver.descriptor(0, table, u32::from(buffers) * 16, INDIRECT, 0);
        s.driver.publish(0);
        assert_eq!(s.pop().is_ok(), accepted, "{buffers} buffers");
    }
}

#[test]
fn the_cut_of_a_chain_does_not_matter() {
    let mut s = setup(FEATURES);
    s.memory.write_slice(b"abcdefgh", GuestAddress(DATA)).unwrap();
    s.driver.add(&[(DATA, 3, false), (DATA + 3, 0, false), (DATA + 3, 5, false)]);
    let chain = s.pop().unwrap().unwrap();
    assert_eq!(segments(chain.readable()), [(DATA, 3), (DATA + 3, 5)]);
    let (first, rest) = chain.readable().split_at(4).unwrap();
    let (mut four, mut all) = ([0; 4], [0; 4]);
    first.read(&s.memory, &mut four).unwrap();
    rest.read(&s.memory, &mut all).unwrap();
    assert_eq!((&four, &all), (b"abcd", b"efgh"));
    assert_eq!(segments(rest), [(DATA + 4, 4)]);
    assert!(rest.split_at(4).unwrap().1.is_empty());
    assert!(rest.split_at(5).is_none());
}

#[test]
fn writes_stop_at_the_end_of_the_chain() {
    let mut s = setup(FEATURES);
    s.driver.add(&[(DATA, 2, true), (DATA + 8, 1, true)]);
    let chain = s.pop().unwrap().unwrap();
    assert_eq!(chain.writable().write(&s.memory, b"abcd").unwrap(), 3);
    let mut data = [0; 10];
    s.memory.read_slice(&mut data, GuestAddress(DATA)).unwrap();
    assert_eq!(&data, b"ab\0\0\0\0\0\0c\0");
}

#[test]
fn available_index_must_not_jump() {
    let mut s = setup(FEATURES);
    s.driver.set_available_index(SIZE + 1);
    let error = s.refused();
    assert_eq!(error, RingError::AvailableIndex { available: SIZE + 1, next: 0, size: SIZE });
}

#[test]
fn available_index_must_not_go_back() {
    let mut s = setup(FEATURES);
    s.driver.add(&[(DATA, 1, false)]);
    s.pop().unwrap().unwrap();
    s.driver.set_available_index(0);
    assert!(matches!(s.refused(), RingError::AvailableIndex { available: 0, next: 1, .. }));
}

#[test]
fn a_head_or_next_outside_of_the_table_is_refused() {
    let mut s = setup(FEATURES);
    s.driver.publish(SIZE);
    assert_eq!(s.refused(), RingError::DescriptorIndex { index: SIZE, entries: 8 });
    s.driver.descriptor(0, DATA, 1, NEXT, 0xffff);
    s.driver.publish(0);
    assert_eq!(s.refused(), RingError::DescriptorIndex { index: 0xffff, entries: 8 });
}

#[test]
fn a_loop_is_refused() {
    let mut s = setup(FEATURES);
    s.driver.descriptor(0, DATA, 1, NEXT, 1);
    s.driver.descriptor(1, DATA, 1, NEXT, 0);
    s.driver.publish(0);
    assert_eq!(s.refused(), RingError::ChainLength { head: 0, size: SIZE });
}

#[test]
fn a_chain_of_more_than_4_gib_is_refused() {
    let mut chain = Chain::default();
    for _ in 0..2 {
        chain.push(0, &Descriptor::new(0, 1 << 31, 0, 0)).unwrap();
    }
    let error = chain.push(0, &Descriptor::new(0, 1, WRITE, 0)).unwrap_err();
    assert_eq!(error, RingError::ChainBytes { head: 0 });
}

#[test]
fn readable_behind_writable_is_refused() {
    let mut s = setup(FEATURES);
    s.driver.add(&[(DATA, 1, true), (DATA, 1, false)]);
    assert_eq!(s.refused(), RingError::Order { index: 1 });
}

#[test]
fn buffers_outside_of_memory_are_refused() {
    for address in [END - 1, END, u64::MAX - 1, u64::MAX] {
        let mut s = setup(FEATURES);
        s.driver.add(&[(address, 2, false)]);
        assert_eq!(s.refused(), RingError::Memory { what: "buffer", address, len: 2 });
    }
}

#[test]
fn wrong_indirect_tables_are_refused() {
    let table = 0x3000;
    for (flags, len, part) in [
        (INDIRECT, 0, "positive multiple"),
        (INDIRECT, 17, "positive multiple"),
        (INDIRECT | NEXT, 16, "next descriptor"),
    ] {
        let mut s = setup(FEATURES);
        s.driver.descriptor(0, table, len, flags, 1);
        s.driver.publish(0);
        let text = s.refused().to_string();
        assert!(text.contains(part), "{text}");
    }
    let mut s = setup(FEATURES);
    s.driver.descriptor_at(table, 0, table, 16, INDIRECT, 0);
    s.driver.descriptor(0, table, 16, INDIRECT, 0);
    s.driver.publish(0);
    assert!(s.refused().to_string().contains("itself in an indirect table"));

    let mut s = setup(0);
    s.driver.descriptor(0, table, 16, INDIRECT, 0);
    s.driver.publish(0);
    assert!(s.refused().to_string().contains("not negotiated"));

    for address in [END, u64::MAX] {
        let mut s = setup(FEATURES);
        s.driver.descriptor(0, address, 32, INDIRECT, 0);
        s.driver.publish(0);
        assert!(matches!(s.refused(), RingError::Memory { what: "descriptor table", .. }));
    }
}

#[test]
fn rings_outside_of_memory_are_refused() {
    let mut s = setup(FEATURES);
    s.queue.active.queue.try_set_avail_ring_address(GuestAddress(END)).unwrap();
    assert!(matches!(s.refused(), RingError::Memory { what: "available ring", .. }));

    let mut s = setup(FEATURES);
    s.queue.active.queue.try_set_used_ring_address(GuestAddress(END)).unwrap();
    s.driver.add(&[(DATA, 1, true)]);
    let served = s.queue.serve(&s.memory, &mut Chain::default(), |_| Ok(Some(0)));
    assert!(matches!(served, Err(RingError::Memory { what: "used ring", .. })));
}

#[test]
fn a_failed_queue_asks_for_one_reset() {
    let mut s = setup(FEATURES);
    for _ in 0..2 {
        s.queue.fail(&RingError::ChainBytes { head: 0 });
    }
    assert!(s.queue.has_failed());
    assert_eq!(s.interrupt.resets(), 1);
}

/// Serve everything, using each chain with 0 bytes written, and notify once.
fn serve(s: &mut Setup) -> usize {
    let mut served = 0;
    let mut chain = Chain::default();
    s.queue
        .serve(&s.memory, &mut chain, |_| {
            served += 1;
            Ok(Some(0))
        })
        .unwrap();
    s.queue.notify(&s.memory).unwrap();
    served
}

#[test]
fn a_batch_is_announced_once() {
    let mut s = setup(FEATURES);
    for _ in 0..3 {
        s.driver.add(&[(DATA, 1, true)]);
    }
    assert_eq!(serve(&mut s), 3);
    assert_eq!(s.interrupt.queues(), [3]);
    assert_eq!(serve(&mut s), 0);
    assert_eq!(s.interrupt.queues(), [3], "nothing was used");
    assert_eq!((0..3).map_while(|_| s.driver.used()).count(), 3);
}

#[test]
fn a_driver_that_polls_is_not_interrupted() {
    let mut s = setup(FEATURES);
    s.driver.set_available_flags(1);
    s.driver.add(&[(DATA, 1, true)]);
    assert_eq!(serve(&mut s), 1);
    assert!(s.interrupt.queues().is_empty());
}

#[test]
fn event_idx_is_honoured_on_both_sides() {
    let mut s = setup(FEATURES | EVENT_IDX);
    s.driver.set_used_event(1);
    s.driver.add(&[(DATA, 1, true)]);
    serve(&mut s);
    assert!(s.interrupt.queues().is_empty(), "the driver asked for the second buffer");
    assert_eq!(s.driver.available_event(), 1);
    s.driver.add(&[(DATA, 1, true)]);
    serve(&mut s);
    assert_eq!(s.interrupt.queues(), [3]);
    assert_eq!(s.driver.available_event(), 2);
}

#[test]
fn buffers_that_come_while_serving_are_not_missed() {
    let mut s = setup(FEATURES | EVENT_IDX);
    s.driver.add(&[(DATA, 1, true)]);
    let (mut served, driver) = (0, &mut s.driver);
    s.queue
        .serve(&s.memory, &mut Chain::default(), |_| {
            served += 1;
            if served < 5 {
                driver.add(&[(DATA, 1, true)]);
            }
            Ok(Some(0))
        })
        .unwrap();
    assert_eq!(served, 5);
}

#[test]
fn an_endless_driver_does_not_hold_the_thread() {
    let mut s = setup(FEATURES);
    s.driver.add(&[(DATA, 1, true)]);
    let (mut served, driver) = (0, &mut s.driver);
    s.queue
        .serve(&s.memory, &mut Chain::default(), |_| {
            served += 1;
            driver.add(&[(DATA, 1, true)]);
            Ok(Some(0))
        })
        .unwrap();
    assert_eq!(served, BATCH);
    assert_eq!(s.queue.kick().read().unwrap(), 1, "the queue comes back to what is left");
}

proptest! {
    /// Whatever is in the tables, a chain is refused or lies in memory, and is no longer than the queue.
    #[test]
    fn random_tables_never_give_a_bad_chain(
        direct in prop::collection::vec(any_descriptor(), usize::from(SIZE)),
        indirect in prop::collection::vec(any_descriptor(), usize::from(SIZE)),
        heads in prop::collection::vec(0..SIZE + 2, 1..8),
        features in prop::sample::select(vec![0, FEATURES, FEATURES | EVENT_IDX]),
    ) {
        let mut s = setup(features);
        for (table, descriptors) in [(0x1000, direct), (TABLE, indirect)] {
            for (index, (address, len, flags, next)) in (0..).zip(descriptors) {
                s.driver.descriptor_at(table, index, address, len, flags, next);
            }
        }
        for head in heads {
            s.driver.publish(head);
        }
        let memory = s.memory.clone();
        while let Ok(Some(chain)) = s.pop() {
            let all: Vec<_> =
                chain.readable().segments().chain(chain.writable().segments()).collect();
            prop_assert!(all.len() <= usize::from(SIZE));
            for segment in all {
                prop_assert!(memory.check_range(segment.address, segment.len as usize));
            }
        }
    }
}

const TABLE: u64 = 0x3000;

/// Address, length, flags and next of a descriptor; mostly near the edges of what is allowed.
fn any_descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let address = prop_oneof![Just(DATA), Just(TABLE), 0..END, END - 32..END + 32, any::<u64>()];
    let len = prop_oneof![0..64u32, Just(16), Just(u32::from(SIZE) * 16), any::<u32>()];
    (address, len, 0..8u16, 0..SIZE + 1)
}

#[test]
fn waiting_asks_for_a_kick_and_a_chain_can_be_put_back() {
    let mut s = setup(FEATURES | EVENT_IDX);
    let mut chain = Chain::default();
    let first = s.driver.add(&[(DATA, 16, true)]);
    assert!(s.queue.pop_or_wait(&s.memory, &mut chain).unwrap());
    s.queue.put_back();
    assert!(s.queue.pop_or_wait(&s.memory, &mut chain).unwrap());
    assert_eq!(chain.head(), first);
    assert_eq!(s.driver.available_event(), 0);
    assert!(!s.queue.pop_or_wait(&s.memory, &mut chain).unwrap());
    assert_eq!(s.driver.available_event(), 1);
}

#[test]
fn chains_that_are_used_together_interrupt_whoever_waits_for_one_of_them() {
    // The driver waits for the first, the middle, the last and the next one of three.
    for (event, interrupts) in [(0, 1), (1, 1), (2, 1), (3, 0)] {
        let mut s = setup(FEATURES | EVENT_IDX);
        s.driver.set_used_event(event);
        let mut chains = Vec::new();
        for n in 1..=3 {
            s.driver.add(&[(DATA, 16, true)]);
            let mut chain = Chain::default();
            assert!(s.queue.pop(&s.memory, &mut chain).unwrap());
            chains.push((chain.head(), n));
        }
        s.queue.add_all_used(&s.memory, &chains).unwrap();
        s.queue.notify(&s.memory).unwrap();
        s.queue.notify(&s.memory).unwrap();
        assert_eq!(s.interrupt.queues().len(), interrupts, "waiting for {event}");
        for (head, written) in chains {
            assert_eq!(s.driver.used(), Some((head.into(), written)));
        }
        assert_eq!(s.driver.used(), None);
    }
}

#[test]
fn a_device_may_stop_before_a_chain_that_it_cannot_take() {
    let mut s = setup(FEATURES);
    for _ in 0..3 {
        s.driver.add(&[(DATA, 16, true)]);
    }
    let mut left = 2;
    let mut chain = Chain::default();
    let take = |_: &Chain| {
        left -= 1;
        Ok(if left < 0 { Taken::Refused } else { Taken::Used(0) })
    };
    s.queue.serve_while(&s.memory, &mut chain, take).unwrap();
    assert_eq!(s.driver.used().zip(s.driver.used()).map(|(a, b)| (a.0, b.0)), Some((0, 1)));
    assert_eq!(s.driver.used(), None);
    assert!(s.queue.pop(&s.memory, &mut chain).unwrap());
    assert_eq!(chain.head(), 2);
}
