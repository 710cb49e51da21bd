// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! How the guest learns what the machine has. There is always a device tree; a kernel that is an EFI program finds ACPI's
//! tables as well, through those of EFI, and is asked to prefer them.

use ecr_arch::acpi::virt::{self as acpi, Description, Device};
use ecr_arch::acpi::{Nvdimm, PciHost, PciInterrupt, Registers};
use ecr_arch::boot::arm64::{BootPlan, CMDLINE_MAX};
use ecr_arch::boot::{BootError, Load, Source};
use ecr_arch::efi;
use ecr_arch::fdt::{self, Chosen, EfiTables, Seed};
use ecr_arch::layout::Range;
use ecr_arch::layout::virt::{self as map, interrupt};

use super::super::board::BootRequest;
use super::{HOTPLUG, POWER_KEY, Virt, gic};
use crate::config::VmConfig;

/// Makes Linux prefer ACPI to a device tree that is more than empty, and fall back to that where it has no ACPI.
const PREFER_ACPI: &str = "acpi=on ";

/// Where a guest boots from the device tree alone: what to do to change that.
pub(super) fn without_acpi(config: &VmConfig, plan: &BootPlan) -> Option<&'static str> {
    if !config.acpi {
        Some("leave acpi on")
    } else if config.boot.cmdline.split_ascii_whitespace().any(|word| word == "acpi=off") {
        Some("take acpi=off out of the kernel's command line")
    } else if !plan.efi {
        log::warn!(
            "the kernel has no EFI stub, so it cannot find ACPI's tables: it boots from the device tree, and devices \
             cannot be added while it runs"
        );
        Some("use a kernel built with CONFIG_EFI and CONFIG_ACPI")
    } else {
        None
    }
}

impl Virt {
    /// All tables, as they lie in memory; those of ACPI unless `without_acpi`.
    pub(super) fn tables(
        &self,
        request: &BootRequest<'_>,
        plan: &BootPlan,
        without_acpi: Option<&'static str>,
    ) -> Result<Vec<Load>, BootError> {
        let config = request.config;
        let acpi = without_acpi.is_none();
        if let Some(remedy) = without_acpi
            && !self.map.nvdimms.is_empty()
        {
            let what = "persistent memory (an image can be a disk as well)";
            return Err(BootError::NeedsAcpi { what, remedy });
        }
        let mut loads = Vec::new();
        let efi =
            if acpi { Some(self.efi_tables(config.cpus.boot, plan, &mut loads)?) } else { None };
        let prefix = if acpi { PREFER_ACPI } else { "" };
        let (length, limit) = (config.boot.cmdline.len(), CMDLINE_MAX - prefix.len());
        if length > limit {
            return Err(BootError::CmdlineTooLong { length, limit });
        }
        let cmdline = [prefix, &config.boot.cmdline].concat();
        let chosen = Chosen { cmdline: &cmdline, initrd: plan.initrd, seed: seed(), efi };
        let tree = self.device_tree(config.cpus.boot, chosen)?;
        loads.push(load("the device tree", plan.fdt, tree)?);
        Ok(loads)
    }

    fn device_tree(&self, cpus: u32, chosen: Chosen<'_>) -> Result<Vec<u8>, BootError> {
        let device = |at, spi| fdt::Device { at, spi };
        let description = fdt::Description {
            cpus,
            ram: self.map.ram,
            gic: gic::for_device_tree(&self.gic),
            timers: interrupt::TIMERS,
            uart: self.uart.as_ref().map(|_| device(map::UART, interrupt::UART)),
            rtc: map::RTC,
            gpio: device(map::GPIO, interrupt::GPIO),
            power_key: POWER_KEY.into(),
            pci: fdt::PciHost {
                ecam: self.ecam(),
                memory: vec![map::PCI_WINDOW_32, self.map.pci_window_64],
                io: map::PCI_WINDOW_IO,
                interrupts: interrupt::PCI,
            },
            chosen,
        };
        fdt::build(&description).map_err(|error| BootError::Table {
            what: "the device tree",
            problem: error.to_string(),
        })
    }

    /// ACPI's tables, and behind them EFI's.
    fn efi_tables(
        &self,
        cpus: u32,
        plan: &BootPlan,
        loads: &mut Vec<Load>,
    ) -> Result<EfiTables, BootError> {
        let room = plan.tables;
        let acpi = acpi::build(&self.describe(cpus), room.base);
        let acpi_size = (acpi.bytes.len() as u64).next_multiple_of(efi::SIZE);
        let used = Range::new(room.base, (acpi_size + efi::SIZE).next_multiple_of(efi::GRANULE));
        let description = efi::Description { rsdp: acpi.base, ram: self.map.ram, tables: used };
        let at = room.base + acpi_size;
        let (page, tables) = efi::build(&description, at);
        loads.push(load(
            "the ACPI tables",
            Range::new(room.base, room.size - efi::GRANULE),
            acpi.bytes,
        )?);
        loads.push(load("the EFI tables", Range::new(at, room.end() - at), page)?);
        Ok(tables)
    }

    fn describe(&self, cpus: u32) -> Description {
        let spi = |number: u32| interrupt::SHARED + number;
        let nvdimm = |&range: &Range| Nvdimm { range, read_only: true };
        let interrupts = self.slots.interrupts().into_iter();
        Description {
            cpus,
            nvdimms: self.map.nvdimms.iter().map(nvdimm).collect(),
            gic: gic::for_acpi(&self.gic),
            timers: interrupt::TIMERS.map(|number| interrupt::PRIVATE + number),
            uart: self
                .uart
                .as_ref()
                .map(|_| Device { at: map::UART, interrupt: spi(interrupt::UART) }),
            ged: Device { at: map::GED, interrupt: spi(interrupt::GED) },
            pci: PciHost {
                ecam: self.ecam(),
                memory: vec![map::PCI_WINDOW_32, self.map.pci_window_64],
                io: Range::new(0, map::PCI_WINDOW_IO.size),
                io_in_memory: Some(map::PCI_WINDOW_IO.base),
                keep_addresses: true,
                config_ports: None,
                interrupts: interrupts
                    .map(|pin| PciInterrupt { gsi: spi(pin.gsi), ..pin })
                    .collect(),
                hotplug: self.slots.describe_hotplug(Registers::Memory(HOTPLUG)),
            },
        }
    }
}

/// `bytes` at the start of `room`.
fn load(what: &'static str, room: Range, bytes: Vec<u8>) -> Result<Load, BootError> {
    let size = bytes.len() as u64;
    if size > room.size {
        let problem = format!("there is room for {} bytes, and it has {size}", room.size);
        return Err(BootError::Table { what, problem });
    }
    Ok(Load { what, address: room.base, source: Source::Bytes(bytes) })
}

/// Random bytes for one boot. Early in the host's life there may be none; then the guest has its own sources.
fn seed() -> Option<Seed> {
    let mut bytes = [0; 40];
    let filled = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::NONBLOCK);
    filled.ok().filter(|&count| count == bytes.len())?;
    let (kaslr, rng) = bytes.split_at(8);
    Some(Seed {
        kaslr: kaslr.iter().fold(0, |seed, &byte| seed << 8 | u64::from(byte)),
        rng: std::array::from_fn(|index| rng[index]),
    })
}
