// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! A hypervisor for tests of whole machines, on any host: its vCPUs run [`GuestProgram`]s, written in Rust,
//! instead of instructions.
//!
//! Modelled: memory slots with KVM's checks, interrupt lines, messages and routes, doorbells, kicks, resets.
//! Left out: registers, CPUID, and INIT/SIPI: every vCPU that was given a program starts with the others, and
//! one without a program waits for ever, like a processor that nobody starts. What a test wants to know of
//! the VM is recorded without bound.

mod guest;

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::sync::Arc;

use ecr_devices::irq::{DoorbellSink, IrqLine, IrqSink, MsiMessage, MsiRoute, MsiSink};
use parking_lot::{Condvar, Mutex};
use vm_memory::VolatileSlice;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{
    Architecture, Capabilities, Gic, GicSupport, Hypervisor, HypervisorError, MemorySlot, Result,
    Vcpu, Vm,
};
use guest::{CpuState, FakeVcpu};
pub use guest::{GuestCpu, GuestProgram};

const PAGE_SIZE: u64 = 4096;

fn refused(attempted: String, errno: i32) -> HypervisorError {
    HypervisorError { attempted, source: io::Error::from_raw_os_error(errno) }
}

/// The hypervisor. A test keeps it, and looks at the VM through [`Self::vm`].
#[derive(Debug)]
pub struct Fake {
    capabilities: Capabilities,
    gic: GicSupport,
    programs: BTreeMap<u32, GuestProgram>,
    vm: Mutex<Option<Arc<FakeVm>>>,
}

impl Default for Fake {
    fn default() -> Self {
        Self::new()
    }
}

impl Fake {
    /// A hypervisor with ample limits, whose guests do nothing.
    pub fn new() -> Self {
        let capabilities = Capabilities {
            architectures: &[Architecture::X86_64, Architecture::Aarch64],
            accelerated: false,
            max_vcpus: 1024,
            max_memory_slots: 512,
            physical_address_bits: 46,
            cpuid: Vec::new(),
        };
        let gic = GicSupport { v2: true, v3: true, its: true };
        Self { capabilities, gic, programs: BTreeMap::new(), vm: Mutex::new(None) }
    }

    /// Show these capabilities.
    #[must_use]
    pub fn with_capabilities(self, capabilities: Capabilities) -> Self {
        Self { capabilities, ..self }
    }

    /// Have these interrupt controllers of Arm.
    #[must_use]
    pub fn with_gic(self, gic: GicSupport) -> Self {
        Self { gic, ..self }
    }

    /// Let vCPU `id` run `program` from its start, and again from its start after each reset.
    #[must_use]
    pub fn with_program<P>(mut self, id: u32, program: P) -> Self
    where
        P: Fn(&GuestCpu) -> super::Exit + Send + Sync + 'static,
    {
        self.programs.insert(id, GuestProgram::new(program));
        self
    }

    /// The VM that was created last, even if it has ended.
    pub fn vm(&self) -> Option<Arc<FakeVm>> {
        self.vm.lock().clone()
    }
}

impl Hypervisor for Fake {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn create_vm(&self, address_bits: u8) -> Result<Arc<dyn Vm>> {
        if address_bits > self.capabilities.physical_address_bits {
            return Err(refused(
                format!("create a VM of {address_bits} address bits"),
                libc::EINVAL,
            ));
        }
        let vm = Arc::new(FakeVm {
            address_bits,
            gic: self.gic,
            max_memory_slots: self.capabilities.max_memory_slots,
            programs: self.programs.clone(),
            shared: Arc::default(),
        });
        *self.vm.lock() = Some(Arc::clone(&vm));
        Ok(vm)
    }
}

/// The VM: what the machine did to it, for tests to look at.
#[derive(Debug)]
pub struct FakeVm {
    address_bits: u8,
    gic: GicSupport,
    max_memory_slots: u32,
    programs: BTreeMap<u32, GuestProgram>,
    shared: Arc<Shared>,
}

impl FakeVm {
    /// Bits of a guest-physical address.
    pub fn address_bits(&self) -> u8 {
        self.address_bits
    }

    /// The interrupt controller of Arm, if one was created.
    pub fn gic(&self) -> Option<Gic> {
        self.shared.state.lock().gic.clone()
    }

    /// The memory slots, by number.
    pub fn memory_slots(&self) -> Vec<MemorySlot> {
        self.shared.state.lock().slots.values().copied().collect()
    }

    /// Addresses of the doorbells.
    pub fn doorbell_addresses(&self) -> Vec<u64> {
        self.shared.state.lock().doorbells.keys().copied().collect()
    }

    /// Whether the interrupt controller's input `gsi` is high.
    pub fn line_is_high(&self, gsi: u32) -> bool {
        self.shared.state.lock().lines.get(&gsi).is_some_and(|line| line.high)
    }

    /// How often input `gsi` went from low to high.
    pub fn rising_edges(&self, gsi: u32) -> u64 {
        self.shared.state.lock().lines.get(&gsi).map_or(0, |line| line.edges)
    }

    /// All messages so far, in order.
    pub fn messages(&self) -> Vec<MsiMessage> {
        self.shared.state.lock().messages.clone()
    }

    /// Deliver the messages of those committed routes whose eventfd has been signalled. A real hypervisor
    /// does so by itself.
    pub fn deliver_routes(&self) {
        let mut state = self.shared.state.lock();
        let triggered: Vec<MsiMessage> = state
            .routes
            .values()
            .filter_map(|route| route.committed.filter(|_| route.eventfd.read().is_ok()))
            .collect();
        triggered.into_iter().for_each(|message| state.deliver(message));
        self.shared.changed.notify_all();
    }
}

impl Vm for FakeVm {
    unsafe fn add_memory_slot(&self, slot: MemorySlot) -> Result<()> {
        let attempted = || format!("add {slot:x?}");
        let mut state = self.shared.state.lock();
        let aligned = [slot.guest, slot.size, slot.host].iter().all(|v| v % PAGE_SIZE == 0);
        let end = slot.guest.checked_add(slot.size).filter(|end| end >> self.address_bits == 0);
        let (Some(end), true, true) =
            (end, aligned && slot.size != 0, slot.slot < self.max_memory_slots)
        else {
            return Err(refused(attempted(), libc::EINVAL));
        };
        let overlaps =
            |other: &MemorySlot| slot.guest < other.guest + other.size && other.guest < end;
        if state.slots.contains_key(&slot.slot) || state.slots.values().any(overlaps) {
            return Err(refused(attempted(), libc::EEXIST));
        }
        state.slots.insert(slot.slot, slot);
        Ok(())
    }

    fn remove_memory_slot(&self, slot: u32) -> Result<()> {
        match self.shared.state.lock().slots.remove(&slot) {
            Some(_) => Ok(()),
            None => Err(refused(format!("remove memory slot {slot}"), libc::EINVAL)),
        }
    }

    fn gic_support(&self) -> GicSupport {
        self.gic
    }

    fn create_gic(&self, gic: &Gic) -> Result<()> {
        let mut state = self.shared.state.lock();
        if !state.cpus.is_empty() || state.gic.is_some() {
            return Err(refused("create a GIC".into(), libc::EEXIST));
        }
        state.gic = Some(gic.clone());
        Ok(())
    }

    fn create_vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>> {
        let mut state = self.shared.state.lock();
        if state.gic.is_some() && state.complete {
            return Err(refused(format!("create vCPU {id}"), libc::EBUSY));
        }
        if state.cpus.contains_key(&id) {
            return Err(refused(format!("create vCPU {id}"), libc::EEXIST));
        }
        state.cpus.insert(id, CpuState::default());
        let program = self.programs.get(&id).cloned();
        Ok(Box::new(FakeVcpu::new(id, program, Arc::clone(&self.shared))))
    }

    fn complete_vcpus(&self, _count: u32) -> Result<()> {
        self.shared.state.lock().complete = true;
        Ok(())
    }

    fn reset(&self) -> Result<()> {
        let mut state = self.shared.state.lock();
        state.pending.clear();
        state.lines.values_mut().for_each(|line| line.pending = 0);
        Ok(())
    }

    fn irq_line(&self, gsi: u32) -> IrqLine {
        IrqLine::new(Arc::new(Pin { shared: Arc::clone(&self.shared), gsi }))
    }

    fn msi(&self) -> Arc<dyn MsiSink> {
        Arc::clone(&self.shared) as _
    }

    fn doorbells(&self) -> Arc<dyn DoorbellSink> {
        Arc::clone(&self.shared) as _
    }
}

/// What the VM, its vCPUs and its devices share: one lock, never held while a device is called.
#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    slots: BTreeMap<u32, MemorySlot>,
    doorbells: BTreeMap<u64, EventFd>,
    lines: BTreeMap<u32, Line>,
    messages: Vec<MsiMessage>,
    /// Those that no program has waited for yet.
    pending: Vec<MsiMessage>,
    routes: BTreeMap<u32, RouteState>,
    cpus: BTreeMap<u32, CpuState>,
    /// All vCPUs are there.
    complete: bool,
    gic: Option<Gic>,
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("State").field("slots", &self.slots).finish_non_exhaustive()
    }
}

#[derive(Default)]
struct Line {
    high: bool,
    edges: u64,
    /// Those that no program has waited for yet.
    pending: u64,
}

struct RouteState {
    eventfd: EventFd,
    set: Option<MsiMessage>,
    committed: Option<MsiMessage>,
}

impl State {
    /// The vCPU `id`, which was created.
    fn cpu(&mut self, id: u32) -> &mut CpuState {
        self.cpus.entry(id).or_default()
    }

    fn deliver(&mut self, message: MsiMessage) {
        self.messages.push(message);
        self.pending.push(message);
    }

    /// The slot that holds all of `address..address + len`, and the bytes there.
    fn memory(&self, address: u64, len: usize) -> Option<(&MemorySlot, VolatileSlice<'_>)> {
        let end = address.checked_add(len as u64)?;
        let holds = |slot: &&MemorySlot| slot.guest <= address && end <= slot.guest + slot.size;
        let slot = self.slots.values().find(holds)?;
        let host = (slot.host + (address - slot.guest)) as *mut u8;
        // SAFETY: who added the slot promised that its range stays mapped until the slot is removed, which
        // needs the lock that the borrow of `self` holds, and that nobody has references into it.
        Some((slot, unsafe { VolatileSlice::new(host, len) }))
    }
}

struct Pin {
    shared: Arc<Shared>,
    gsi: u32,
}

impl IrqSink for Pin {
    fn set_level(&self, high: bool) {
        let mut state = self.shared.state.lock();
        let line = state.lines.entry(self.gsi).or_default();
        let edge = u64::from(high && !line.high);
        line.edges += edge;
        line.pending += edge;
        line.high = high;
        self.shared.changed.notify_all();
    }
}

impl MsiSink for Shared {
    fn signal(&self, message: MsiMessage) -> io::Result<()> {
        self.state.lock().deliver(message);
        self.changed.notify_all();
        Ok(())
    }

    fn route(self: Arc<Self>) -> io::Result<Box<dyn MsiRoute>> {
        let eventfd = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let watched = eventfd.try_clone()?;
        let mut state = self.state.lock();
        let id = state.routes.last_key_value().map_or(0, |(last, _)| last + 1);
        state.routes.insert(id, RouteState { eventfd: watched, set: None, committed: None });
        drop(state);
        Ok(Box::new(Route { shared: self, id, eventfd }))
    }

    fn commit(&self) -> io::Result<()> {
        self.state.lock().routes.values_mut().for_each(|route| route.committed = route.set);
        Ok(())
    }
}

struct Route {
    shared: Arc<Shared>,
    id: u32,
    eventfd: EventFd,
}

impl MsiRoute for Route {
    fn eventfd(&self) -> &EventFd {
        &self.eventfd
    }

    fn set(&self, message: Option<MsiMessage>) -> io::Result<()> {
        if let Some(route) = self.shared.state.lock().routes.get_mut(&self.id) {
            route.set = message;
        }
        Ok(())
    }
}

impl Drop for Route {
    fn drop(&mut self) {
        self.shared.state.lock().routes.remove(&self.id);
    }
}

impl DoorbellSink for Shared {
    fn attach(&self, address: u64, eventfd: &EventFd) -> io::Result<()> {
        let eventfd = eventfd.try_clone()?;
        let mut state = self.state.lock();
        if state.doorbells.contains_key(&address) {
            return Err(io::Error::from_raw_os_error(libc::EEXIST));
        }
        state.doorbells.insert(address, eventfd);
        Ok(())
    }

    fn detach(&self, address: u64, _eventfd: &EventFd) -> io::Result<()> {
        let removed = self.state.lock().doorbells.remove(&address);
        removed.map(drop).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOENT))
    }
}

#[cfg(test)]
mod tests;
