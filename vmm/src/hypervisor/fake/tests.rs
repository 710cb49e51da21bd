// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

use std::sync::atomic::{AtomicU32, Ordering};

use super::*;
use crate::hypervisor::{Exit, IoHandler, ShutdownKind, VcpuSetup};

/// Answers reads with the low byte of the address; records writes.
#[derive(Default)]
struct Devices(Mutex<Vec<(u64, Vec<u8>)>>);

impl IoHandler for Devices {
    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        data.fill(address.to_le_bytes()[0]);
    }
    fn mmio_write(&self, address: u64, data: &[u8]) {
        self.0.lock().push((address, data.to_vec()));
    }
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        data.fill(port.to_le_bytes()[1]);
    }
    fn pio_write(&self, port: u16, data: &[u8]) {
        self.0.lock().push((port.into(), data.to_vec()));
    }
}

fn setup() -> VcpuSetup {
    VcpuSetup::Arm(None)
}

/// A VM whose vCPU 0 is ready to run `program`.
fn vm(program: impl Fn(&GuestCpu) -> Exit + Send + Sync + 'static) -> (Arc<FakeVm>, Box<dyn Vcpu>) {
    let fake = Fake::new().with_program(0, program);
    fake.create_vm(46).unwrap();
    let vm = fake.vm().unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    vcpu.setup(&setup()).unwrap();
    (vm, vcpu)
}

const DONE: Exit = Exit::Shutdown(ShutdownKind::PowerOff);

#[test]
fn accesses_reach_the_handler_and_answers_the_program() {
    let (_vm, mut vcpu) = vm(|cpu| {
        assert_eq!(cpu.read_u32(0x1007), 0x0707_0707);
        let mut byte = [0];
        cpu.port_read(0x3f8, &mut byte);
        assert_eq!(byte, [3]);
        cpu.write(0x2000, &[1, 2]);
        cpu.port_write(0x80, &[9]);
        DONE
    });
    let devices = Devices::default();
    assert_eq!(vcpu.run(&devices), DONE);
    assert_eq!(*devices.0.lock(), [(0x2000, vec![1, 2]), (0x80, vec![9])]);
}

#[test]
fn memory_and_doorbells_do_not_reach_the_handler() {
    let (vm, mut vcpu) = vm(|cpu| {
        cpu.write_u32(0x1ffc, 0xaabb_ccdd);
        assert_eq!(cpu.read_u32(0x1ffc), 0xaabb_ccdd);
        assert_eq!(cpu.read_u32(0x3000), 0);
        cpu.write_u32(0x3000, 7);
        cpu.write(0x5000, &[1]);
        cpu.write(0x5000, &[1, 2]);
        DONE
    });
    let memory = vm_memory::MmapRegion::<()>::new(0x2000).unwrap();
    for (slot, guest, offset, read_only) in [(0, 0x1000, 0, false), (1, 0x3000, 0x1000, true)] {
        let host = memory.as_ptr() as u64 + offset;
        let slot = MemorySlot { slot, guest, size: 0x1000, host, read_only };
        // SAFETY: `memory` lives longer than the vCPU runs.
        unsafe { vm.add_memory_slot(slot) }.unwrap();
    }
    let doorbell = EventFd::new(EFD_NONBLOCK).unwrap();
    vm.doorbells().attach(0x5000, &doorbell).unwrap();
    assert!(vm.doorbells().attach(0x5000, &doorbell).is_err());
    let devices = Devices::default();
    assert_eq!(vcpu.run(&devices), DONE);
    assert_eq!(*devices.0.lock(), [(0x3000, vec![7, 0, 0, 0])], "only the read-only slot");
    assert_eq!(doorbell.read().unwrap(), 2);
    assert_eq!(vm.doorbell_addresses(), [0x5000]);
    vm.doorbells().detach(0x5000, &doorbell).unwrap();
    assert!(vm.doorbells().detach(0x5000, &doorbell).is_err());
}

#[test]
fn slots_that_kvm_would_refuse_are_refused() {
    let (vm, _vcpu) = vm(|cpu| cpu.halt());
    let good = MemorySlot { slot: 0, guest: 0x4000, size: 0x2000, host: 0x1000, read_only: false };
    let add = |slot| {
        // SAFETY: no program touches memory in this test.
        unsafe { vm.add_memory_slot(slot) }
    };
    add(good).unwrap();
    let next = MemorySlot { slot: 1, ..good };
    for bad in [
        MemorySlot { guest: 0x10000, ..good },
        next,
        MemorySlot { guest: 0x3000, ..next },
        MemorySlot { guest: 0x5000, ..next },
        MemorySlot { guest: 0x8001, ..next },
        MemorySlot { guest: 0x8000, size: 0, ..next },
        MemorySlot { guest: 0x8000, size: 10, ..next },
        MemorySlot { guest: 0x8000, host: 1, ..next },
        MemorySlot { guest: u64::MAX - 0xfff, ..next },
        MemorySlot { guest: 0x8000, slot: 512, ..next },
    ] {
        assert!(add(bad).is_err(), "{bad:x?}");
    }
    add(MemorySlot { guest: 0x6000, ..next }).unwrap();
    vm.remove_memory_slot(0).unwrap();
    assert!(vm.remove_memory_slot(0).is_err());
    assert_eq!(vm.memory_slots(), [MemorySlot { guest: 0x6000, ..next }]);
}

#[test]
fn a_program_goes_on_after_a_kick_where_it_stood() {
    let (vm, mut vcpu) = vm(|cpu| {
        cpu.write(0x10, &[1]);
        cpu.wait_for_line(5);
        cpu.write(0x20, &[2]);
        DONE
    });
    let kick = vcpu.bind_to_thread().unwrap();
    let devices = Devices::default();
    kick.kick();
    assert_eq!(vcpu.run(&devices), Exit::Interrupted);
    assert!(devices.0.lock().is_empty(), "a kick comes before the guest's first step");
    std::thread::scope(|scope| {
        scope.spawn(|| kick.kick());
        assert_eq!(vcpu.run(&devices), Exit::Interrupted);
    });
    vm.irq_line(5).set(true);
    assert_eq!(vcpu.run(&devices), DONE);
    assert_eq!(*devices.0.lock(), [(0x10, vec![1]), (0x20, vec![2])]);
}

#[test]
fn a_reset_starts_the_program_again() {
    let starts = Arc::new(AtomicU32::new(0));
    let (_vm, mut vcpu) = vm({
        let starts = Arc::clone(&starts);
        move |cpu| match starts.fetch_add(1, Ordering::SeqCst) {
            0 => cpu.halt(),
            _ => DONE,
        }
    });
    let kick = vcpu.bind_to_thread().unwrap();
    kick.kick();
    assert_eq!(vcpu.run(&Devices::default()), Exit::Interrupted);
    vcpu.setup(&setup()).unwrap();
    assert_eq!(vcpu.run(&Devices::default()), DONE);
    assert_eq!(starts.load(Ordering::SeqCst), 2);
}

#[test]
fn a_panic_of_the_program_fails_the_vcpu() {
    let (_vm, mut vcpu) = vm(|cpu| {
        cpu.write(0x1000, &[0; 9]);
        DONE
    });
    let Exit::Failed(text) = vcpu.run(&Devices::default()) else { panic!("it went on") };
    assert!(text.contains("9 bytes"), "{text}");
}

#[test]
fn lines_and_messages_wake_a_program_and_are_recorded() {
    let (vm, mut vcpu) = vm(|cpu| {
        cpu.wait_for_line(10);
        let message = cpu.wait_for_message(0x42);
        assert_eq!(message.address, 0xfee0_0000);
        DONE
    });
    let line = vm.irq_line(10);
    line.pulse();
    line.set(true);
    let message = |data| MsiMessage { address: 0xfee0_0000, data, requester: 0 };
    vm.msi().signal(message(0x41)).unwrap();
    vm.msi().signal(message(0x42)).unwrap();
    assert_eq!(vcpu.run(&Devices::default()), DONE);
    assert!(vm.line_is_high(10) && !vm.line_is_high(11));
    assert_eq!(vm.rising_edges(10), 2);
    assert_eq!(vm.messages(), [message(0x41), message(0x42)]);
}

#[test]
fn a_route_delivers_what_was_committed() {
    let (vm, _vcpu) = vm(|cpu| cpu.halt());
    let route = vm.msi().route().unwrap();
    let message = MsiMessage { address: 0xfee0_0000, data: 7, requester: 0 };
    route.eventfd().write(1).unwrap();
    route.set(Some(message)).unwrap();
    vm.deliver_routes();
    assert!(vm.messages().is_empty(), "not committed yet");
    vm.msi().commit().unwrap();
    vm.deliver_routes();
    vm.deliver_routes();
    assert_eq!(vm.messages(), [message], "the trigger was kept, and is delivered once");
}
