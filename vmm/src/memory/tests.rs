// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

use parking_lot::Mutex;
use vm_memory::Bytes;

use super::*;
use crate::hypervisor::Hypervisor;
use crate::hypervisor::fake::{Fake, FakeVm};

const PAGE: u64 = 4096;

fn manager() -> (MemoryManager, Arc<FakeVm>) {
    let fake = Fake::new();
    let manager = MemoryManager::new(fake.create_vm(46).unwrap());
    (manager, fake.vm().unwrap())
}

fn anonymous() -> RamBacking {
    RamBacking { shared: false, hugepages: None, prealloc: false, path: None }
}

fn slots(vm: &FakeVm) -> Vec<(u64, u64, bool)> {
    vm.memory_slots().iter().map(|slot| (slot.guest, slot.size, slot.read_only)).collect()
}

/// Refuses the region at an address; writes down what it hears.
struct Listener {
    refuses: Option<u64>,
    heard: Arc<Mutex<Vec<String>>>,
}

impl MemoryListener for Listener {
    fn name(&self) -> &'static str {
        "a listener"
    }
    fn add(
        &mut self,
        region: &MemoryRegion,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        if self.refuses == Some(region.guest.0) {
            return Err("no room".into());
        }
        self.heard.lock().push(format!("+{:x}", region.guest.0));
        Ok(())
    }
    fn remove(&mut self, region: &MemoryRegion) {
        self.heard.lock().push(format!("-{:x}", region.guest.0));
    }
}

fn listener(refuses: Option<u64>) -> (Box<Listener>, Arc<Mutex<Vec<String>>>) {
    let heard = Arc::default();
    (Box::new(Listener { refuses, heard: Arc::clone(&heard) }), heard)
}

const TWO: [Range; 2] = [Range { base: 0, size: 2 * PAGE }, Range { base: 0x10_0000, size: PAGE }];

#[test]
fn every_region_has_a_slot_until_the_manager_goes() {
    let (mut manager, vm) = manager();
    manager.add_ram(&TWO, &anonymous()).unwrap();
    assert_eq!(slots(&vm), [(0, 2 * PAGE, false), (0x10_0000, PAGE, false)]);
    manager.view().write_obj(7u32, GuestAddress(0x10_0000)).unwrap();
    drop(manager);
    assert_eq!(slots(&vm), []);
}

#[test]
fn a_refusal_takes_everything_back() {
    let (mut manager, vm) = manager();
    let (first, first_heard) = listener(None);
    let (second, second_heard) = listener(Some(0x10_0000));
    manager.subscribe(first).unwrap();
    manager.subscribe(second).unwrap();
    let error = manager.add_ram(&TWO, &anonymous()).unwrap_err().to_string();
    assert!(error.contains("a listener") && error.contains("no room"), "{error}");
    assert_eq!(*first_heard.lock(), ["+0", "+100000", "-100000", "-0"]);
    assert_eq!(*second_heard.lock(), ["+0", "-0"]);
    assert_eq!(slots(&vm), []);
    assert_eq!(manager.view().num_regions(), 0);
    // Nothing is in the way of another try.
    manager.add_ram(&TWO[..1], &anonymous()).unwrap();
    assert_eq!(slots(&vm), [(0, 2 * PAGE, false)]);
}

#[test]
fn regions_that_overlap_are_refused_before_anybody_hears_of_them() {
    let (mut manager, vm) = manager();
    let (listener, heard) = listener(None);
    manager.subscribe(listener).unwrap();
    let overlapping = [TWO[0], Range { base: PAGE, size: PAGE }];
    assert!(manager.add_ram(&overlapping, &anonymous()).is_err());
    assert!(heard.lock().is_empty());
    assert_eq!(slots(&vm), []);
}

#[test]
fn a_late_listener_hears_of_what_is_there_or_of_nothing() {
    let (mut manager, _vm) = manager();
    manager.add_ram(&TWO, &anonymous()).unwrap();
    let (late, heard) = listener(None);
    manager.subscribe(late).unwrap();
    assert_eq!(*heard.lock(), ["+0", "+100000"]);
    let (refusing, heard) = listener(Some(0x10_0000));
    assert!(manager.subscribe(refusing).is_err());
    assert_eq!(*heard.lock(), ["+0", "-0"]);
}

#[test]
fn an_image_is_read_only_for_the_guest_and_private_to_the_vm() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(2 << 20).unwrap();
    let (image, size) = Backing::image(file.path()).unwrap();
    let (mut manager, vm) = manager();
    let range = Range { base: 1 << 32, size };
    manager.add_image(range, &image).unwrap();
    assert_eq!(slots(&vm), [(1 << 32, 2 << 20, true)]);
    // As a device would that is told to write there.
    manager.view().write_obj(0xffu8, GuestAddress(1 << 32)).unwrap();
    assert_eq!(std::fs::read(file.path()).unwrap()[0], 0);
    manager.discard().unwrap();
    assert_eq!(manager.view().read_obj::<u8>(GuestAddress(1 << 32)).unwrap(), 0);
}

#[test]
fn discarded_ram_is_zero() {
    for shared in [false, true] {
        let (mut manager, _vm) = manager();
        manager.add_ram(&TWO, &RamBacking { shared, ..anonymous() }).unwrap();
        let address = GuestAddress(0x10_0000);
        manager.view().write_obj(7u32, address).unwrap();
        manager.discard().unwrap();
        assert_eq!(manager.view().read_obj::<u32>(address).unwrap(), 0, "shared: {shared}");
    }
}
