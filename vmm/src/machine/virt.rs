// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The board `virt`: which device sits where, with which interrupt. It is said once, in the map: bus registration, device
//! tree and ACPI all come from there.

mod gic;
mod tables;

use std::sync::Arc;

use ecr_arch::boot::BootError;
use ecr_arch::boot::arm64 as boot;
use ecr_arch::layout::Range;
use ecr_arch::layout::virt::{self as map, VirtMap, interrupt};
use ecr_devices::backend::chardev::{CharPort, CharSink};
use ecr_devices::bus::{BusError, SharedIoDevice};
use ecr_devices::chipset::{Bridge, PvpanicPci};
use ecr_devices::gicv2m::GicV2m;
use ecr_devices::hotplug::{Ged, GedEvent, PciHotplug};
use ecr_devices::pci::assign::{NoRoom, Window, Windows};
use ecr_devices::pci::host::{DevFn, Ecam, PciHost};
use ecr_devices::pci::port_window::PortWindow;
use ecr_devices::primecell::{Pl011, Pl031, Pl061};
use parking_lot::Mutex;

use super::board::{Board, Boot, BootRequest};
use super::map::Parts;
use super::slots::Slots;
use super::spaces::AddressSpaces;
use crate::hypervisor::{Gic, GicParts, VcpuSetup, Vm};
use crate::vm::StartError;

/// Which input is the power key.
const POWER_KEY: u8 = 3;
const HOST_BRIDGE: DevFn = DevFn::new(0, 0);
/// Out of the way of devices, whose slots are counted from below.
const PVPANIC: DevFn = DevFn::new(31, 0);
/// I/O ports that are free for base address registers: Linux leaves the first page alone.
const PORTS: Window = Window { base: 0x1000, size: map::PCI_WINDOW_IO.size - 0x1000 };
const HOTPLUG: Range = Range::new(map::PCI_HOTPLUG, PciHotplug::PORTS);

/// The board and what is plugged into it.
pub(super) struct Virt {
    map: VirtMap,
    gic: Gic,
    spaces: Arc<AddressSpaces>,
    slots: Slots,
    ged: Arc<Mutex<Ged>>,
    uart: Option<Arc<Mutex<Pl011>>>,
    rtc: Arc<Mutex<Pl031>>,
    gpio: Arc<Mutex<Pl061>>,
}

impl std::fmt::Debug for Virt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Virt")
            .field("map", &self.map)
            .field("gic", &self.gic)
            .field("slots", &self.slots)
            .finish_non_exhaustive()
    }
}

impl Drop for Virt {
    /// The host bridge is on the buses that it knows.
    fn drop(&mut self) {
        self.spaces.memory.clear();
        self.spaces.ports.clear();
    }
}

impl Virt {
    /// The chipset, with nothing plugged in. Creates the VM's interrupt controller.
    pub(super) fn new(
        map: VirtMap,
        Parts { config, vm, memory, requests, serial }: Parts<'_>,
    ) -> Result<Self, StartError> {
        let gic = gic::choose(config, &map, vm.gic_support())?;
        vm.create_gic(&gic)?;
        let spaces = Arc::new(AddressSpaces::default());
        let pci = Arc::new(PciHost::new(Arc::clone(&spaces.memory), Arc::clone(&spaces.ports)));
        let ged = Arc::new(Mutex::new(Ged::new(vm.irq_line(interrupt::GED))));
        let mut board = Self {
            slots: Slots::new(Arc::clone(&pci), vm, interrupt::PCI, &memory),
            uart: serial.map(|port| uart(vm, &port)),
            rtc: Arc::default(),
            gpio: Arc::new(Mutex::new(Pl061::new(vm.irq_line(interrupt::GPIO)))),
            map,
            gic,
            spaces,
            ged,
        };
        let host_bridge = Arc::new(Mutex::new(Bridge::generic()));
        pci.add(HOST_BRIDGE, host_bridge).map_err(super::failed)?;
        if config.pvpanic {
            let pvpanic = Arc::new(Mutex::new(PvpanicPci::new(Arc::clone(&requests))));
            pci.add(PVPANIC, pvpanic).map_err(super::failed)?;
        }
        let ged = Arc::clone(&board.ged);
        let announce = Box::new(move || ged.lock().raise(GedEvent::Pci));
        board.slots.attach_bridges(config.bridges, &requests, announce).map_err(super::failed)?;
        board.attach(&pci).map_err(super::failed)?;
        Ok(board)
    }

    /// Put everything on its bus.
    fn attach(&self, pci: &Arc<PciHost>) -> Result<(), BusError> {
        let ecam = Arc::new(Mutex::new(Ecam::new(Arc::clone(pci))));
        let ports = Arc::new(Mutex::new(PortWindow::new(Arc::clone(&self.spaces.ports))));
        let mut rows: Vec<(Range, SharedIoDevice)> = vec![
            (self.map.ecam, ecam),
            (map::PCI_WINDOW_IO, ports),
            (map::RTC, Arc::clone(&self.rtc) as _),
            (map::GPIO, Arc::clone(&self.gpio) as _),
            (map::GED, Arc::clone(&self.ged) as _),
        ];
        rows.extend(self.uart.iter().map(|uart| (map::UART, Arc::clone(uart) as _)));
        rows.extend(self.slots.hotplug.iter().map(|hotplug| (HOTPLUG, hotplug.registers())));
        if let GicParts::V2 { frame, .. } = self.gic.parts {
            let (first, count) = interrupt::V2M;
            let device = GicV2m::new(interrupt::SHARED + first, count);
            rows.push((frame, Arc::new(Mutex::new(device))));
        }
        rows.into_iter()
            .try_for_each(|(at, device)| self.spaces.memory.insert(at.base, at.size, device))
    }

    /// Configuration space of those buses that there can be.
    fn ecam(&self) -> Range {
        Range::new(self.map.ecam.base, self.slots.buses() * Ecam::BYTES_PER_BUS)
    }
}

impl Board for Virt {
    fn slots(&self) -> &Slots {
        &self.slots
    }

    fn slots_mut(&mut self) -> &mut Slots {
        &mut self.slots
    }

    fn spaces(&self) -> Arc<AddressSpaces> {
        Arc::clone(&self.spaces)
    }

    fn nvdimms(&self) -> &[Range] {
        &self.map.nvdimms
    }

    /// Kernel, initrd, device tree and ACPI tables.
    fn boot(&self, request: &BootRequest<'_>) -> Result<Boot, BootError> {
        let config = request.config;
        let mut plan = boot::plan(&boot::BootRequest {
            kernel: request.kernel,
            initrd_size: request.initrd_size,
            ram: self.map.ram,
            mmfr0: request.facts.mmfr0,
        })?;
        let without_acpi = tables::without_acpi(config, &plan);
        plan.loads.extend(self.tables(request, &plan, without_acpi)?);
        let setup = |index| VcpuSetup::Arm((index == 0).then_some(plan.regs));
        let setups = (0..config.cpus.boot).map(setup).collect();
        Ok(Boot { loads: plan.loads, setups, without_acpi })
    }

    fn assign_bars(&self) -> Result<(), NoRoom> {
        let window = |base, size| Window { base, size };
        let (low, high) = (map::PCI_WINDOW_32, self.map.pci_window_64);
        let half = low.size / 2;
        let windows = match high.size {
            // Addresses have too few bits for a window of its own.
            0 => [window(low.base, half), window(low.base + half, half)],
            size => [window(low.base, low.size), window(high.base, size)],
        };
        let [memory32, memory64] = windows;
        self.slots.assign_bars(&Windows { io: PORTS, memory32, memory64 })
    }

    fn reset(&self) -> Result<(), NoRoom> {
        self.slots.reset();
        self.ged.lock().reset();
        self.gpio.lock().reset();
        self.rtc.lock().reset();
        if let Some(uart) = &self.uart {
            uart.lock().reset();
        }
        self.assign_bars()
    }

    /// A guest listens to one of the two: as its tables tell.
    fn press_power_button(&self) {
        self.ged.lock().raise(GedEvent::PowerButton);
        self.gpio.lock().press(POWER_KEY);
    }
}

/// A serial port between `port` and the guest.
fn uart(vm: &dyn Vm, port: &CharPort) -> Arc<Mutex<Pl011>> {
    /// Characters from the host go to the port's FIFO.
    struct Receiver(Arc<Mutex<Pl011>>);
    impl CharSink for Receiver {
        fn receive(&mut self, data: &[u8]) -> usize {
            self.0.lock().receive(data)
        }
    }
    let resume = port.clone();
    let uart = Arc::new(Mutex::new(Pl011::new(
        vm.irq_line(interrupt::UART),
        Box::new(port.clone()),
        Box::new(move || resume.resume()),
    )));
    port.connect(Box::new(Receiver(Arc::clone(&uart))));
    uart
}
