// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Interrupts into the guest, and doorbells out of it.
//!
//! Devices of this process signal messages directly. Routes are for those who only have an eventfd:
//! KVM replaces its whole routing table each time, so changes are collected until a commit.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use ecr_devices::irq::{DoorbellSink, IrqSink, MsiMessage, MsiRoute, MsiSink};
use kvm_bindings::{
    KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_msi, kvm_irq_routing_msi__bindgen_ty_1, kvm_msi,
};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use parking_lot::Mutex;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::arch::MSI_FLAGS;

/// The first GSI behind the pins of the I/O APIC. On Arm there is none, but no need of them either.
const FIRST_MSI_GSI: u32 = 24;
/// KVM's own limit, `KVM_MAX_IRQ_ROUTES`.
const MAX_GSI: u32 = 4096;

pub(super) fn os_error(errno: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(errno.errno())
}

/// A pin of the interrupt controller.
#[derive(Debug)]
pub(super) struct Line {
    vm: Arc<VmFd>,
    gsi: u32,
}

impl Line {
    pub(super) fn new(vm: Arc<VmFd>, gsi: u32) -> Self {
        Self { vm, gsi }
    }
}

impl IrqSink for Line {
    fn set_level(&self, high: bool) {
        if let Err(errno) = self.vm.set_irq_line(self.gsi, high) {
            log::error!("set interrupt line {} to {high}: {errno}", self.gsi);
        }
    }
}

/// Message-signalled interrupts.
#[derive(Debug)]
pub(super) struct MsiController {
    vm: Arc<VmFd>,
    table: Mutex<RoutingTable>,
}

#[derive(Debug)]
struct RoutingTable {
    fixed: Vec<kvm_irq_routing_entry>,
    /// By GSI.
    routes: BTreeMap<u32, RouteState>,
    /// KVM's table is not this one.
    changed: bool,
}

#[derive(Debug)]
struct RouteState {
    eventfd: Arc<EventFd>,
    /// The last message, kept while masked: unmasking then costs no new table.
    message: Option<MsiMessage>,
    masked: bool,
    /// Whether KVM listens to the eventfd.
    armed: bool,
}

impl MsiController {
    pub(super) fn new(vm: Arc<VmFd>, fixed: Vec<kvm_irq_routing_entry>) -> Self {
        let table = RoutingTable { fixed, routes: BTreeMap::new(), changed: false };
        Self { vm, table: Mutex::new(table) }
    }
}

impl MsiSink for MsiController {
    fn signal(&self, message: MsiMessage) -> io::Result<()> {
        let msi = kvm_msi {
            address_lo: low(message.address),
            address_hi: high(message.address),
            data: message.data,
            flags: MSI_FLAGS,
            devid: message.requester.into(),
            ..kvm_msi::default()
        };
        self.vm.signal_msi(msi).map(drop).map_err(os_error)
    }

    fn route(self: Arc<Self>) -> io::Result<Box<dyn MsiRoute>> {
        let eventfd = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        let mut table = self.table.lock();
        let gsi = (FIRST_MSI_GSI..MAX_GSI)
            .find(|gsi| !table.routes.contains_key(gsi))
            .ok_or_else(|| io::Error::other("all interrupt routes are in use"))?;
        let state =
            RouteState { eventfd: Arc::clone(&eventfd), message: None, masked: true, armed: false };
        table.routes.insert(gsi, state);
        drop(table);
        Ok(Box::new(Route { controller: self, gsi, eventfd }))
    }

    fn commit(&self) -> io::Result<()> {
        let mut table = self.table.lock();
        if table.changed {
            self.vm.set_gsi_routing(&table.to_kvm()?).map_err(os_error)?;
            table.changed = false;
        }
        // Only now: a trigger that waits in the eventfd must not send a message of the old table.
        for (&gsi, route) in table.routes.iter_mut().filter(|(_, r)| !r.masked && !r.armed) {
            self.vm.register_irqfd(&route.eventfd, gsi).map_err(os_error)?;
            route.armed = true;
        }
        Ok(())
    }
}

impl RoutingTable {
    fn to_kvm(&self) -> io::Result<KvmIrqRouting> {
        let messages = self.routes.iter().filter_map(|(&gsi, r)| Some(msi_entry(gsi, r.message?)));
        let entries: Vec<_> = self.fixed.iter().copied().chain(messages).collect();
        KvmIrqRouting::from_entries(&entries)
            .map_err(|_| io::Error::other("too many interrupt routes"))
    }
}

impl RouteState {
    fn disarm(&mut self, vm: &VmFd, gsi: u32) -> io::Result<()> {
        if self.armed {
            vm.unregister_irqfd(&self.eventfd, gsi).map_err(os_error)?;
            self.armed = false;
        }
        Ok(())
    }
}

fn low(address: u64) -> u32 {
    (address & u64::from(u32::MAX)) as u32
}

fn high(address: u64) -> u32 {
    (address >> 32) as u32
}

fn msi_entry(gsi: u32, message: MsiMessage) -> kvm_irq_routing_entry {
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        flags: MSI_FLAGS,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            msi: kvm_irq_routing_msi {
                address_lo: low(message.address),
                address_hi: high(message.address),
                data: message.data,
                __bindgen_anon_1: kvm_irq_routing_msi__bindgen_ty_1 {
                    devid: message.requester.into(),
                },
            },
        },
        ..Default::default()
    }
}

/// A GSI of its own and the eventfd that triggers it.
#[derive(Debug)]
struct Route {
    controller: Arc<MsiController>,
    gsi: u32,
    eventfd: Arc<EventFd>,
}

impl MsiRoute for Route {
    fn eventfd(&self) -> &EventFd {
        &self.eventfd
    }

    fn set(&self, message: Option<MsiMessage>) -> io::Result<()> {
        let mut table = self.controller.table.lock();
        let Some(route) = table.routes.get_mut(&self.gsi) else { return Ok(()) };
        route.masked = message.is_none();
        match message {
            None => route.disarm(&self.controller.vm, self.gsi),
            Some(_) if route.message == message => Ok(()),
            Some(_) => {
                route.message = message;
                table.changed = true;
                Ok(())
            }
        }
    }
}

impl Drop for Route {
    fn drop(&mut self) {
        let mut table = self.controller.table.lock();
        let Some(mut route) = table.routes.remove(&self.gsi) else { return };
        if let Err(error) = route.disarm(&self.controller.vm, self.gsi) {
            log::error!("free the interrupt route {}: {error}", self.gsi);
        }
        table.changed |= route.message.is_some();
    }
}

/// Guest writes that KVM turns into eventfds.
#[derive(Debug)]
pub(super) struct Doorbells {
    vm: Arc<VmFd>,
}

impl Doorbells {
    pub(super) fn new(vm: Arc<VmFd>) -> Self {
        Self { vm }
    }
}

impl DoorbellSink for Doorbells {
    fn attach(&self, address: u64, eventfd: &EventFd) -> io::Result<()> {
        self.vm
            .register_ioevent(eventfd, &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(os_error)
    }

    fn detach(&self, address: u64, eventfd: &EventFd) -> io::Result<()> {
        self.vm
            .unregister_ioevent(eventfd, &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(os_error)
    }
}
