// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The board `q35`: which device sits where, with which interrupt. It is said once, here: bus registration
//! and ACPI both come from these rows.

use std::sync::Arc;

use ecr_arch::acpi::q35::{
    self as acpi, Description, LegacyDevice, PowerManagement as AcpiPowerManagement,
};
use ecr_arch::acpi::{Nvdimm, PciHost as AcpiPciHost, Registers};
use ecr_arch::boot::x86::{self as boot, e820};
use ecr_arch::boot::{BootError, Load, Source};
use ecr_arch::layout::Range;
use ecr_arch::layout::q35::{self as map, Q35Map, port};
use ecr_arch::x86::cpuid::{self, Topology};
use ecr_devices::backend::chardev::{CharPort, CharSink};
use ecr_devices::bus::{BusError, SharedIoDevice};
use ecr_devices::chipset::{
    Bridge, Cmos, GuestRequestSink, I8042, PowerManagement, Pvpanic, ResetControl, Uart16550,
};
use ecr_devices::hotplug::PciHotplug;
use ecr_devices::pci::assign::{NoRoom, Window, Windows};
use ecr_devices::pci::host::{ConfigPorts, DevFn, Ecam, PciHost};
use parking_lot::Mutex;

use super::board::{Board, Boot, BootRequest};
use super::map::Parts;
use super::slots::Slots;
use super::spaces::AddressSpaces;
use crate::config::VmConfig;
use crate::hypervisor::{VcpuSetup, Vm, X86VcpuSetup};
use crate::vm::StartError;

/// System control interrupt.
const SCI: u8 = 9;
const COM1_IRQ: u32 = 4;
const RTC_IRQ: u32 = 8;
/// Where INTA to INTD of the root bus lead: the first inputs behind those of ISA.
const PCI_GSIS: [u8; 4] = [16, 17, 18, 19];
const HOTPLUG_PORTS: Range = Range::new(port::PCI_HOTPLUG as u64, PciHotplug::PORTS);
const MCH: DevFn = DevFn::new(0, 0);
const LPC: DevFn = DevFn::new(31, 0);
/// The general-purpose event of PCI hot-plug, as with QEMU.
const HOTPLUG_EVENT: u8 = 1;

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
    slots: Slots,
    pm: Arc<Mutex<PowerManagement>>,
    legacy: Vec<LegacyDevice>,
}

impl std::fmt::Debug for Q35 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Q35")
            .field("map", &self.map)
            .field("slots", &self.slots)
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
        map: Q35Map,
        Parts { config, vm, memory, requests, serial }: Parts<'_>,
    ) -> Result<Self, StartError> {
        let spaces = Arc::new(AddressSpaces::default());
        let pci = Arc::new(PciHost::new(Arc::clone(&spaces.memory), Arc::clone(&spaces.ports)));
        let sci = vm.irq_line(SCI.into());
        let pm = Arc::new(Mutex::new(PowerManagement::new(sci, Arc::clone(&requests))));
        let slots = Slots::new(Arc::clone(&pci), vm, PCI_GSIS, &memory);
        let mut board = Self { map, spaces, pci, slots, pm, legacy: Vec::new() };
        board.attach_chipset().map_err(super::failed)?;
        let pm = Arc::clone(&board.pm);
        let announce = Box::new(move || pm.lock().raise_event(HOTPLUG_EVENT));
        board.slots.attach_bridges(config.bridges, &requests, announce).map_err(super::failed)?;
        let rows = board.rows(config, vm, &requests, serial);
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
        rows.extend(self.slots.hotplug.as_ref().map(|hotplug| Row {
            acpi: None,
            ports: HOTPLUG_PORTS,
            irq: None,
            device: hotplug.registers(),
        }));
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

    fn describe(&self, config: &VmConfig) -> Description {
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
                ecam: Range::new(map::ECAM.base, self.slots.buses() * Ecam::BYTES_PER_BUS),
                memory: vec![map::PCI_WINDOW_32, self.map.pci_window_64],
                io: map::PCI_WINDOW_IO,
                // On x86 that is what operating systems do unasked.
                keep_addresses: false,
                io_in_memory: None,
                config_ports: Some(Range::new(port::PCI_CONFIG.into(), ConfigPorts::SIZE)),
                interrupts: self.slots.interrupts(),
                hotplug: self.slots.describe_hotplug(Registers::Ports(HOTPLUG_PORTS)),
            },
            hotplug_event: HOTPLUG_EVENT,
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

impl Board for Q35 {
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

    /// Kernel, initrd, and the ACPI tables.
    fn boot(&self, request: &BootRequest<'_>) -> Result<Boot, BootError> {
        let config = request.config;
        let tables = acpi::build(&self.describe(config), map::ACPI_TABLES.base);
        let mut plan = boot::plan(&boot::BootRequest {
            kernel: request.kernel,
            initrd_size: request.initrd_size,
            cmdline: &config.boot.cmdline,
            low_ram: self.map.low_ram,
            memory_map: &e820::q35(&self.map),
            rsdp: tables.base,
        })?;
        let source = Source::Bytes(tables.bytes);
        plan.loads.push(Load { what: "the ACPI tables", address: tables.base, source });
        let setup = |index| {
            let topology = Topology { apic_id: index, cores: config.cpus.max };
            VcpuSetup::X86(X86VcpuSetup {
                cpuid: cpuid::for_vcpu(&request.host.cpuid, topology, request.facts.tsc_khz),
                regs: (index == 0).then_some(plan.regs),
            })
        };
        let setups = (0..config.cpus.boot).map(setup).collect();
        Ok(Boot { loads: plan.loads, setups, without_acpi: None })
    }

    fn assign_bars(&self) -> Result<(), NoRoom> {
        let window = |range: Range| Window { base: range.base, size: range.size };
        self.slots.assign_bars(&Windows {
            io: window(map::PCI_WINDOW_IO),
            memory32: window(map::PCI_WINDOW_32),
            memory64: window(self.map.pci_window_64),
        })
    }

    fn reset(&self) -> Result<(), NoRoom> {
        self.slots.reset();
        self.pm.lock().reset();
        self.assign_bars()
    }

    fn press_power_button(&self) {
        self.pm.lock().press_power_button();
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
