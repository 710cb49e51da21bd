// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Real guests, one after the other in one process, as a shim's process would run them over the years. A
//! program of its own, for nobody else may open anything meanwhile.

#![allow(clippy::unwrap_used)] // A failed step is a failed test.

use std::collections::BTreeSet;
use std::fs;
use std::thread;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use ecr_tests::place::{KERNEL, Place, enough};
use ecr_tests::skip::same_everywhere;
use ecr_vmm::control::ShutdownReason;
use ecr_vmm::{VmOptions, cmdline, hypervisor, start};

/// On hardware, and in an emulated host: what one boot leaves behind shows with fewer as well.
const BOOTS: (usize, usize) = (50, 20);
/// Caches of the C library and of the allocator are filled by then.
const WARM_UP: usize = 3;
/// Until what the process holds stays the same.
const LOOKS: usize = 100;

/// What this process holds: descriptors by their target, threads and mappings by number.
#[derive(Debug, PartialEq, Eq)]
struct Holdings {
    descriptors: Vec<String>,
    threads: usize,
    /// Stacks, memory of guests, rings: all that is not the program itself.
    mappings: usize,
    files: BTreeSet<String>,
}

impl Holdings {
    /// A thread that has been joined is still listed for a moment: look until nothing changes.
    fn settled(directory: &std::path::Path) -> Result<Self> {
        let mut last = Self::now(directory)?;
        for _ in 0..LOOKS {
            thread::sleep(Duration::from_millis(100));
            let now = Self::now(directory)?;
            if now == last {
                return Ok(now);
            }
            last = now;
        }
        bail!("after {LOOKS} looks it still changes: {last:#?}")
    }

    fn now(directory: &std::path::Path) -> Result<Self> {
        let mut descriptors: Vec<String> = fs::read_dir("/proc/self/fd")?
            .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
            .map(|target| target.display().to_string())
            .filter(|target| !target.starts_with("/proc/"))
            .collect();
        descriptors.sort();
        let mappings = fs::read_to_string("/proc/self/maps")?;
        let files = fs::read_dir(directory)?
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect::<Result<_>>()?;
        Ok(Self {
            descriptors,
            threads: fs::read_dir("/proc/self/task")?.count(),
            mappings: mappings
                .lines()
                .filter(|line| line.contains("memfd") || line.ends_with(" 0 "))
                .count(),
            files,
        })
    }
}

#[test]
#[ignore = "boots guests"]
fn many_boots_in_one_process_leave_nothing_behind() -> Result<()> {
    same_everywhere();
    let place = Place::from_environment()?;
    let scratch = tempfile::tempdir()?;
    let path = |name: &str| scratch.path().join(name).display().to_string();
    let host = hypervisor::host()?;
    let mut before = None;
    for boot in 0..WARM_UP + enough(BOOTS.0, BOOTS.1) {
        let invocation = cmdline::parse([
            "ecr-vmm",
            "--kernel",
            &place.guest(KERNEL).display().to_string(),
            "--image",
            &place.guest("rootfs.img").display().to_string(),
            "--memory",
            "128M",
            "--rng",
            "--console",
            &format!("unix:{}", path("console.sock")),
            "--vsock",
            &format!("cid=3,socket={}", path("vsock.sock")),
            "--cmdline",
            "quiet ecr.exec=/bin/true",
        ])?;
        let options = VmOptions {
            hypervisor: host.clone(),
            qmp: Some(scratch.path().join("qmp.sock")),
            paused: false,
        };
        let reason = start(invocation.config, options)?.wait();
        ensure!(reason == ShutdownReason::GuestShutdown, "boot {boot}: {reason:?}");
        if boot + 1 == WARM_UP {
            before = Some(Holdings::settled(scratch.path())?);
        }
    }
    let after = Holdings::settled(scratch.path())?;
    ensure!(before.as_ref() == Some(&after), "before: {before:#?}\nafter: {after:#?}");
    Ok(())
}
