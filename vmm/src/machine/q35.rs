// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The board `q35`: which device sits where, with which interrupt. It is said once, here: bus registration
//! and ACPI both come from these rows.

mod hotplug;

use std::sync::Arc;

use ecr_arch::acpi::{
    self, Description, LegacyDevice, Nvdimm, PciHost as AcpiPciHost, PciInterrupt,
    PowerManagement as AcpiPowerManagement,
};
use ecr_arch::boot::{self, BootError, BootPlan, BootRequest, Load, ReadAt, Source, e820};
use ecr_arch::layout::Range;
use ecr_arch::layout::q35::{self as map, Q35Map, port};
use ecr_devices::backend::chardev::{CharPort, CharSink};
use ecr_devices::bus::{BusError, SharedIoDevice};
use ecr_devices::chipset::{
    Bridge, Cmos, GuestRequestSink, I8042, PowerManagement, Pvpanic, ResetControl, Uart16550,
};
use ecr_devices::irq::{DoorbellSink, MsiSink, SharedLine};
use ecr_devices::memory::GuestMemoryHandle;
use ecr_devices::pci::assign::{self, NoRoom, Window, Windows};
use ecr_devices::pci::bridge::PciBridge;
use ecr_devices::pci::host::{ConfigPorts, DevFn, Ecam, PciError, PciHost, Place};
use ecr_devices::pci::intx::Pin;
use ecr_devices::virtio::VirtioDevice;
use ecr_devices::virtio::transport::pci::{VirtioPci, Wiring};
use parking_lot::Mutex;

use self::hotplug::Hotplug;
use super::spaces::AddressSpaces;
use crate::config::VmConfig;
use crate::hypervisor::Vm;
use crate::vm::StartError;

/// System control interrupt.
const SCI: u8 = 9;
const COM1_IRQ: u32 = 4;
const RTC_IRQ: u32 = 8;
/// Where INTA to INTD of the root bus lead: the first inputs behind those of ISA.
const PCI_GSIS: [u8; 4] = [16, 17, 18, 19];
const PINS: [Pin; 4] = [Pin::A, Pin::B, Pin::C, Pin::D];
const MCH: DevFn = DevFn::new(0, 0);
const LPC: DevFn = DevFn::new(31, 0);
/// Slots of the root bus that devices can have.
const SLOTS: std::ops::RangeInclusive<u8> = 1..=30;
/// Slot of the first bridge; the others follow it.
const FIRST_BRIDGE: u8 = 2;

/// A row of the board's table: a device on I/O ports.
struct Row {
    /// What ACPI tells of it: name and hardware id. Others are found by custom.
    acpi: Option<(&'static str, &'static str)>,
    ports: Range,
    irq: Option<u32>,
    device: SharedIoDevice,
}

/// The board and what is plugged into it.
pub(super) struct Q35 {
    map: Q35Map,
    spaces: Arc<AddressSpaces>,
    pci: Arc<PciHost>,
    pci_lines: [SharedLine; 4],
    pm: Arc<Mutex<PowerManagement>>,
    memory: GuestMemoryHandle,
    msi: Arc<dyn MsiSink>,
    doorbells: Arc<dyn DoorbellSink>,
    legacy: Vec<LegacyDevice>,
    /// What sits in each slot.
    devices: Vec<Plugged>,
    /// Slots behind bridges, if there are any.
    hotplug: Option<Hotplug>,
}

/// A device in its slot.
#[derive(Debug)]
struct Plugged {
    id: String,
    place: Place,
}

impl std::fmt::Debug for Q35 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Q35")
            .field("map", &self.map)
            .field("devices", &self.devices)
            .finish_non_exhaustive()
    }
}

impl Drop for Q35 {
    /// The host bridge is on the buses that it knows.
    fn drop(&mut self) {
        self.spaces.memory.clear();
        self.spaces.ports.clear();
    }
}

impl Q35 {
    /// The chipset, with nothing plugged in.
    pub(super) fn new(
        config: &VmConfig,
        map: Q35Map,
        vm: &dyn Vm,
        memory: &GuestMemoryHandle,
        requests: &Arc<dyn GuestRequestSink>,
        serial: Option<CharPort>,
    ) -> Result<Self, StartError> {
        let spaces = Arc::new(AddressSpaces::default());
        let pci = Arc::new(PciHost::new(Arc::clone(&spaces.memory), Arc::clone(&spaces.ports)));
        let sci = vm.irq_line(SCI.into());
        let pm = Arc::new(Mutex::new(PowerManagement::new(sci, Arc::clone(requests))));
        let hotplug = (config.bridges > 0).then(|| Hotplug::new(config.bridges, &pci, requests));
        let mut board = Self {
            pci_lines: PCI_GSIS.map(|gsi| SharedLine::new(vm.irq_line(gsi.into()))),
            memory: memory.clone(),
            msi: vm.msi(),
            doorbells: vm.doorbells(),
            map,
            spaces,
            pci,
            pm,
            legacy: Vec::new(),
            devices: Vec::new(),
            hotplug,
        };
        board.attach_chipset().map_err(super::failed)?;
        board.attach_bridges(config.bridges).map_err(super::failed)?;
        let rows = board.rows(config, vm, requests, serial);
        board.attach_rows(rows).map_err(super::failed)?;
        Ok(board)
    }

    fn rows(
        &self,
        config: &VmConfig,
        vm: &dyn Vm,
        requests: &Arc<dyn GuestRequestSink>,
        serial: Option<CharPort>,
    ) -> Vec<Row> {
        let requests = || Arc::clone(requests);
        let cmos = Cmos::new(self.map.low_ram.end(), self.map.high_ram.size);
        let reset = Box::new(ResetControl::new(requests()));
        let mut rows = vec![
            Row {
                acpi: Some(("RTC_", "PNP0B00")),
                ports: Range::new(port::CMOS.into(), 2),
                irq: Some(RTC_IRQ),
                device: Arc::new(Mutex::new(cmos)),
            },
            Row {
                acpi: None,
                ports: Range::new(port::I8042_COMMAND.into(), 1),
                irq: None,
                device: Arc::new(Mutex::new(I8042::new(requests()))),
            },
            Row {
                acpi: None,
                ports: Range::new(port::PM_BASE.into(), PowerManagement::PORTS),
                irq: None,
                device: Arc::clone(&self.pm) as SharedIoDevice,
            },
            Row {
                acpi: None,
                ports: Range::new(port::PCI_CONFIG.into(), ConfigPorts::SIZE),
                irq: None,
                device: Arc::new(Mutex::new(ConfigPorts::new(Arc::clone(&self.pci), Some(reset)))),
            },
        ];
        rows.extend(self.hotplug.as_ref().map(Hotplug::row));
        if config.pvpanic {
            rows.push(Row {
                acpi: Some(("PEVT", "QEMU0001")),
                ports: Range::new(port::PVPANIC.into(), 1),
                irq: None,
                device: Arc::new(Mutex::new(Pvpanic::new(requests()))),
            });
        }
        if let Some(serial) = serial {
            rows.push(Row {
                acpi: Some(("COM1", "PNP0501")),
                ports: Range::new(port::COM1.into(), Uart16550::PORTS),
                irq: Some(COM1_IRQ),
                device: uart(vm, &serial),
            });
        }
        rows
    }

    fn attach_rows(&mut self, rows: Vec<Row>) -> Result<(), BusError> {
        for Row { acpi, ports, irq, device } in rows {
            self.spaces.ports.insert(ports.base, ports.size, device)?;
            if let Some((name, hid)) = acpi {
                self.legacy.push(LegacyDevice { name, hid, ports, irq });
            }
        }
        Ok(())
    }

    fn attach_chipset(&self) -> Result<(), Box<dyn std::error::Error>> {
        let ecam = Ecam::new(Arc::clone(&self.pci));
        self.spaces.memory.insert(map::ECAM.base, map::ECAM.size, Arc::new(Mutex::new(ecam)))?;
        self.pci.add(MCH, Arc::new(Mutex::new(Bridge::mch(map::ECAM.base, map::ECAM.size))))?;
        self.pci.add(LPC, Arc::new(Mutex::new(Bridge::lpc(port::PM_BASE))))?;
        Ok(())
    }

    /// Bridges stand in fixed slots, before any device takes one.
    fn attach_bridges(&mut self, count: u8) -> Result<(), PciError> {
        for index in 0..count {
            let at = DevFn::new(FIRST_BRIDGE + index, 0);
            self.pci.add(at, Arc::new(Mutex::new(PciBridge::new())))?;
            let id = format!("pci-bridge-{index}");
            self.devices.push(Plugged { id, place: at.into() });
        }
        Ok(())
    }

    /// The next free slot of the root bus, for a device that is there from the start.
    pub(super) fn next_slot(&self, id: &str) -> Result<Place, StartError> {
        let place = SLOTS.clone().map(|slot| DevFn::new(slot, 0).into());
        place.into_iter().find(|place| !self.is_taken(*place)).ok_or_else(|| {
            StartError::Machine(format!("no PCI slot is left for device '{id}': use fewer devices"))
        })
    }

    fn is_taken(&self, place: Place) -> bool {
        self.devices.iter().any(|device| device.place == place)
    }

    /// Put a virtio device into a slot.
    pub(super) fn attach_virtio(
        &mut self,
        id: &str,
        place: Place,
        device: Box<dyn VirtioDevice>,
    ) -> Result<(), PciError> {
        let wiring = Wiring {
            memory: self.memory.clone(),
            msi: Arc::clone(&self.msi),
            doorbells: Arc::clone(&self.doorbells),
            intx: self.pci_lines[usize::from(place.interrupt(Pin::A))].driver(),
        };
        let function = VirtioPci::new(device, wiring);
        self.pci.add(place, Arc::new(Mutex::new(function)))?;
        self.devices.push(Plugged { id: id.to_owned(), place });
        Ok(())
    }

    /// What the boot processor finds in memory: kernel, initrd, and the ACPI tables.
    pub(super) fn plan(
        &self,
        config: &VmConfig,
        kernel: &dyn ReadAt,
        initrd_size: Option<u64>,
    ) -> Result<BootPlan, BootError> {
        let tables = acpi::build(&self.describe(config), map::ACPI_TABLES.base);
        let mut plan = boot::plan(&BootRequest {
            kernel,
            initrd_size,
            cmdline: &config.boot.cmdline,
            low_ram: self.map.low_ram,
            memory_map: &e820::q35(&self.map),
            rsdp: tables.base,
        })?;
        let source = Source::Bytes(tables.bytes);
        plan.loads.push(Load { what: "the ACPI tables", address: tables.base, source });
        Ok(plan)
    }

    /// Place all BARs, as firmware would. Once all devices are plugged in, and after a reset.
    pub(super) fn assign_bars(&self) -> Result<(), NoRoom> {
        let window = |range: Range| Window { base: range.base, size: range.size };
        let windows = Windows {
            io: window(map::PCI_WINDOW_IO),
            memory32: window(map::PCI_WINDOW_32),
            memory64: window(self.map.pci_window_64),
        };
        assign::assign(&self.pci, &windows, PCI_GSIS)
    }

    /// Back to the state after power-on.
    pub(super) fn reset(&self) -> Result<(), NoRoom> {
        self.pci.reset();
        self.pm.lock().reset();
        if let Some(hotplug) = &self.hotplug {
            hotplug.reset();
        }
        self.assign_bars()
    }

    /// Devices finish what they have begun and let go of their queues.
    pub(super) fn stop_devices(&self) {
        self.pci.reset();
    }

    pub(super) fn press_power_button(&self) {
        self.pm.lock().press_power_button();
    }

    pub(super) fn spaces(&self) -> Arc<AddressSpaces> {
        Arc::clone(&self.spaces)
    }

    pub(super) fn pci(&self) -> &PciHost {
        &self.pci
    }

    /// Where each persistent memory image is.
    pub(super) fn nvdimms(&self) -> &[Range] {
        &self.map.nvdimms
    }

    /// The id of what sits there; empty for the chipset.
    pub(super) fn id_at(&self, place: Place) -> String {
        let device = self.devices.iter().find(|device| device.place == place);
        device.map_or_else(String::new, |device| device.id.clone())
    }

    /// Whether a device has this id.
    pub(super) fn has_device(&self, id: &str) -> bool {
        self.devices.iter().any(|device| device.id == id)
    }

    /// Where INTA of each device leads, and all pins of the bridges: devices come and go behind them.
    fn interrupts(&self) -> Vec<PciInterrupt> {
        let bridges: Vec<u8> = self.hotplug.iter().flat_map(Hotplug::bridges).collect();
        let on_root = self.devices.iter().filter(|device| device.place.bridge.is_none());
        let routes = on_root.flat_map(|device| {
            let slot = device.place.at.device();
            let pins = if bridges.contains(&slot) { &PINS[..] } else { &PINS[..1] };
            pins.iter().map(move |&pin| PciInterrupt {
                slot,
                pin: pin as u8 - 1,
                gsi: PCI_GSIS[usize::from(device.place.interrupt(pin))].into(),
            })
        });
        routes.collect()
    }

    fn describe(&self, config: &VmConfig) -> Description {
        // Linux looks at every slot of every bus that it is told of: with 256 of them that is more than 8000
        // exits, and half of its boot.
        let buses = 1 + u64::from(config.bridges);
        Description {
            cpus: config.cpus.boot,
            max_cpus: config.cpus.max,
            ram: self.map.ram().collect(),
            module_window: self.map.module_window,
            nvdimms: self
                .map
                .nvdimms
                .iter()
                .map(|&range| Nvdimm { range, read_only: true })
                .collect(),
            local_apic: map::LOCAL_APIC,
            io_apic: map::IO_APIC,
            pci: AcpiPciHost {
                ecam: Range::new(map::ECAM.base, buses * Ecam::BYTES_PER_BUS),
                memory: vec![map::PCI_WINDOW_32, self.map.pci_window_64],
                io: map::PCI_WINDOW_IO,
                config_ports: Range::new(port::PCI_CONFIG.into(), ConfigPorts::SIZE),
                interrupts: self.interrupts(),
                hotplug: self.hotplug.as_ref().map(Hotplug::describe),
            },
            pm: AcpiPowerManagement {
                base: port::PM_BASE,
                sci: SCI,
                reset_port: port::RESET_CONTROL,
                reset_value: ResetControl::VALUE,
            },
            legacy: self.legacy.clone(),
        }
    }
}

/// A serial port between `port` and the guest.
fn uart(vm: &dyn Vm, port: &CharPort) -> SharedIoDevice {
    /// Characters from the host go to the port's FIFO.
    struct Receiver(Arc<Mutex<Uart16550>>);
    impl CharSink for Receiver {
        fn receive(&mut self, data: &[u8]) -> usize {
            self.0.lock().receive(data)
        }
    }
    let resume = port.clone();
    let uart = Arc::new(Mutex::new(Uart16550::new(
        vm.irq_line(COM1_IRQ),
        Box::new(port.clone()),
        Box::new(move || resume.resume()),
    )));
    port.connect(Box::new(Receiver(Arc::clone(&uart))));
    uart
}
