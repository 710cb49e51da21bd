// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What a container has used, in the protocol's terms, which are those of cgroup version 1.
//!
//! The map of memory statistics has version 2's own keys, and beside them what readers of version 1 look for: `cache`,
//! `rss`, `mapped_file`, and the `total_` forms of these and of `inactive_file`.

use std::collections::HashMap;
use std::fs;

use ecr_agent_protocol::agent::{
    BlkioStats, BlkioStatsEntry, CgroupStats, CpuStats, CpuUsage, HugetlbStats, MemoryData,
    MemoryStats, NetworkStats, PidsStats, ThrottlingData,
};
use protobuf::MessageField;

use super::cgroup::Cgroup;

const NETWORK: &str = "/proc/net/dev";
/// "No limit", as a number.
const UNLIMITED: u64 = u64::MAX;
const NANOSECONDS: u64 = 1_000;

/// Everything that `cgroup` counts. What the kernel does not count is 0.
pub fn of(cgroup: &Cgroup) -> CgroupStats {
    let number = |file: &str| number(&cgroup.read(file));
    CgroupStats {
        cpu_stats: MessageField::some(cpu(&cgroup.read("cpu.stat"))),
        memory_stats: MessageField::some(memory(cgroup)),
        pids_stats: MessageField::some(PidsStats {
            current: number("pids.current"),
            limit: limit(&cgroup.read("pids.max"), 0),
            ..Default::default()
        }),
        blkio_stats: MessageField::some(io(&cgroup.read("io.stat"))),
        hugetlb_stats: huge_pages(cgroup),
        ..Default::default()
    }
}

/// The interfaces of the guest, which all containers share, without the loopback.
pub fn network() -> Vec<NetworkStats> {
    interfaces(&fs::read_to_string(NETWORK).unwrap_or_default())
}

fn number(text: &str) -> u64 {
    text.trim().parse().unwrap_or_default()
}

fn limit(text: &str, unlimited: u64) -> u64 {
    if text.trim() == "max" { unlimited } else { number(text) }
}

/// Lines of a key and a value.
fn table(text: &str) -> HashMap<String, u64> {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .filter_map(|(key, value)| Some((key.to_string(), value.trim().parse().ok()?)))
        .collect()
}

fn cpu(text: &str) -> CpuStats {
    let table = table(text);
    let get = |key: &str| table.get(key).copied().unwrap_or_default();
    let time = |key: &str| get(key).saturating_mul(NANOSECONDS);
    CpuStats {
        cpu_usage: MessageField::some(CpuUsage {
            total_usage: time("usage_usec"),
            usage_in_kernelmode: time("system_usec"),
            usage_in_usermode: time("user_usec"),
            ..Default::default()
        }),
        throttling_data: MessageField::some(ThrottlingData {
            periods: get("nr_periods"),
            throttled_periods: get("nr_throttled"),
            throttled_time: time("throttled_usec"),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn memory(cgroup: &Cgroup) -> MemoryStats {
    let mut stats = table(&cgroup.read("memory.stat"));
    let events = table(&cgroup.read("memory.events"));
    let data = |name: &str, failures: u64| MemoryData {
        usage: number(&cgroup.read(&format!("memory.{name}current"))),
        max_usage: number(&cgroup.read(&format!("memory.{name}peak"))),
        limit: limit(&cgroup.read(&format!("memory.{name}max")), UNLIMITED),
        failcnt: failures,
        ..Default::default()
    };
    let get = |key: &str| stats.get(key).copied().unwrap_or_default();
    let (cache, kernel) = (get("file"), get("kernel"));
    let older = [
        ("cache", cache),
        ("rss", get("anon")),
        ("mapped_file", get("file_mapped")),
        ("inactive_file", get("inactive_file")),
    ];
    for (key, value) in older {
        stats.insert(key.into(), value);
        stats.insert(format!("total_{key}"), value);
    }
    MemoryStats {
        cache,
        usage: MessageField::some(data("", events.get("max").copied().unwrap_or_default())),
        swap_usage: MessageField::some(data("swap.", 0)),
        kernel_usage: MessageField::some(MemoryData { usage: kernel, ..Default::default() }),
        use_hierarchy: true,
        stats,
        ..Default::default()
    }
}

/// `MAJOR:MINOR key=value ...` per device.
fn io(text: &str) -> BlkioStats {
    const BYTES: [(&str, &str); 3] =
        [("rbytes", "Read"), ("wbytes", "Write"), ("dbytes", "Discard")];
    const COUNTS: [(&str, &str); 3] = [("rios", "Read"), ("wios", "Write"), ("dios", "Discard")];
    let mut stats = BlkioStats::new();
    for line in text.lines() {
        let Some((device, values)) = line.split_once(' ') else { continue };
        let Some((major, minor)) = device.split_once(':') else { continue };
        let entry = |(key, op): (&str, &str)| {
            let mut pairs = values.split(' ').filter_map(|pair| pair.split_once('='));
            Some(BlkioStatsEntry {
                major: number(major),
                minor: number(minor),
                op: op.into(),
                value: pairs.find(|(name, _)| *name == key).map(|(_, value)| number(value))?,
                ..Default::default()
            })
        };
        stats.io_service_bytes_recursive.extend(BYTES.into_iter().filter_map(entry));
        stats.io_serviced_recursive.extend(COUNTS.into_iter().filter_map(entry));
    }
    stats
}

/// By page size, for each that the kernel has.
fn huge_pages(cgroup: &Cgroup) -> HashMap<String, HugetlbStats> {
    let Ok(entries) = fs::read_dir(cgroup.path()) else { return HashMap::new() };
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    names
        .filter_map(|name| {
            let size = name.strip_prefix("hugetlb.")?.strip_suffix(".current")?;
            let events = table(&cgroup.read(&format!("hugetlb.{size}.events")));
            let usage = number(&cgroup.read(&name));
            // Version 2 does not keep the highest value.
            let stats = HugetlbStats {
                usage,
                max_usage: usage,
                failcnt: events.get("max").copied().unwrap_or_default(),
                ..Default::default()
            };
            (!size.contains('.')).then(|| (size.to_string(), stats))
        })
        .collect()
}

/// proc_pid_net(5): two lines of heading; per interface eight numbers received and eight sent, the first four of each
/// being bytes, packets, errors, drops.
fn interfaces(text: &str) -> Vec<NetworkStats> {
    let interface = |line: &str| {
        let (name, values) = line.split_once(':')?;
        let values: Vec<u64> = values.split_ascii_whitespace().map(number).collect();
        let [rx_bytes, rx_packets, rx_errors, rx_dropped, _, _, _, _, rest @ ..] = &values[..]
        else {
            return None;
        };
        let [tx_bytes, tx_packets, tx_errors, tx_dropped, ..] = rest else { return None };
        Some(NetworkStats {
            name: name.trim().into(),
            rx_bytes: *rx_bytes,
            rx_packets: *rx_packets,
            rx_errors: *rx_errors,
            rx_dropped: *rx_dropped,
            tx_bytes: *tx_bytes,
            tx_packets: *tx_packets,
            tx_errors: *tx_errors,
            tx_dropped: *tx_dropped,
            ..Default::default()
        })
    };
    text.lines().filter_map(interface).filter(|one| one.name != "lo").collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_time_is_in_nanoseconds() {
        let stats = cpu("usage_usec 3000\nuser_usec 2000\nsystem_usec 1000\nnr_throttled 4\nodd\n");
        assert_eq!(stats.cpu_usage.total_usage, 3_000_000);
        assert_eq!(stats.cpu_usage.usage_in_usermode, 2_000_000);
        assert_eq!(stats.cpu_usage.usage_in_kernelmode, 1_000_000);
        assert_eq!(stats.throttling_data.throttled_periods, 4);
    }

    #[test]
    fn block_devices() {
        let stats = io("254:0 rbytes=4096 wbytes=8192 rios=1 wios=2 dbytes=0 dios=0\n7:0\nodd x\n");
        let bytes: Vec<_> = stats
            .io_service_bytes_recursive
            .iter()
            .map(|one| (one.major, one.minor, one.op.as_str(), one.value))
            .collect();
        let expected = [(254, 0, "Read", 4096), (254, 0, "Write", 8192), (254, 0, "Discard", 0)];
        assert_eq!(bytes, expected);
        assert_eq!(stats.io_serviced_recursive.len(), 3);
    }

    #[test]
    fn network_interfaces() {
        let text = "Inter-|   Receive  |  Transmit\n face |bytes packets errs\n\
            \x20   lo: 9 9 9 9 0 0 0 0 9 9 9 9 0 0 0 0\n  eth0: 1 2 3 4 0 0 0 0 5 6 7 8 0 0 0 0\n";
        let all = interfaces(text);
        assert_eq!(all.len(), 1);
        assert_eq!((all[0].name.as_str(), all[0].rx_dropped, all[0].tx_bytes), ("eth0", 4, 5));
    }

    #[test]
    fn limits() {
        assert_eq!(limit("max\n", 7), 7);
        assert_eq!(limit("12\n", 7), 12);
    }
}
