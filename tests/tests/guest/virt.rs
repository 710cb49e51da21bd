// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What only the machine type `virt` has: two ways to describe the machine, and Arm's interrupt controller.

use std::collections::BTreeSet;
use std::fs;
use std::time::UNIX_EPOCH;

use anyhow::{Context, Result, ensure};
use ecr_tests::guest::Boot;
use ecr_tests::place::KERNEL;
use ecr_tests::qmp::Qmp;
use ecr_tests::skip::skip;
use serde_json::json;

use crate::{BAD_ARGUMENTS, ends_well, place, powers_off, value};

/// Which of the two a guest uses.
const DESCRIPTION: &str = "[ -e /sys/firmware/acpi/tables/APIC ] && echo BY=acpi; \
                           [ -e /sys/firmware/devicetree/base/psci ] && echo BY=tree; \
                           echo TIME=$(date +%s); echo CPUS=$(nproc); echo MEMORY=$(grep MemTotal /proc/meminfo); \
                           echo HOST=$(ls -d /sys/devices/pci0000:00 /sys/devices/platform/*/pci0000:00)";

/// In seconds: guests and hosts agree better than that, and those without a clock not at all.
const DAY: u64 = 86_400;

fn only_on_virt() {
    if !cfg!(target_arch = "aarch64") {
        skip("the machine type virt is for aarch64");
    }
}

fn described_by(boot: Boot, by: &str, cpus: &str, host: &str) -> Result<String> {
    let said = powers_off(boot.script(DESCRIPTION))?;
    for (key, wanted) in [("BY", by), ("CPUS", cpus), ("HOST", host)] {
        ensure!(value(&said, key)? == wanted, "{key} is not {wanted}:\n{said}");
    }
    let (time, host) = (value(&said, "TIME")?.parse::<u64>()?, UNIX_EPOCH.elapsed()?.as_secs());
    ensure!(time.abs_diff(host) < DAY, "it is {time} in the guest, and {host} here:\n{said}");
    Ok(said)
}

#[test]
#[ignore = "boots a guest"]
fn acpi_is_preferred_and_pci_is_where_agents_look() -> Result<()> {
    only_on_virt();
    let boot = Boot::kernel(&place(), KERNEL).image(&place(), "pmem").with(&["--memory", "256M"]);
    described_by(boot, "acpi", "1", "/sys/devices/pci0000:00").map(drop)
}

#[test]
#[ignore = "boots a guest"]
fn a_device_tree_alone_from_a_disk() -> Result<()> {
    only_on_virt();
    let boot = Boot::kernel(&place(), KERNEL).image(&place(), "disk").with(&[
        "--machine",
        "virt,acpi=off",
        "--memory",
        "256M",
    ]);
    described_by(boot, "tree", "1", "/sys/devices/platform/4010000000.pcie/pci0000:00").map(drop)
}

#[test]
#[ignore = "boots a guest"]
fn a_self_unpacking_efi_program_with_a_device_tree_alone_4_cpus_and_4_gib() -> Result<()> {
    only_on_virt();
    let boot = Boot::kernel(&place(), "vmlinuz.efi").image(&place(), "disk").with(&[
        "--machine",
        "virt,acpi=off",
        "--memory",
        "4G",
        "--cpus",
        "4",
    ]);
    let host = "/sys/devices/platform/4010000000.pcie/pci0000:00";
    let said = described_by(boot, "tree", "4", host)?;
    let digits: String = value(&said, "MEMORY")?.chars().filter(char::is_ascii_digit).collect();
    ensure!(digits.parse::<u64>()? > 3800 << 10, "{said}");
    Ok(())
}

/// The kernel's first instruction is an EFI program's mark as well; without it, the kernel is none.
#[test]
#[ignore = "boots a guest"]
fn a_kernel_without_efi_falls_back_to_the_device_tree() -> Result<()> {
    const NOP: [u8; 4] = 0xD503_201F_u32.to_le_bytes();
    only_on_virt();
    let scratch = tempfile::tempdir()?;
    let mut kernel = fs::read(place().guest(KERNEL))?;
    kernel[..4].copy_from_slice(&NOP);
    let path = scratch.path().join("Image");
    fs::write(&path, kernel)?;
    let path = path.display().to_string();
    let boot = Boot::kernel(&place(), &path).image(&place(), "disk").with(&["--log", "warn"]);
    let host = "/sys/devices/platform/4010000000.pcie/pci0000:00";
    let said = described_by(boot, "tree", "1", host)?;
    ensure!(said.contains("the kernel has no EFI stub"), "{said}");
    Ok(())
}

#[test]
#[ignore = "boots a guest"]
fn the_power_key_of_a_device_tree_is_answered() -> Result<()> {
    only_on_virt();
    let scratch = tempfile::tempdir()?;
    let socket = scratch.path().join("qmp.sock");
    let mut guest = Boot::kernel(&place(), KERNEL)
        .initrd(&place(), "initrd.img")
        .with(&["--machine", "virt,acpi=off"])
        .qmp(&socket)
        .start()?;
    guest.wait_ready()?;
    Qmp::connect(&socket)?.execute("system_powerdown")?;
    ends_well(guest).map(drop)
}

/// Messages through either interrupt controller, by the name that Linux gives them.
const BY_ITS: &str = "ITS-PCI-MSIX";
const BY_GICV2M: &str = "GICv2m-PCI-MSIX";

/// Guests have the GIC that this host has, unless they ask for another.
fn only_on_a_gic(messages: &str) -> Result<()> {
    only_on_virt();
    let interrupts = fs::read_to_string("/proc/interrupts").context("read /proc/interrupts")?;
    match (interrupts.contains("GICv3"), messages) {
        (true, BY_ITS) | (false, BY_GICV2M) => Ok(()),
        (true, _) => skip("this host has a GICv3"),
        (false, _) => skip("this host has a GICv2"),
    }
}

/// Devices whose messages arrived, by what /proc/interrupts says.
fn heard_of<'a>(said: &'a str, messages: &str) -> BTreeSet<&'a str> {
    let lines = said.lines().filter(|line| line.contains(messages));
    let heard = lines.filter_map(|line| {
        let mut words = line.split_whitespace();
        let count: u64 = words.nth(1)?.parse().ok()?;
        words.last()?.strip_suffix("-req.0").filter(|_| count > 0)
    });
    heard.collect()
}

fn messages_of_8_devices_come_through(messages: &str, machines: &[&str]) -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let disks: Vec<String> = (0..7)
        .map(|index| {
            let path = scratch.path().join(format!("{index}.img"));
            fs::File::create(&path)?.set_len(1 << 20)?;
            Ok(path.display().to_string())
        })
        .collect::<Result<_>>()?;
    let arguments: Vec<&str> = disks.iter().flat_map(|disk| ["--disk", disk.as_str()]).collect();
    for machine in machines {
        let boot = Boot::kernel(&place(), KERNEL)
            .image(&place(), "disk")
            .with(&["--machine", machine])
            .with(&arguments)
            .script(
                "for n in a b c d e f g h; do dd if=/dev/vd$n of=/dev/null bs=4k count=1 2>/dev/null; done; \
                 cat /proc/interrupts",
            );
        let said = powers_off(boot)?;
        let heard = heard_of(&said, messages);
        ensure!(heard.len() == 8, "{machine}: {heard:?}:\n{said}");
    }
    Ok(())
}

#[test]
#[ignore = "boots a guest"]
fn messages_of_8_devices_come_through_the_its() -> Result<()> {
    only_on_a_gic(BY_ITS)?;
    messages_of_8_devices_come_through(BY_ITS, &["virt", "virt,acpi=off"])
}

/// All behind a bridge send as the bridge does, and the guest makes room for that sender once.
#[test]
#[ignore = "boots a guest"]
fn messages_of_devices_behind_a_bridge_come_through_the_its() -> Result<()> {
    only_on_a_gic(BY_ITS)?;
    let scratch = tempfile::tempdir()?;
    let socket = scratch.path().join("qmp.sock");
    let mut guest = Boot::kernel(&place(), KERNEL)
        .image(&place(), "pmem")
        .with(&["--bridges", "1"])
        .qmp(&socket)
        .script(
            "echo LISTENING=yes; for n in a b c; do until [ -b /dev/vd$n ]; do sleep 0.05; done; \
             dd if=/dev/vd$n of=/dev/null bs=4k count=1 2>/dev/null; done; cat /proc/interrupts; echo DONE=yes",
        )
        .start()?;
    guest.wait_for("LISTENING=yes")?;
    let mut qmp = Qmp::connect(&socket)?;
    for name in ["a", "b", "c"] {
        let disk = scratch.path().join(name);
        fs::File::create(&disk)?.set_len(1 << 20)?;
        qmp.execute_with(
            "blockdev-add",
            &json!({"driver": "raw", "node-name": name, "file": {"driver": "file", "filename": disk}}),
        )?;
        qmp.execute_with(
            "device_add",
            &json!({"driver": "virtio-blk-pci", "id": name, "drive": name, "bus": "pci-bridge-0"}),
        )?;
    }
    guest.wait_for("DONE=yes")?;
    let said = ends_well(guest)?;
    let heard = heard_of(&said, &format!("{BY_ITS}-0000:01:"));
    ensure!(heard.len() == 3, "{heard:?}:\n{said}");
    Ok(())
}

#[test]
#[ignore = "boots a guest"]
fn gicv2_hosts_give_guests_one_with_a_frame_for_messages() -> Result<()> {
    only_on_a_gic(BY_GICV2M)?;
    messages_of_8_devices_come_through(BY_GICV2M, &["virt", "virt,gic-version=2,acpi=off"])
}

#[test]
#[ignore = "boots a guest"]
fn gicv2_is_as_new_after_a_reset() -> Result<()> {
    only_on_a_gic(BY_GICV2M)?;
    let scratch = tempfile::tempdir()?;
    let socket = scratch.path().join("qmp.sock");
    let mut guest = Boot::kernel(&place(), KERNEL)
        .initrd(&place(), "initrd.img")
        .with(&["--cpus", "2"])
        .qmp(&socket)
        .start()?;
    guest.wait_ready()?;
    let mut qmp = Qmp::connect(&socket)?;
    qmp.execute("system_reset")?;
    qmp.wait_event("RESET")?;
    guest.wait_ready()?;
    qmp.execute("system_powerdown")?;
    ends_well(guest).map(drop)
}

#[test]
#[ignore = "starts the program"]
fn gicv2_hosts_have_no_gicv3_and_no_more_than_8_cpus() -> Result<()> {
    only_on_a_gic(BY_GICV2M)?;
    let kernel = place().guest(KERNEL).display().to_string();
    is_refused(&["--kernel", &kernel, "--machine", "virt,gic-version=3"], "a GICv2 alone")?;
    is_refused(&["--kernel", &kernel, "--cpus", "9"], "at most 8")
}

/// The program does not start with `arguments`, and says why.
fn is_refused(arguments: &[&str], why: &str) -> Result<()> {
    let output = std::process::Command::new(place().vmm())
        .args(arguments)
        .output()
        .context("start ecr-vmm")?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    println!("{arguments:?}: {said}");
    ensure!(output.status.code() == Some(BAD_ARGUMENTS), "{arguments:?}: {said}");
    ensure!(said.contains(why), "{arguments:?} does not say {why:?}: {said}");
    Ok(())
}

#[test]
#[ignore = "starts the program"]
fn what_arm_cannot_do_is_refused_with_one_clear_line() -> Result<()> {
    only_on_virt();
    let kernel = place().guest(KERNEL).display().to_string();
    let image = place().guest("rootfs.img").display().to_string();
    let scratch = tempfile::tempdir()?;
    let xz = scratch.path().join("Image.xz");
    fs::write(&xz, b"\xfd7zXZ\0 and so on")?;
    let xz = xz.display().to_string();
    is_refused(&["--kernel", &xz], "xz-compressed")?;
    is_refused(&["--kernel", &kernel, "--machine", "q35"], "needs an x86_64 host")?;
    is_refused(&["--kernel", &kernel, "--machine", "virt,gic-version=2", "--cpus", "9"], "GICv2")?;
    is_refused(
        &["--kernel", &kernel, "--memory", "256M,max=500000G,slots=1"],
        "bits would be needed",
    )?;
    is_refused(&["--kernel", &kernel, "--machine", "virt,acpi=off", "--image", &image], "disk")
}
