// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Flat payloads on this host's `/dev/kvm`: exits, interrupts, doorbells, memory slots, kicks, resets.

#![cfg(target_arch = "x86_64")]
// All of this is test code; clippy's own exception covers functions marked `#[test]` only.
#![allow(clippy::unwrap_used)]

#[path = "flat_kvm/guest.rs"]
mod guest;

use ecr_devices::irq::MsiMessage;
use ecr_vmm::hypervisor::{MemorySlot, ShutdownKind};
use ecr_vmm::vcpu::VcpuEvent;
use guest::{ENTRY, Guest, Mode, NOBODY, Seen};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// No RAM and no device of KVM's own.
const UNBACKED: u64 = 0xD000_0000;
const TRIPLE_FAULT: VcpuEvent = VcpuEvent::Shutdown(ShutdownKind::TripleFault);

#[test]
fn ports_are_read_and_written_in_real_mode() {
    let payload = payload!(
        ".code16",
        "mov dx, 0x3f8",
        "mov al, 0x41",
        "out dx, al",
        "in al, dx",
        "out 0x80, al",
        "mov dx, 0x500",
        "mov eax, 0x12345678",
        "out dx, eax",
        "out dx, ax",
        "hlt",
    );
    let Some(guest) = Guest::new(Mode::Real, payload) else { return };
    guest.resume();
    guest.expect_port(0x3f8, 0x41);
    guest.expect_port(0x80, NOBODY);
    assert_eq!(guest.next(), Seen::Port(0x500, vec![0x78, 0x56, 0x34, 0x12]));
    assert_eq!(guest.next(), Seen::Port(0x500, vec![0x78, 0x56]));
}

#[test]
fn a_string_of_port_writes_is_one_write_for_each_item() {
    let payload = payload!(
        ".code16",
        "mov dx, 0x500",
        "mov si, 0x8000",
        "mov cx, 4",
        "cld",
        "rep outsw",
        "hlt",
    );
    let Some(guest) = Guest::new(Mode::Real, payload) else { return };
    guest.resume();
    for item in payload[..8].chunks(2) {
        assert_eq!(guest.next(), Seen::Port(0x500, item.to_vec()));
    }
}

#[test]
fn unbacked_memory_is_read_and_written_in_long_mode() {
    let payload = payload!(
        ".code64",
        "mov rbx, 0xd0000000",
        "mov eax, [rbx]",
        "mov [rbx + 8], eax",
        "mov rax, 0x1122334455667788",
        "mov [rbx + 16], rax",
        "mov byte ptr [rbx + 3], 9",
        "hlt",
    );
    let Some(guest) = Guest::new(Mode::Long, payload) else { return };
    guest.resume();
    assert_eq!(guest.next(), Seen::Memory(UNBACKED + 8, vec![NOBODY; 4]));
    let quad = 0x1122_3344_5566_7788_u64.to_le_bytes().to_vec();
    assert_eq!(guest.next(), Seen::Memory(UNBACKED + 16, quad));
    assert_eq!(guest.next(), Seen::Memory(UNBACKED + 3, vec![9]));
}

/// Enables its local APIC, says 1 on port 0x80, and for each interrupt 0x33. Interrupts are let in while it
/// halts only. The handler is at 0x100.
fn interrupt_payload() -> &'static [u8] {
    payload!(
        ".code16",
        "mov sp, 0x7000",
        "mov ebx, 0xfee00000",
        // Spurious interrupt vector register: enabled, vector 0xFF.
        "mov dword ptr [ebx + 0xf0], 0x1ff",
        // The 8259s, which see the same lines, masked.
        "mov al, 0xff",
        "out 0x21, al",
        "out 0xa1, al",
        // I/O APIC pin 5: vector 0x31, edge, to APIC 0.
        "mov ecx, 0xfec00000",
        "mov dword ptr [ecx], 0x1a",
        "mov dword ptr [ecx + 0x10], 0x31",
        "mov al, 1",
        "out 0x80, al",
        "2: sti",
        "hlt",
        "cli",
        "mov al, 0x33",
        "out 0x80, al",
        "jmp 2b",
        ".org 98b + 0x100",
        // End of interrupt.
        "mov dword ptr [ebx + 0xb0], 0",
        "iret",
    )
}

#[test]
fn messages_and_lines_interrupt_the_guest() {
    let Some(guest) = Guest::new(Mode::Real, interrupt_payload()) else { return };
    for vector in [0x31, 0x42] {
        guest.handle_interrupt(vector, ENTRY + 0x100);
    }
    guest.resume();
    guest.expect_port(0x80, 1);
    let message = MsiMessage { address: 0xFEE0_0000, data: 0x42, requester: 0 };
    for _ in 0..50 {
        guest.vm.msi().signal(message).unwrap();
        guest.expect_port(0x80, 0x33);
    }
    for _ in 0..50 {
        guest.vm.irq_line(5).pulse();
        guest.expect_port(0x80, 0x33);
    }
    assert_eq!(guest.rest(), []);
}

#[test]
fn a_route_sends_its_message_once_it_is_committed() {
    let Some(guest) = Guest::new(Mode::Real, interrupt_payload()) else { return };
    for vector in [0x31, 0x42] {
        guest.handle_interrupt(vector, ENTRY + 0x100);
    }
    guest.resume();
    guest.expect_port(0x80, 1);
    let msi = guest.vm.msi();
    let route = std::sync::Arc::clone(&msi).route().unwrap();
    route.eventfd().write(1).unwrap();
    let message = MsiMessage { address: 0xFEE0_0000, data: 0x42, requester: 0 };
    route.set(Some(message)).unwrap();
    msi.commit().unwrap();
    guest.expect_port(0x80, 0x33);
    route.set(None).unwrap();
    route.eventfd().write(1).unwrap();
    route.eventfd().write(1).unwrap();
    route.set(Some(message)).unwrap();
    msi.commit().unwrap();
    guest.expect_port(0x80, 0x33);
    drop(route);
    msi.commit().unwrap();
    // The pins still lead where they led.
    guest.vm.irq_line(5).pulse();
    guest.expect_port(0x80, 0x33);
    assert_eq!(guest.rest(), []);
}

#[test]
fn a_doorbell_takes_writes_of_any_size() {
    let payload = payload!(
        ".code64",
        "mov rbx, 0xd0000000",
        "mov word ptr [rbx], 1",
        "mov dword ptr [rbx], 2",
        "mov dword ptr [rbx + 4], 3",
        "mov dword ptr [rbx], 4",
        "mov al, 1",
        "out 0x80, al",
        "hlt",
    );
    let Some(guest) = Guest::new(Mode::Long, payload) else { return };
    let eventfd = EventFd::new(EFD_NONBLOCK).unwrap();
    guest.vm.doorbells().attach(UNBACKED, &eventfd).unwrap();
    guest.resume();
    assert_eq!(guest.next(), Seen::Memory(UNBACKED + 4, vec![3, 0, 0, 0]));
    guest.expect_port(0x80, 1);
    assert_eq!(eventfd.read().unwrap(), 3);
    guest.vm.doorbells().detach(UNBACKED, &eventfd).unwrap();
    guest.reset();
    guest.resume();
    assert_eq!(guest.next(), Seen::Memory(UNBACKED, vec![1, 0]));
}

#[test]
fn memory_comes_and_goes_while_the_guest_runs() {
    let payload =
        payload!(".code64", "mov rbx, 0xd0000000", "2: mov al, [rbx]", "out 0x80, al", "jmp 2b",);
    let Some(guest) = Guest::new(Mode::Long, payload) else { return };
    let memory = vm_memory::MmapRegion::<()>::new(0x1000).unwrap();
    // SAFETY: the mapping is 4 KiB long and nobody else uses it yet.
    unsafe { memory.as_ptr().write_volatile(0x77) };
    let slot = MemorySlot {
        slot: 7,
        guest: UNBACKED,
        size: 0x1000,
        host: memory.as_ptr() as u64,
        read_only: false,
    };
    guest.resume();
    for _ in 0..20 {
        guest.wait_for_port(0x80, NOBODY);
        // SAFETY: `memory` outlives the guest's last access: the slot is removed below.
        unsafe { guest.vm.add_memory_slot(slot) }.unwrap();
        guest.wait_for_port(0x80, 0x77);
        guest.vm.remove_memory_slot(slot.slot).unwrap();
    }
}

#[test]
fn writes_to_a_read_only_slot_leave_the_guest() {
    let payload = payload!(
        ".code64",
        "mov rbx, 0xd0000000",
        "mov al, [rbx]",
        "mov [rbx + 1], al",
        "mov al, [rbx + 1]",
        "out 0x80, al",
        "hlt",
    );
    let Some(guest) = Guest::new(Mode::Long, payload) else { return };
    let memory = vm_memory::MmapRegion::<()>::new(0x1000).unwrap();
    let host = memory.as_ptr() as u64;
    // SAFETY: the mapping is 4 KiB long and nobody else uses it yet.
    unsafe { memory.as_ptr().write_volatile(0x77) };
    let slot = MemorySlot { slot: 7, guest: UNBACKED, size: 0x1000, host, read_only: true };
    // SAFETY: `memory` outlives the slot, which is removed below.
    unsafe { guest.vm.add_memory_slot(slot) }.unwrap();
    guest.resume();
    assert_eq!(guest.next(), Seen::Memory(UNBACKED + 1, vec![0x77]));
    guest.expect_port(0x80, 0);
    guest.pause();
    guest.vm.remove_memory_slot(7).unwrap();
}

/// No kick is lost, wherever it meets the vCPU: a lost one would make `pause` wait for ever.
#[test]
fn a_thousand_pauses_of_a_guest_that_never_exits() {
    let payload = payload!(".code16", "2: inc word ptr [0x1000]", "jmp 2b");
    let Some(guest) = Guest::new(Mode::Real, payload) else { return };
    for _ in 0..1000 {
        guest.resume();
        guest.pause();
    }
    let count = || (guest.byte(0x1000), guest.byte(0x1001));
    let paused = count();
    std::thread::yield_now();
    assert_eq!(count(), paused, "a paused guest does nothing");
}

#[test]
fn a_thousand_pauses_of_a_guest_that_always_exits() {
    let payload = payload!(".code16", "2: in al, 0x60", "out 0x80, al", "jmp 2b");
    let Some(guest) = Guest::new(Mode::Real, payload) else { return };
    for round in 0..1000 {
        let value = (round % 200) as u8;
        guest.tell(value);
        guest.resume();
        guest.wait_for_port(0x80, value);
        guest.pause();
        // Between the read and the write of a port there may be one old value.
        guest.rest();
    }
}

#[test]
fn a_halted_guest_can_be_paused_and_ended() {
    let payload = payload!(".code16", "mov al, 1", "out 0x80, al", "2: hlt", "jmp 2b");
    let Some(guest) = Guest::new(Mode::Real, payload) else { return };
    guest.resume();
    guest.expect_port(0x80, 1);
    for _ in 0..100 {
        guest.pause();
        guest.resume();
    }
    assert_eq!(guest.rest(), []);
}

#[test]
fn a_triple_fault_is_an_event_and_a_reset_starts_again() {
    let payload = payload!(
        ".code64",
        "inc byte ptr [0x1000]",
        "mov al, [0x1000]",
        "out 0x80, al",
        // A table without entries: the double fault and the triple fault follow.
        "lidt [0x1010]",
        "ud2",
    );
    let Some(guest) = Guest::new(Mode::Long, payload) else { return };
    for start in 1..10 {
        guest.resume();
        guest.expect_port(0x80, start);
        assert_eq!(guest.next(), Seen::Event(0, TRIPLE_FAULT));
        guest.reset();
    }
}

/// After a reset the second processor waits again until the first one starts it.
#[test]
fn another_processor_is_started_after_each_reset() {
    let payload = payload!(
        ".code64",
        "mov al, 1",
        "out 0x80, al",
        "mov rbx, 0xfee00000",
        "mov dword ptr [rbx + 0xf0], 0x1ff",
        // To APIC 1: INIT, then SIPI to page 9.
        "mov dword ptr [rbx + 0x310], 0x01000000",
        "mov dword ptr [rbx + 0x300], 0x4500",
        "mov dword ptr [rbx + 0x310], 0x01000000",
        "mov dword ptr [rbx + 0x300], 0x4609",
        "2: hlt",
        "jmp 2b",
    );
    let second = payload!(".code16", "mov al, 2", "out 0x80, al", "2: hlt", "jmp 2b",);
    let Some(guest) = Guest::with_vcpus(2, Mode::Long, payload) else { return };
    guest.load(0x9000, second);
    for _ in 0..10 {
        guest.resume();
        guest.expect_port(0x80, 1);
        guest.expect_port(0x80, 2);
        guest.reset();
        assert_eq!(guest.rest(), []);
    }
}

#[test]
fn a_reset_forgets_pending_interrupts() {
    let Some(guest) = Guest::new(Mode::Real, interrupt_payload()) else { return };
    for vector in [0x31, 0x42] {
        guest.handle_interrupt(vector, ENTRY + 0x100);
    }
    guest.resume();
    guest.expect_port(0x80, 1);
    guest.pause();
    guest.vm.irq_line(5).pulse();
    let message = MsiMessage { address: 0xFEE0_0000, data: 0x42, requester: 0 };
    guest.vm.msi().signal(message).unwrap();
    guest.reset();
    guest.resume();
    guest.expect_port(0x80, 1);
    guest.vm.irq_line(5).pulse();
    guest.expect_port(0x80, 0x33);
    guest.pause();
    assert_eq!(guest.rest(), []);
}

#[test]
fn code_outside_of_memory_fails_with_a_text_that_says_where() {
    let payload = payload!(".code64", "mov rax, 0xd0000000", "jmp rax");
    let Some(guest) = Guest::new(Mode::Long, payload) else { return };
    guest.resume();
    let Seen::Event(0, VcpuEvent::Failed(text)) = guest.next() else { panic!("it went on") };
    assert!(text.contains("0xd0000000") && text.contains("vCPU 0"), "{text}");
}

#[test]
fn it_ends_from_every_state() {
    let payload = payload!(".code16", "out 0x80, al", "2: jmp 2b");
    let Some(paused) = Guest::new(Mode::Real, payload) else { return };
    drop(paused);
    let running = Guest::new(Mode::Real, payload).unwrap();
    running.resume();
    running.next();
    drop(running);
    let ended = Guest::new(Mode::Long, payload!(".code64", "lidt [0x1010]", "ud2")).unwrap();
    ended.resume();
    assert_eq!(ended.next(), Seen::Event(0, TRIPLE_FAULT));
    drop(ended);
}
