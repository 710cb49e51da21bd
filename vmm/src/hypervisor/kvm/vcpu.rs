// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! One vCPU: what KVM_RUN returns, and how another thread makes it return.
//!
//! The kick is a real-time signal that is blocked in the vCPU's thread and let through only inside
//! KVM_RUN (KVM_SET_SIGNAL_MASK). KVM_RUN then fails with EINTR and the signal stays pending until this
//! thread takes it, so no handler ever runs and nothing that belongs to the process is changed. A kick that
//! comes before KVM_RUN makes it return at once: none is lost.

use std::io;
use std::mem::{MaybeUninit, size_of};
use std::slice::ChunksMut;
use std::sync::Arc;

use kvm_bindings::{
    KVM_INTERNAL_ERROR_EMULATION, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, KVMIO,
};
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

use super::{arch, error};
use crate::hypervisor::{
    Exit, IoHandler, Result, ShutdownKind, Vcpu, VcpuFacts, VcpuKick, VcpuSetup,
};

/// `struct kvm_signal_mask` with its flexible member; the kernel's signal set has 64 bits.
#[repr(C, packed)]
struct SignalMask {
    len: u32,
    sigset: u64,
}

/// The number is made of the head of the structure only.
#[repr(C)]
struct SignalMaskHead {
    _len: u32,
}

ioctl_iow_nr!(KVM_SET_SIGNAL_MASK, KVMIO, 0x8b, SignalMaskHead);

/// A KVM vCPU.
#[derive(Debug)]
pub(super) struct KvmVcpu {
    id: u32,
    fd: VcpuFd,
    start: arch::StartState,
}

impl KvmVcpu {
    pub(super) fn new(id: u32, fd: VcpuFd, vm: &VmFd) -> Result<Self> {
        let start = arch::StartState::new(id, &fd, vm)?;
        Ok(Self { id, fd, start })
    }

    /// Everything but the kick goes on being blocked inside KVM_RUN as it is outside.
    fn let_kick_through(&self, blocked: &libc::sigset_t) -> io::Result<()> {
        let mut mask = SignalMask { len: size_of::<u64>() as u32, sigset: 0 };
        for signal in (1..=64).filter(|&signal| signal != kick_signal()) {
            // SAFETY: `blocked` was filled by pthread_sigmask and lives through the call.
            if unsafe { libc::sigismember(blocked, signal) } == 1 {
                mask.sigset |= 1 << (signal - 1);
            }
        }
        // SAFETY: the structure is what the kernel reads: `len` bytes follow the length.
        match unsafe { ioctl_with_ref(&self.fd, KVM_SET_SIGNAL_MASK(), &mask) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// The signal that kicks.
fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

fn kick_set() -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset initialises the set, and then it is valid for sigaddset.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), kick_signal());
        set.assume_init()
    }
}

/// Block the kick in this thread; returns what was blocked before.
fn block_kick() -> io::Result<libc::sigset_t> {
    let (set, mut old) = (kick_set(), MaybeUninit::uninit());
    // SAFETY: both sets are valid for the call; only this thread's mask changes.
    match unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, old.as_mut_ptr()) } {
        // SAFETY: the call succeeded and has filled it.
        0 => Ok(unsafe { old.assume_init() }),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

/// Take the pending kicks.
fn take_kicks() {
    let set = kick_set();
    let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the set and the time live through the call; no information is asked for.
    while unsafe { libc::sigtimedwait(&raw const set, std::ptr::null_mut(), &raw const now) } > 0 {}
}

/// The thread that runs a vCPU. Whoever holds it may signal only while that thread lives; the vCPU's
/// owner drops it before the thread ends.
#[derive(Debug)]
struct Kick {
    process: libc::pid_t,
    thread: libc::pid_t,
}

impl VcpuKick for Kick {
    fn kick(&self) {
        // SAFETY: tgkill takes numbers only.
        let sent =
            unsafe { libc::syscall(libc::SYS_tgkill, self.process, self.thread, kick_signal()) };
        if sent != 0 {
            log::error!("kick vCPU thread {}: {}", self.thread, io::Error::last_os_error());
        }
    }
}

impl Vcpu for KvmVcpu {
    fn facts(&self) -> Result<VcpuFacts> {
        arch::facts(self.id, &self.fd)
    }

    fn setup(&mut self, setup: &VcpuSetup) -> Result<()> {
        self.start.apply(self.id, &self.fd, setup)
    }

    fn bind_to_thread(&mut self) -> Result<Arc<dyn VcpuKick>> {
        block_kick()
            .and_then(|blocked| self.let_kick_through(&blocked))
            .map_err(|source| error(format!("arrange for kicks of vCPU {}", self.id), source))?;
        // SAFETY: both calls only return numbers.
        let (process, thread) = unsafe { (libc::getpid(), libc::gettid()) };
        Ok(Arc::new(Kick { process, thread }))
    }

    fn note_pause(&mut self) {
        arch::note_pause(&self.fd);
    }

    fn run(&mut self, io: &dyn IoHandler) -> Exit {
        loop {
            match self.fd.run() {
                Ok(VcpuExit::IoIn(port, data)) => {
                    let data: *mut [u8] = data;
                    self.port_items(data).for_each(|item| io.pio_read(port, item));
                }
                Ok(VcpuExit::IoOut(port, data)) => {
                    let data: *const [u8] = data;
                    self.port_items(data.cast_mut()).for_each(|item| io.pio_write(port, item));
                }
                Ok(VcpuExit::MmioRead(address, data)) => io.mmio_read(address, data),
                Ok(VcpuExit::MmioWrite(address, data)) => io.mmio_write(address, data),
                Ok(VcpuExit::Intr) => return self.kicked(),
                Ok(VcpuExit::Hlt) => return Exit::Halted,
                Ok(VcpuExit::Shutdown) => return Exit::Shutdown(ShutdownKind::TripleFault),
                Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _)) => {
                    return Exit::Shutdown(ShutdownKind::PowerOff);
                }
                Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _)) => {
                    return Exit::Shutdown(ShutdownKind::Reset);
                }
                Ok(VcpuExit::InternalError) => return Exit::Failed(self.internal_error()),
                Ok(VcpuExit::FailEntry(reason, cpu)) => {
                    return Exit::Failed(format!(
                        "the processor refused to enter the guest on vCPU {}: reason {reason:#x} on host CPU {cpu}",
                        self.id
                    ));
                }
                Ok(other) => {
                    let text = format!(
                        "vCPU {} left the guest with {other:?}, which is not expected",
                        self.id
                    );
                    return Exit::Failed(text);
                }
                Err(errno) => match errno.errno() {
                    libc::EINTR => return self.kicked(),
                    libc::EAGAIN => {}
                    number => {
                        let (id, place) = (self.id, arch::place(&self.fd));
                        let hint = arch::run_error_hint(number);
                        return Exit::Failed(format!("run vCPU {id} at {place}: {errno}{hint}"));
                    }
                },
            }
        }
    }
}

impl KvmVcpu {
    fn kicked(&self) -> Exit {
        take_kicks();
        Exit::Interrupted
    }

    /// The `data` of a KVM_EXIT_IO, cut into accesses: a string instruction makes several in one exit.
    fn port_items(&mut self, data: *mut [u8]) -> ChunksMut<'_, u8> {
        // SAFETY: the exit reason was KVM_EXIT_IO, so this member of the union is valid.
        let width = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.io.size };
        // SAFETY: the bytes lie behind the structure in the pages shared with KVM, which stay mapped while
        // `self.fd` is borrowed; nobody else has a reference to them, and KVM writes them in KVM_RUN only.
        unsafe { &mut *data }.chunks_mut(usize::from(width).max(1))
    }

    /// What KVM could not do, for a person.
    fn internal_error(&mut self) -> String {
        let (id, place) = (self.id, arch::place(&self.fd));
        // SAFETY: the exit reason was KVM_EXIT_INTERNAL_ERROR, so this member of the union is valid.
        let internal = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal };
        let known = usize::try_from(internal.ndata).unwrap_or(0).min(internal.data.len());
        let data = &internal.data[..known];
        if internal.suberror == KVM_INTERNAL_ERROR_EMULATION {
            let bytes = instruction_bytes(data).map_or_else(String::new, |b| format!(" ({b})"));
            return format!(
                "this host's KVM cannot emulate the guest's instruction{bytes} on vCPU {id} at {place}: it is a limited \
                 KVM, try another host"
            );
        }
        format!(
            "KVM failed on vCPU {id} at {place}: internal error {} {data:x?}",
            internal.suberror
        )
    }
}

/// `emulation_failure` of `struct kvm_run`: flags, then a length and 15 bytes.
fn instruction_bytes(data: &[u64]) -> Option<String> {
    const BYTES_VALID: u64 = 1;
    let [flags, first, second, ..] = data else { return None };
    if flags & BYTES_VALID == 0 {
        return None;
    }
    let bytes: Vec<u8> = [first.to_le_bytes(), second.to_le_bytes()].concat();
    let length = usize::from(bytes[0]).min(15);
    Some(
        bytes[1..=length]
            .iter()
            .map(|byte| format!("{byte:02x} "))
            .collect::<String>()
            .trim_end()
            .into(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instruction_bytes_are_shown_when_they_are_valid() {
        let data = [1, u64::from_le_bytes([2, 0x0f, 0x01, 0, 0, 0, 0, 0]), 0];
        assert_eq!(instruction_bytes(&data).unwrap(), "0f 01");
        assert_eq!(instruction_bytes(&[0, 2, 0]), None);
        assert_eq!(instruction_bytes(&[1]), None);
        let full = [1, u64::from_le_bytes([0xff; 8]), 0];
        assert!(instruction_bytes(&full).is_some());
    }
}
