// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What a container uses, as the agent tells it from the guest's cgroups, in the message that containerd expects of
//! this host: `io.containerd.cgroups.v1.Metrics` or `io.containerd.cgroups.v2.Metrics`. The guest may have the other
//! version of cgroups than the host, so each number is looked for under the names of both.

use std::collections::{BTreeMap, HashMap};

use containerd_shim_protos::{cgroups, cgroups_v2};
use ecr_agent_protocol::agent::{
    BlkioStats, BlkioStatsEntry, CgroupStats, MemoryData, StatsContainerResponse,
};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};
use protobuf::well_known_types::any::Any;
use protobuf::{MessageField, MessageFull};

use crate::error::{Error, Kind, Result};

/// The agent counts CPU time in nanoseconds, and cgroup v2 in microseconds.
const NANOS_PER_MICRO: u64 = 1000;

/// The statistics in the message of this host's cgroup version.
pub(super) fn for_host(stats: &StatsContainerResponse) -> Result<Any> {
    let unified =
        statfs("/sys/fs/cgroup").is_ok_and(|fs| fs.filesystem_type() == CGROUP2_SUPER_MAGIC);
    if unified { pack(&v2(stats)) } else { pack(&v1(stats)) }
}

fn pack<M: MessageFull>(message: &M) -> Result<Any> {
    let value = message
        .write_to_bytes()
        .map_err(|error| Error::new(Kind::Internal, format!("encode statistics: {error}")))?;
    Ok(Any { type_url: M::descriptor().full_name().to_owned(), value, ..Default::default() })
}

/// Figures by name, each looked for under several.
struct Figures<'a>(&'a HashMap<String, u64>);

impl Figures<'_> {
    fn first(&self, names: &[&str]) -> u64 {
        names.iter().find_map(|name| self.0.get(*name)).copied().unwrap_or_default()
    }
}

fn v1(stats: &StatsContainerResponse) -> cgroups::metrics::Metrics {
    let group = stats.cgroup_stats.get_or_default();
    cgroups::metrics::Metrics {
        hugetlb: hugetlb_v1(group),
        pids: MessageField::some(pids_v1(group)),
        cpu: MessageField::some(cpu_v1(group)),
        memory: MessageField::some(memory_v1(group)),
        blkio: MessageField::some(blkio_v1(group.blkio_stats.get_or_default())),
        network: network_v1(stats),
        ..Default::default()
    }
}

fn pids_v1(group: &CgroupStats) -> cgroups::metrics::PidsStat {
    let pids = group.pids_stats.get_or_default();
    cgroups::metrics::PidsStat { current: pids.current, limit: pids.limit, ..Default::default() }
}

fn cpu_v1(group: &CgroupStats) -> cgroups::metrics::CPUStat {
    let cpu = group.cpu_stats.get_or_default();
    let (usage, throttling) =
        (cpu.cpu_usage.get_or_default(), cpu.throttling_data.get_or_default());
    let usage = cgroups::metrics::CPUUsage {
        total: usage.total_usage,
        kernel: usage.usage_in_kernelmode,
        user: usage.usage_in_usermode,
        per_cpu: usage.percpu_usage.clone(),
        ..Default::default()
    };
    let throttling = cgroups::metrics::Throttle {
        periods: throttling.periods,
        throttled_periods: throttling.throttled_periods,
        throttled_time: throttling.throttled_time,
        ..Default::default()
    };
    cgroups::metrics::CPUStat {
        usage: MessageField::some(usage),
        throttling: MessageField::some(throttling),
        ..Default::default()
    }
}

fn memory_v1(group: &CgroupStats) -> cgroups::metrics::MemoryStat {
    let memory = group.memory_stats.get_or_default();
    let figures = Figures(&memory.stats);
    // With a hierarchy, Kata reports what the whole of it uses.
    let own_or_total = |own: &str, total: &str, unified: &str| {
        let names = if memory.use_hierarchy { [total, own] } else { [own, total] };
        figures.first(&[names[0], names[1], unified])
    };
    cgroups::metrics::MemoryStat {
        cache: own_or_total("cache", "total_cache", "file"),
        rss: own_or_total("rss", "total_rss", "anon"),
        mapped_file: own_or_total("mapped_file", "total_mapped_file", "file_mapped"),
        dirty: own_or_total("dirty", "total_dirty", "file_dirty"),
        writeback: own_or_total("writeback", "total_writeback", "file_writeback"),
        pg_fault: own_or_total("pgfault", "total_pgfault", "pgfault"),
        pg_maj_fault: own_or_total("pgmajfault", "total_pgmajfault", "pgmajfault"),
        inactive_anon: figures.first(&["inactive_anon"]),
        active_anon: figures.first(&["active_anon"]),
        inactive_file: figures.first(&["inactive_file"]),
        active_file: figures.first(&["active_file"]),
        unevictable: figures.first(&["unevictable"]),
        hierarchical_memory_limit: figures.first(&["hierarchical_memory_limit"]),
        hierarchical_swap_limit: figures.first(&["hierarchical_memsw_limit"]),
        total_cache: figures.first(&["total_cache", "file"]),
        total_rss: figures.first(&["total_rss", "anon"]),
        total_mapped_file: figures.first(&["total_mapped_file", "file_mapped"]),
        total_pg_fault: figures.first(&["total_pgfault", "pgfault"]),
        total_pg_maj_fault: figures.first(&["total_pgmajfault", "pgmajfault"]),
        total_inactive_anon: figures.first(&["total_inactive_anon", "inactive_anon"]),
        total_active_anon: figures.first(&["total_active_anon", "active_anon"]),
        // kubelet's working set is usage less this.
        total_inactive_file: figures.first(&["total_inactive_file", "inactive_file"]),
        total_active_file: figures.first(&["total_active_file", "active_file"]),
        total_unevictable: figures.first(&["total_unevictable", "unevictable"]),
        usage: entry(&memory.usage),
        swap: entry(&memory.swap_usage),
        kernel: entry(&memory.kernel_usage),
        ..Default::default()
    }
}

/// Always there, since `ctr` does not look whether it is.
fn entry(data: &MessageField<MemoryData>) -> MessageField<cgroups::metrics::MemoryEntry> {
    let data = data.get_or_default();
    MessageField::some(cgroups::metrics::MemoryEntry {
        limit: data.limit,
        usage: data.usage,
        max: data.max_usage,
        failcnt: data.failcnt,
        ..Default::default()
    })
}

fn blkio_v1(blkio: &BlkioStats) -> cgroups::metrics::BlkIOStat {
    let entries = |entries: &[BlkioStatsEntry]| -> Vec<cgroups::metrics::BlkIOEntry> {
        let convert = |entry: &BlkioStatsEntry| cgroups::metrics::BlkIOEntry {
            op: entry.op.clone(),
            major: entry.major,
            minor: entry.minor,
            value: entry.value,
            ..Default::default()
        };
        entries.iter().map(convert).collect()
    };
    cgroups::metrics::BlkIOStat {
        io_service_bytes_recursive: entries(&blkio.io_service_bytes_recursive),
        io_serviced_recursive: entries(&blkio.io_serviced_recursive),
        io_queued_recursive: entries(&blkio.io_queued_recursive),
        io_service_time_recursive: entries(&blkio.io_service_time_recursive),
        io_wait_time_recursive: entries(&blkio.io_wait_time_recursive),
        io_merged_recursive: entries(&blkio.io_merged_recursive),
        io_time_recursive: entries(&blkio.io_time_recursive),
        sectors_recursive: entries(&blkio.sectors_recursive),
        ..Default::default()
    }
}

fn hugetlb_v1(group: &CgroupStats) -> Vec<cgroups::metrics::HugetlbStat> {
    let sorted: BTreeMap<_, _> = group.hugetlb_stats.iter().collect();
    sorted
        .into_iter()
        .map(|(size, huge)| cgroups::metrics::HugetlbStat {
            usage: huge.usage,
            max: huge.max_usage,
            failcnt: huge.failcnt,
            pagesize: size.clone(),
            ..Default::default()
        })
        .collect()
}

fn network_v1(stats: &StatsContainerResponse) -> Vec<cgroups::metrics::NetworkStat> {
    stats
        .network_stats
        .iter()
        .map(|net| cgroups::metrics::NetworkStat {
            name: net.name.clone(),
            rx_bytes: net.rx_bytes,
            rx_packets: net.rx_packets,
            rx_errors: net.rx_errors,
            rx_dropped: net.rx_dropped,
            tx_bytes: net.tx_bytes,
            tx_packets: net.tx_packets,
            tx_errors: net.tx_errors,
            tx_dropped: net.tx_dropped,
            ..Default::default()
        })
        .collect()
}

fn v2(stats: &StatsContainerResponse) -> cgroups_v2::metrics::Metrics {
    let group = stats.cgroup_stats.get_or_default();
    let pids = group.pids_stats.get_or_default();
    let pids = cgroups_v2::metrics::PidsStat {
        current: pids.current,
        limit: pids.limit,
        ..Default::default()
    };
    cgroups_v2::metrics::Metrics {
        pids: MessageField::some(pids),
        cpu: MessageField::some(cpu_v2(group)),
        memory: MessageField::some(memory_v2(group)),
        io: MessageField::some(io_v2(group.blkio_stats.get_or_default())),
        hugetlb: hugetlb_v2(group),
        network: network_v2(stats),
        ..Default::default()
    }
}

fn cpu_v2(group: &CgroupStats) -> cgroups_v2::metrics::CPUStat {
    let cpu = group.cpu_stats.get_or_default();
    let (usage, throttling) =
        (cpu.cpu_usage.get_or_default(), cpu.throttling_data.get_or_default());
    cgroups_v2::metrics::CPUStat {
        usage_usec: usage.total_usage / NANOS_PER_MICRO,
        user_usec: usage.usage_in_usermode / NANOS_PER_MICRO,
        system_usec: usage.usage_in_kernelmode / NANOS_PER_MICRO,
        nr_periods: throttling.periods,
        nr_throttled: throttling.throttled_periods,
        throttled_usec: throttling.throttled_time / NANOS_PER_MICRO,
        ..Default::default()
    }
}

fn memory_v2(group: &CgroupStats) -> cgroups_v2::metrics::MemoryStat {
    let memory = group.memory_stats.get_or_default();
    let figures = Figures(&memory.stats);
    let (usage, swap) = (memory.usage.get_or_default(), memory.swap_usage.get_or_default());
    cgroups_v2::metrics::MemoryStat {
        anon: figures.first(&["anon", "total_rss", "rss"]),
        file: figures.first(&["file", "total_cache", "cache"]),
        kernel_stack: figures.first(&["kernel_stack"]),
        slab: figures.first(&["slab"]),
        sock: figures.first(&["sock"]),
        shmem: figures.first(&["shmem", "total_shmem"]),
        file_mapped: figures.first(&["file_mapped", "total_mapped_file", "mapped_file"]),
        file_dirty: figures.first(&["file_dirty", "total_dirty", "dirty"]),
        file_writeback: figures.first(&["file_writeback", "total_writeback", "writeback"]),
        anon_thp: figures.first(&["anon_thp", "total_rss_huge", "rss_huge"]),
        inactive_anon: figures.first(&["total_inactive_anon", "inactive_anon"]),
        active_anon: figures.first(&["total_active_anon", "active_anon"]),
        inactive_file: figures.first(&["total_inactive_file", "inactive_file"]),
        active_file: figures.first(&["total_active_file", "active_file"]),
        unevictable: figures.first(&["total_unevictable", "unevictable"]),
        slab_reclaimable: figures.first(&["slab_reclaimable"]),
        slab_unreclaimable: figures.first(&["slab_unreclaimable"]),
        pgfault: figures.first(&["total_pgfault", "pgfault"]),
        pgmajfault: figures.first(&["total_pgmajfault", "pgmajfault"]),
        workingset_refault: figures.first(&["workingset_refault", "workingset_refault_file"]),
        workingset_activate: figures.first(&["workingset_activate", "workingset_activate_file"]),
        workingset_nodereclaim: figures.first(&["workingset_nodereclaim"]),
        pgrefill: figures.first(&["pgrefill"]),
        pgscan: figures.first(&["pgscan"]),
        pgsteal: figures.first(&["pgsteal"]),
        pgactivate: figures.first(&["pgactivate"]),
        pgdeactivate: figures.first(&["pgdeactivate"]),
        pglazyfree: figures.first(&["pglazyfree"]),
        pglazyfreed: figures.first(&["pglazyfreed"]),
        thp_fault_alloc: figures.first(&["thp_fault_alloc"]),
        thp_collapse_alloc: figures.first(&["thp_collapse_alloc"]),
        usage: usage.usage,
        usage_limit: usage.limit,
        max_usage: usage.max_usage,
        swap_usage: swap.usage,
        swap_limit: swap.limit,
        ..Default::default()
    }
}

/// cgroup v2 has one entry for each device.
fn io_v2(blkio: &BlkioStats) -> cgroups_v2::metrics::IOStat {
    let mut devices: BTreeMap<(u64, u64), cgroups_v2::metrics::IOEntry> = BTreeMap::new();
    let counted = blkio.io_service_bytes_recursive.iter().map(|entry| (entry, true));
    let served = blkio.io_serviced_recursive.iter().map(|entry| (entry, false));
    for (entry, bytes) in counted.chain(served) {
        let device = devices.entry((entry.major, entry.minor)).or_default();
        (device.major, device.minor) = (entry.major, entry.minor);
        match (entry.op.to_ascii_lowercase().as_str(), bytes) {
            ("read" | "rbytes", true) => device.rbytes = entry.value,
            ("write" | "wbytes", true) => device.wbytes = entry.value,
            ("read" | "rios", false) => device.rios = entry.value,
            ("write" | "wios", false) => device.wios = entry.value,
            _ => {}
        }
    }
    cgroups_v2::metrics::IOStat { usage: devices.into_values().collect(), ..Default::default() }
}

fn hugetlb_v2(group: &CgroupStats) -> Vec<cgroups_v2::metrics::HugeTlbStat> {
    let sorted: BTreeMap<_, _> = group.hugetlb_stats.iter().collect();
    sorted
        .into_iter()
        .map(|(size, huge)| cgroups_v2::metrics::HugeTlbStat {
            current: huge.usage,
            max: huge.max_usage,
            failcnt: huge.failcnt,
            pagesize: size.clone(),
            ..Default::default()
        })
        .collect()
}

fn network_v2(stats: &StatsContainerResponse) -> Vec<cgroups_v2::metrics::NetworkStat> {
    stats
        .network_stats
        .iter()
        .map(|net| cgroups_v2::metrics::NetworkStat {
            name: net.name.clone(),
            rx_bytes: net.rx_bytes,
            rx_packets: net.rx_packets,
            rx_errors: net.rx_errors,
            rx_dropped: net.rx_dropped,
            tx_bytes: net.tx_bytes,
            tx_packets: net.tx_packets,
            tx_errors: net.tx_errors,
            tx_dropped: net.tx_dropped,
            ..Default::default()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use ecr_agent_protocol::agent::{CpuStats, CpuUsage, MemoryStats};

    fn guest(figures: &[(&str, u64)]) -> StatsContainerResponse {
        let usage = CpuUsage {
            total_usage: 9_000_000,
            usage_in_kernelmode: 2_000_000,
            usage_in_usermode: 7_000_000,
            ..Default::default()
        };
        let memory = MemoryStats {
            usage: MessageField::some(MemoryData { usage: 5, limit: 6, ..Default::default() }),
            stats: figures.iter().map(|&(name, value)| (name.to_owned(), value)).collect(),
            ..Default::default()
        };
        let read = BlkioStatsEntry {
            major: 8,
            minor: 1,
            op: "Read".into(),
            value: 4096,
            ..Default::default()
        };
        let blkio = BlkioStats {
            io_service_bytes_recursive: vec![
                read.clone(),
                BlkioStatsEntry { op: "Write".into(), value: 512, ..read.clone() },
            ],
            io_serviced_recursive: vec![BlkioStatsEntry { value: 3, ..read }],
            ..Default::default()
        };
        let cpu = CpuStats { cpu_usage: MessageField::some(usage), ..Default::default() };
        let group = CgroupStats {
            cpu_stats: MessageField::some(cpu),
            memory_stats: MessageField::some(memory),
            blkio_stats: MessageField::some(blkio),
            ..Default::default()
        };
        StatsContainerResponse { cgroup_stats: MessageField::some(group), ..Default::default() }
    }

    #[test]
    fn kernel_and_user_time_keep_their_places() {
        let stats = guest(&[]);
        let usage = v1(&stats).cpu.usage.clone().unwrap();
        assert_eq!((usage.total, usage.kernel, usage.user), (9_000_000, 2_000_000, 7_000_000));
        let cpu = v2(&stats).cpu.unwrap();
        assert_eq!((cpu.usage_usec, cpu.system_usec, cpu.user_usec), (9000, 2000, 7000));
    }

    #[test]
    fn a_guest_with_cgroup_v2_on_a_host_with_v1_and_the_other_way_round() {
        let unified = guest(&[("anon", 1), ("file", 2), ("inactive_file", 3)]);
        let memory = v1(&unified).memory.unwrap();
        assert_eq!((memory.rss, memory.cache, memory.total_inactive_file), (1, 2, 3));
        let legacy = guest(&[("rss", 1), ("cache", 2), ("total_inactive_file", 3)]);
        let memory = v2(&legacy).memory.unwrap();
        assert_eq!((memory.anon, memory.file, memory.inactive_file), (1, 2, 3));
        assert_eq!((memory.usage, memory.usage_limit), (5, 6));
    }

    #[test]
    fn a_hierarchy_is_reported_whole() {
        let mut stats = guest(&[("cache", 1), ("total_cache", 4)]);
        assert_eq!(v1(&stats).memory.cache, 1);
        let group = stats.cgroup_stats.as_mut().unwrap();
        group.memory_stats.as_mut().unwrap().use_hierarchy = true;
        assert_eq!(v1(&stats).memory.cache, 4);
    }

    #[test]
    fn a_device_s_figures_come_together_in_v2() {
        let usage = v2(&guest(&[])).io.unwrap().usage;
        assert_eq!(usage.len(), 1);
        assert_eq!((usage[0].rbytes, usage[0].wbytes, usage[0].rios), (4096, 512, 3));
    }

    #[test]
    fn the_message_has_containerd_s_name() {
        assert_eq!(pack(&v1(&guest(&[]))).unwrap().type_url, "io.containerd.cgroups.v1.Metrics");
        assert_eq!(pack(&v2(&guest(&[]))).unwrap().type_url, "io.containerd.cgroups.v2.Metrics");
    }
}
