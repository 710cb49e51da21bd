// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Resource limits of the OCI runtime specification (config-linux.md, "Control groups"), which are written for cgroup
//! version 1, as files of version 2. The protocol has no "unset": 0 means that nothing is said.
//!
//! Left out, as version 2 has no such thing: real-time CPU, kernel memory, network classes, swappiness, and the OOM
//! killer's switch. Device rules are left to the virtual machine, which has no device that is not its pod's.

use std::fmt::Write;

use anyhow::{Result, bail};
use ecr_agent_protocol::oci::{
    LinuxBlockIO, LinuxCPU, LinuxMemory, LinuxResources, LinuxThrottleDevice,
};

/// A value for a file of a cgroup.
#[derive(Debug, PartialEq, Eq)]
pub struct Setting {
    pub file: String,
    pub value: String,
}

/// The period of version 2 where none is said, in microseconds.
const DEFAULT_PERIOD: u64 = 100_000;

/// Everything that `resources` says, in the order of writing. `has` tells which optional files the kernel has.
pub fn settings(resources: &LinuxResources, has: impl Fn(&str) -> bool) -> Result<Vec<Setting>> {
    let mut settings = Vec::new();
    let mut set = |file: &str, value: String| settings.push(Setting { file: file.into(), value });
    if let Some(memory) = resources.memory.as_ref() {
        limit_memory(memory, &has, &mut set)?;
    }
    if let Some(cpu) = resources.cpu.as_ref() {
        limit_cpu(cpu, &mut set);
    }
    let pids = resources.pids.get_or_default().limit;
    if pids != 0 {
        set("pids.max", or_max(pids));
    }
    for one in &resources.hugepage_limits {
        let size = one.pagesize.as_str();
        if size.is_empty() || !size.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
            bail!("huge page size {size:?} is no size");
        }
        // Limits come for the host's sizes. What the guest does not have needs no limit.
        for file in [format!("hugetlb.{size}.max"), format!("hugetlb.{size}.rsvd.max")] {
            if has(&file) {
                set(&file, one.limit.to_string());
            }
        }
    }
    if let Some(io) = resources.block_io.as_ref() {
        limit_io(io, &has, &mut set);
    }
    Ok(settings)
}

fn or_max(value: i64) -> String {
    if value < 0 { "max".into() } else { value.to_string() }
}

fn limit_memory(
    memory: &LinuxMemory,
    has: impl Fn(&str) -> bool,
    set: &mut impl FnMut(&str, String),
) -> Result<()> {
    const SWAP: &str = "memory.swap.max";
    if memory.reservation != 0 {
        set("memory.low", or_max(memory.reservation));
    }
    // Version 1 counts memory and swap together. A kernel without swap needs no limit.
    if memory.swap > 0 {
        match memory.swap.checked_sub(memory.limit) {
            Some(swap) if memory.limit > 0 && swap >= 0 => {
                if has(SWAP) {
                    set(SWAP, swap.to_string());
                }
            }
            _ => bail!(
                "memory and swap together are limited to {}, memory alone to {}",
                memory.swap,
                memory.limit
            ),
        }
    } else if memory.swap < 0 && has(SWAP) {
        set(SWAP, "max".into());
    }
    if memory.limit != 0 {
        set("memory.max", or_max(memory.limit));
    }
    Ok(())
}

fn limit_cpu(cpu: &LinuxCPU, set: &mut impl FnMut(&str, String)) {
    if cpu.shares != 0 {
        set("cpu.weight", weight_of_shares(cpu.shares).to_string());
    }
    if cpu.quota != 0 || cpu.period != 0 {
        let period = if cpu.period == 0 { DEFAULT_PERIOD } else { cpu.period };
        let quota = if cpu.quota > 0 { cpu.quota.to_string() } else { "max".into() };
        set("cpu.max", format!("{quota} {period}"));
    }
    if !cpu.cpus.is_empty() {
        set("cpuset.cpus", cpu.cpus.clone());
    }
    if !cpu.mems.is_empty() {
        set("cpuset.mems", cpu.mems.clone());
    }
}

/// From 2..=262144 to 1..=10000, in proportion.
fn weight_of_shares(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9_999 / 262_142
}

/// From 10..=1000 to 1..=10000, in proportion.
fn weight_of_io(weight: u32) -> u32 {
    1 + (weight.clamp(10, 1_000) - 10) * 9_999 / 990
}

fn limit_io(io: &LinuxBlockIO, has: impl Fn(&str) -> bool, set: &mut impl FnMut(&str, String)) {
    let bfq = has("io.bfq.weight");
    if io.weight != 0 {
        if bfq {
            set("io.bfq.weight", io.weight.to_string());
        } else {
            set("io.weight", format!("default {}", weight_of_io(io.weight)));
        }
    }
    for one in &io.weight_device {
        let (file, weight) = if bfq {
            ("io.bfq.weight", one.weight)
        } else {
            ("io.weight", weight_of_io(one.weight))
        };
        set(file, format!("{}:{} {weight}", one.major, one.minor));
    }
    let limits = [
        ("rbps", &io.throttle_read_bps_device),
        ("wbps", &io.throttle_write_bps_device),
        ("riops", &io.throttle_read_iops_device),
        ("wiops", &io.throttle_write_iops_device),
    ];
    for (key, devices) in limits {
        for LinuxThrottleDevice { major, minor, rate, .. } in devices {
            let mut value = format!("{major}:{minor} {key}=");
            // A String takes everything.
            let _ = if *rate == 0 { write!(value, "max") } else { write!(value, "{rate}") };
            set("io.max", value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ecr_agent_protocol::oci::{LinuxHugepageLimit, LinuxPids};
    use protobuf::MessageField;

    fn written(resources: &LinuxResources, present: &[&str]) -> Vec<(String, String)> {
        let settings = settings(resources, |file| present.contains(&file)).unwrap();
        settings.into_iter().map(|one| (one.file, one.value)).collect()
    }

    fn pair(file: &str, value: &str) -> (String, String) {
        (file.into(), value.into())
    }

    #[test]
    fn nothing_said_is_nothing_written() {
        let resources = LinuxResources {
            memory: MessageField::some(LinuxMemory::new()),
            cpu: MessageField::some(LinuxCPU::new()),
            pids: MessageField::some(LinuxPids::new()),
            block_io: MessageField::some(LinuxBlockIO::new()),
            ..Default::default()
        };
        assert_eq!(written(&resources, &[]), []);
    }

    #[test]
    fn limits_of_version_1_in_version_2() {
        let resources = LinuxResources {
            memory: MessageField::some(LinuxMemory {
                limit: 64 << 20,
                swap: 96 << 20,
                reservation: -1,
                ..Default::default()
            }),
            cpu: MessageField::some(LinuxCPU {
                shares: 1024,
                quota: 50_000,
                cpus: "0-1".into(),
                ..Default::default()
            }),
            pids: MessageField::some(LinuxPids { limit: -1, ..Default::default() }),
            hugepage_limits: vec![LinuxHugepageLimit {
                pagesize: "2MB".into(),
                limit: 0,
                ..Default::default()
            }],
            ..Default::default()
        };
        let expected = [
            pair("memory.low", "max"),
            pair("memory.swap.max", "33554432"),
            pair("memory.max", "67108864"),
            pair("cpu.weight", "39"),
            pair("cpu.max", "50000 100000"),
            pair("cpuset.cpus", "0-1"),
            pair("pids.max", "max"),
            pair("hugetlb.2MB.max", "0"),
        ];
        let present = ["memory.swap.max", "hugetlb.2MB.max"];
        assert_eq!(written(&resources, &present), expected);
        let fewer = written(&resources, &[]);
        assert_eq!(fewer.len(), expected.len() - 2, "no swap and no huge pages in the guest");
    }

    #[test]
    fn block_devices() {
        let rate =
            LinuxThrottleDevice { major: 254, minor: 16, rate: 1 << 20, ..Default::default() };
        let resources = LinuxResources {
            block_io: MessageField::some(LinuxBlockIO {
                weight: 1000,
                throttle_read_bps_device: vec![rate],
                ..Default::default()
            }),
            ..Default::default()
        };
        let limit = pair("io.max", "254:16 rbps=1048576");
        assert_eq!(written(&resources, &[]), [pair("io.weight", "default 10000"), limit.clone()]);
        let present = ["io.bfq.weight"];
        assert_eq!(written(&resources, &present), [pair("io.bfq.weight", "1000"), limit]);
    }

    #[test]
    fn the_ends_of_the_scales() {
        assert_eq!((weight_of_shares(1), weight_of_shares(u64::MAX)), (1, 10_000));
        assert_eq!((weight_of_io(0), weight_of_io(u32::MAX)), (1, 10_000));
    }

    #[test]
    fn nonsense_is_refused() {
        let memory = LinuxMemory { limit: 10, swap: 5, ..Default::default() };
        let resources = LinuxResources { memory: MessageField::some(memory), ..Default::default() };
        assert!(settings(&resources, |_| false).is_err());
        let page = LinuxHugepageLimit { pagesize: "../x".into(), ..Default::default() };
        let resources = LinuxResources { hugepage_limits: vec![page], ..Default::default() };
        assert!(settings(&resources, |_| false).is_err());
    }
}
