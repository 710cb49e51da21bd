// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The device tree of the machine `virt`: Devicetree Specification 0.4, and the bindings in Linux
//! `Documentation/devicetree/bindings`, which each node's function names.

mod gic;
mod pci;

use vm_fdt::{Error, FdtWriter};

use crate::arm64::id::affinity;
use crate::layout::Range;
pub use gic::Gic;
pub use pci::PciHost;

/// A machine as a device tree shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description<'a> {
    /// Processors that are there.
    pub cpus: u32,
    /// RAM.
    pub ram: Range,
    /// Interrupt controller.
    pub gic: Gic,
    /// Private interrupts of the timers: secure, non-secure, virtual, hypervisor's.
    pub timers: [u32; 4],
    /// Serial port, a PL011.
    pub uart: Option<Device>,
    /// Real-time clock, a PL031 without an alarm.
    pub rtc: Range,
    /// General-purpose input, a PL061.
    pub gpio: Device,
    /// Which of its lines is the power key.
    pub power_key: u32,
    /// The PCI host bridge.
    pub pci: PciHost,
    /// What the kernel is told.
    pub chosen: Chosen<'a>,
}

/// A device in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Device {
    /// Where.
    pub at: Range,
    /// Its shared interrupt, level-triggered.
    pub spi: u32,
}

/// What the kernel is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chosen<'a> {
    /// Its command line.
    pub cmdline: &'a str,
    /// Its initial RAM disk.
    pub initrd: Option<Range>,
    /// Random bytes, never used before: for the place of the kernel, and for its generator. Linux takes whatever is
    /// here for random.
    pub seed: Option<Seed>,
    /// Tables as EFI firmware would leave them.
    pub efi: Option<EfiTables>,
}

/// Random bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seed {
    /// Where the kernel goes.
    pub kaslr: u64,
    /// The first of what its generator is seeded with.
    pub rng: [u8; 32],
}

/// Where EFI's tables are (Linux `Documentation/arch/arm/uefi.rst`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EfiTables {
    /// Address of the system table.
    pub system_table: u64,
    /// The memory map.
    pub memory_map: Range,
    /// Bytes of each of its descriptors.
    pub descriptor_size: u32,
    /// Version of its descriptors.
    pub descriptor_version: u32,
}

/// Nodes that others refer to.
mod phandle {
    pub(super) const GIC: u32 = 1;
    pub(super) const MSI: u32 = 2;
    pub(super) const CLOCK: u32 = 3;
    pub(super) const GPIO: u32 = 4;
}

/// First cell of an interrupt: its kind; last cell: its trigger.
const SHARED: u32 = 0;
const PRIVATE: u32 = 1;
const LEVEL_HIGH: u32 = 4;

/// Frequency of the clock of serial port, real-time clock and general-purpose input, in Hz.
const CLOCK_FREQUENCY: u32 = 24_000_000;
/// `KEY_POWER` of Linux's input events.
const KEY_POWER: u32 = 116;
/// `linux,uefi-secure-boot`, which kernels of distributions ask for: 2 stands for off, less for unknown.
const SECURE_BOOT_OFF: u32 = 2;

type Outcome = Result<(), Error>;

/// Build the tree.
///
/// # Errors
/// A value cannot be written, such as a command line with a zero byte.
pub fn build(machine: &Description<'_>) -> Result<Vec<u8>, Error> {
    let mut fdt = FdtWriter::new()?;
    let root = fdt.begin_node("")?;
    fdt.property_string("compatible", "linux,dummy-virt")?;
    fdt.property_string("model", "linux,dummy-virt")?;
    fdt.property_u32("#address-cells", 2)?;
    fdt.property_u32("#size-cells", 2)?;
    fdt.property_u32("interrupt-parent", phandle::GIC)?;
    fdt.property_null("dma-coherent")?;
    chosen(&mut fdt, machine)?;
    memory(&mut fdt, machine.ram)?;
    cpus(&mut fdt, machine.cpus)?;
    psci(&mut fdt)?;
    timer(&mut fdt, machine)?;
    gic::node(&mut fdt, &machine.gic)?;
    clock(&mut fdt)?;
    if let Some(uart) = &machine.uart {
        primecell(&mut fdt, "serial", "arm,pl011", uart.at, |fdt| {
            interrupt(fdt, uart.spi)?;
            fdt.property_array_u32("clocks", &[phandle::CLOCK, phandle::CLOCK])?;
            strings(fdt, "clock-names", &["uartclk", "apb_pclk"])
        })?;
    }
    primecell(&mut fdt, "rtc", "arm,pl031", machine.rtc, bus_clock)?;
    gpio(&mut fdt, machine)?;
    pci::node(&mut fdt, &machine.pci, machine.gic.takes_messages())?;
    fdt.end_node(root)?;
    fdt.finish()
}

/// `reg`, in two cells each.
fn reg(fdt: &mut FdtWriter, ranges: &[Range]) -> Outcome {
    let cells: Vec<u64> = ranges.iter().flat_map(|range| [range.base, range.size]).collect();
    fdt.property_array_u64("reg", &cells)
}

fn strings(fdt: &mut FdtWriter, name: &str, values: &[&str]) -> Outcome {
    fdt.property_string_list(name, values.iter().map(|&value| value.to_owned()).collect())
}

/// Specification, section 3.6; EFI: `Documentation/arch/arm/uefi.rst`.
fn chosen(fdt: &mut FdtWriter, machine: &Description<'_>) -> Outcome {
    let chosen = &machine.chosen;
    let node = fdt.begin_node("chosen")?;
    fdt.property_string("bootargs", chosen.cmdline)?;
    if let Some(uart) = &machine.uart {
        fdt.property_string("stdout-path", &format!("/serial@{:x}", uart.at.base))?;
    }
    if let Some(initrd) = chosen.initrd {
        fdt.property_u64("linux,initrd-start", initrd.base)?;
        fdt.property_u64("linux,initrd-end", initrd.end())?;
    }
    if let Some(seed) = &chosen.seed {
        fdt.property_u64("kaslr-seed", seed.kaslr)?;
        fdt.property("rng-seed", &seed.rng)?;
    }
    if let Some(efi) = &chosen.efi {
        let size = u32::try_from(efi.memory_map.size).unwrap_or(u32::MAX);
        fdt.property_u64("linux,uefi-system-table", efi.system_table)?;
        fdt.property_u64("linux,uefi-mmap-start", efi.memory_map.base)?;
        fdt.property_u32("linux,uefi-mmap-size", size)?;
        fdt.property_u32("linux,uefi-mmap-desc-size", efi.descriptor_size)?;
        fdt.property_u32("linux,uefi-mmap-desc-ver", efi.descriptor_version)?;
        fdt.property_u32("linux,uefi-secure-boot", SECURE_BOOT_OFF)?;
    }
    fdt.end_node(node)
}

/// Specification, section 3.4.
fn memory(fdt: &mut FdtWriter, ram: Range) -> Outcome {
    let node = fdt.begin_node(&format!("memory@{:x}", ram.base))?;
    fdt.property_string("device_type", "memory")?;
    reg(fdt, &[ram])?;
    fdt.end_node(node)
}

/// `arm/cpus.yaml`.
fn cpus(fdt: &mut FdtWriter, count: u32) -> Outcome {
    let node = fdt.begin_node("cpus")?;
    fdt.property_u32("#address-cells", 1)?;
    fdt.property_u32("#size-cells", 0)?;
    for index in 0..count {
        let affinity = affinity(index) as u32;
        let cpu = fdt.begin_node(&format!("cpu@{affinity:x}"))?;
        fdt.property_string("device_type", "cpu")?;
        fdt.property_string("compatible", "arm,armv8")?;
        fdt.property_u32("reg", affinity)?;
        fdt.property_string("enable-method", "psci")?;
        fdt.end_node(cpu)?;
    }
    fdt.end_node(node)
}

/// `arm/psci.yaml`.
fn psci(fdt: &mut FdtWriter) -> Outcome {
    let node = fdt.begin_node("psci")?;
    strings(fdt, "compatible", &["arm,psci-1.0", "arm,psci-0.2"])?;
    fdt.property_string("method", "hvc")?;
    fdt.end_node(node)
}

/// `timer/arm,arch_timer.yaml`.
fn timer(fdt: &mut FdtWriter, machine: &Description<'_>) -> Outcome {
    let flags = LEVEL_HIGH | machine.gic.private_flags(machine.cpus);
    let cells: Vec<u32> = machine.timers.iter().flat_map(|&ppi| [PRIVATE, ppi, flags]).collect();
    let node = fdt.begin_node("timer")?;
    fdt.property_string("compatible", "arm,armv8-timer")?;
    fdt.property_array_u32("interrupts", &cells)?;
    fdt.property_null("always-on")?;
    fdt.end_node(node)
}

/// `clock/fixed-clock.yaml`.
fn clock(fdt: &mut FdtWriter) -> Outcome {
    let node = fdt.begin_node("apb-pclk")?;
    fdt.property_string("compatible", "fixed-clock")?;
    fdt.property_u32("#clock-cells", 0)?;
    fdt.property_u32("clock-frequency", CLOCK_FREQUENCY)?;
    fdt.property_string("clock-output-names", "clk24mhz")?;
    fdt.property_phandle(phandle::CLOCK)?;
    fdt.end_node(node)
}

/// `arm/primecell.yaml`, `serial/pl011.yaml`, `rtc/arm,pl031.yaml`, `gpio/pl061-gpio.yaml`; `more` adds what only one of
/// them has.
fn primecell(
    fdt: &mut FdtWriter,
    name: &str,
    compatible: &str,
    at: Range,
    more: impl FnOnce(&mut FdtWriter) -> Outcome,
) -> Outcome {
    let node = fdt.begin_node(&format!("{name}@{:x}", at.base))?;
    strings(fdt, "compatible", &[compatible, "arm,primecell"])?;
    reg(fdt, &[at])?;
    more(fdt)?;
    fdt.end_node(node)
}

fn interrupt(fdt: &mut FdtWriter, spi: u32) -> Outcome {
    fdt.property_array_u32("interrupts", &[SHARED, spi, LEVEL_HIGH])
}

fn bus_clock(fdt: &mut FdtWriter) -> Outcome {
    fdt.property_u32("clocks", phandle::CLOCK)?;
    fdt.property_string("clock-names", "apb_pclk")
}

/// With the keys of `input/gpio-keys.yaml`.
fn gpio(fdt: &mut FdtWriter, machine: &Description<'_>) -> Outcome {
    primecell(fdt, "gpio", "arm,pl061", machine.gpio.at, |fdt| {
        interrupt(fdt, machine.gpio.spi)?;
        bus_clock(fdt)?;
        fdt.property_null("gpio-controller")?;
        fdt.property_u32("#gpio-cells", 2)?;
        fdt.property_null("interrupt-controller")?;
        fdt.property_u32("#address-cells", 0)?;
        fdt.property_u32("#interrupt-cells", 2)?;
        fdt.property_phandle(phandle::GPIO)
    })?;
    let keys = fdt.begin_node("gpio-keys")?;
    fdt.property_string("compatible", "gpio-keys")?;
    let key = fdt.begin_node("key-power")?;
    fdt.property_string("label", "power")?;
    fdt.property_u32("linux,code", KEY_POWER)?;
    fdt.property_array_u32("gpios", &[phandle::GPIO, machine.power_key, 0])?;
    fdt.end_node(key)?;
    fdt.end_node(keys)
}

#[cfg(test)]
mod tests;
