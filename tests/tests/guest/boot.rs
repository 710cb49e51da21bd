// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Kernels and how they come to run: files, roots, processors, memory; and how a guest ends.

use std::os::unix::net::UnixListener;

use anyhow::{Result, ensure};
use ecr_tests::guest::Boot;
use ecr_tests::place::{COMPRESSED_KERNEL, KERNEL};
use ecr_tests::qmp::Qmp;
use ecr_tests::skip::same_everywhere;

use crate::{BAD_ARGUMENTS, PANICKED, ends_well, place, powers_off, value};

const LOOK_AROUND: &str = "echo CPUS=$(nproc); echo ROOT=$(mount | grep -m1 /dev/root); \
                           echo MEMORY=$(grep MemTotal /proc/meminfo)";

fn memory_mib(said: &str) -> Result<u64> {
    let digits: String = value(said, "MEMORY")?.chars().filter(char::is_ascii_digit).collect();
    Ok(digits.parse::<u64>()? / 1024)
}

fn image_boots(kernel: &str, kind: &str, cpus: &str, memory: &str, at_least: u64) -> Result<()> {
    let boot = Boot::kernel(&place(), kernel)
        .image(&place(), kind)
        .with(&["--cpus", cpus, "--memory", memory])
        .script(LOOK_AROUND);
    let said = powers_off(boot)?;
    ensure!(value(&said, "CPUS")? == cpus, "{said}");
    ensure!(memory_mib(&said)? >= at_least, "{said}");
    Ok(())
}

#[test]
#[ignore = "boots a guest"]
fn our_kernel_from_persistent_memory() -> Result<()> {
    image_boots(KERNEL, "pmem", "1", "128M", 90)
}

#[test]
#[ignore = "boots a guest"]
fn our_kernel_from_persistent_memory_with_4_cpus_and_6_gib() -> Result<()> {
    image_boots(KERNEL, "pmem", "4", "6G", 5800)
}

#[test]
#[ignore = "boots a guest"]
fn our_kernel_from_a_disk() -> Result<()> {
    image_boots(KERNEL, "disk", "1", "256M", 200)
}

#[test]
#[ignore = "boots a guest"]
fn a_compressed_kernel_from_persistent_memory() -> Result<()> {
    image_boots(COMPRESSED_KERNEL, "pmem", "1", "256M", 200)
}

#[test]
#[ignore = "boots a guest"]
fn a_compressed_kernel_from_a_disk_with_4_cpus() -> Result<()> {
    image_boots(COMPRESSED_KERNEL, "disk", "4", "256M", 200)
}

#[test]
#[ignore = "boots a guest"]
fn persistent_memory_is_mapped_directly_and_read_only() -> Result<()> {
    let boot = Boot::kernel(&place(), KERNEL)
        .image(&place(), "pmem")
        .script("echo DAX=$(grep -c dax=always /proc/mounts); echo RO=$(cat /sys/block/pmem0/ro)");
    let said = powers_off(boot)?;
    ensure!(value(&said, "DAX")? == "1" && value(&said, "RO")? == "1", "{said}");
    Ok(())
}

/// The agent alone: it stays up until the power button is pressed.
fn initrd_answers_the_power_button(kernel: &str, initrd: &str, arguments: &[&str]) -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let socket = scratch.path().join("qmp.sock");
    let mut guest = Boot::kernel(&place(), kernel)
        .initrd(&place(), initrd)
        .with(arguments)
        .qmp(&socket)
        .start()?;
    guest.wait_ready()?;
    let mut qmp = Qmp::connect(&socket)?;
    qmp.execute("system_powerdown")?;
    qmp.wait_event("POWERDOWN")?;
    let shutdown = qmp.wait_event("SHUTDOWN")?;
    ensure!(shutdown["data"]["guest"] == true, "{shutdown}");
    ends_well(guest)?;
    ensure!(!socket.exists(), "the QMP socket is left behind");
    Ok(())
}

#[test]
#[ignore = "boots a guest"]
fn our_kernel_with_an_initrd() -> Result<()> {
    initrd_answers_the_power_button(KERNEL, "initrd.img", &["--memory", "128M"])
}

#[test]
#[ignore = "boots a guest"]
fn a_compressed_kernel_with_an_initrd_and_4_cpus() -> Result<()> {
    initrd_answers_the_power_button(COMPRESSED_KERNEL, "initrd.img", &["--cpus", "4"])
}

#[test]
#[ignore = "boots a guest"]
fn a_stock_debian_kernel_with_its_modules() -> Result<()> {
    // Its virtio console is a module, so there is no console on it at first.
    let serial = ["--memory", "512M", "--console", "off", "--serial", "stdio"];
    initrd_answers_the_power_button("debian/vmlinuz", "debian/initrd.img", &serial)
}

#[test]
#[ignore = "boots a guest"]
fn a_guest_that_reboots_starts_again() -> Result<()> {
    let mut guest =
        Boot::kernel(&place(), KERNEL).image(&place(), "pmem").script("reboot -f").start()?;
    guest.wait_ready()?;
    guest.wait_ready()?;
    Ok(())
}

#[test]
#[ignore = "boots a guest"]
fn a_panic_ends_with_status_3_and_says_so() -> Result<()> {
    let boot = Boot::kernel(&place(), KERNEL)
        .image(&place(), "pmem")
        .script("echo c > /proc/sysrq-trigger");
    let (status, said) = boot.start()?.wait_end()?;
    ensure!(status == PANICKED, "exit status {status}:\n{said}");
    Ok(())
}

#[test]
#[ignore = "starts the program"]
fn what_cannot_work_is_refused_with_one_clear_line() -> Result<()> {
    same_everywhere();
    let scratch = tempfile::tempdir()?;
    let in_use = scratch.path().join("in-use.sock");
    let _listener = UnixListener::bind(&in_use)?;
    let busy = format!("unix:{}", in_use.display());
    let kernel = place().guest(KERNEL).display().to_string();
    let initrd = place().guest("initrd.img").display().to_string();
    for (arguments, status, text) in [
        (vec!["--kernel", "/none"], BAD_ARGUMENTS, "/none"),
        (vec!["--kernel", initrd.as_str()], BAD_ARGUMENTS, "cpio archive"),
        (vec!["--kernel", kernel.as_str(), "--memory", "8M"], BAD_ARGUMENTS, "more memory"),
        (vec!["--kernel", kernel.as_str(), "--cpus", "0"], BAD_ARGUMENTS, "0"),
        (vec!["--kernel", kernel.as_str(), "--qmp", busy.as_str()], BAD_ARGUMENTS, "in-use.sock"),
        (vec!["--kernel", kernel.as_str(), "--image", "/tmp"], BAD_ARGUMENTS, "/tmp"),
        (vec!["--kernel", kernel.as_str(), "--memory", "lots"], BAD_ARGUMENTS, "lots"),
    ] {
        let output = std::process::Command::new(place().vmm()).args(&arguments).output()?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        println!("{arguments:?}: {said}");
        ensure!(output.status.code() == Some(status), "{arguments:?}: {}: {said}", output.status);
        ensure!(said.contains(text), "{arguments:?} does not say {text:?}: {said}");
    }
    Ok(())
}
