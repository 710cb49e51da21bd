// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! `GetMetrics`: what the agent and its guest use, as Prometheus text. Names and labels are Kata's
//! (`kata_agent_*`, `kata_guest_*`), because dashboards know them.

use std::fmt::Write;
use std::fs;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::unistd::{SysconfVar, sysconf};

use crate::network;

static SCRAPES: AtomicU64 = AtomicU64::new(0);

/// All metrics of this moment. What cannot be read is left out.
pub fn text() -> String {
    let scrapes = SCRAPES.fetch_add(1, Ordering::Relaxed) + 1;
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let mut text = Text::default();
    text.family("kata_agent_scrape_count", "counter", "Number of times the metrics were read");
    text.plain(scrapes);
    let stat = read("/proc/self/stat");
    agent(&mut text, &stat);
    agent_process(&mut text, &stat, &read("/proc/stat"));
    text.table("kata_agent_proc_status", "The agent's status", &status(&read("/proc/self/status")));
    text.table("kata_agent_io_stat", "The agent's I/O", &pairs(&read("/proc/self/io")));

    text.table("kata_guest_load", "Load of the guest", &load(&read("/proc/loadavg")));
    text.table("kata_guest_tasks", "Tasks of the guest", &tasks(&read("/proc/loadavg")));
    text.cpu_time(&read("/proc/stat"));
    text.table("kata_guest_vm_stat", "Virtual memory of the guest", &pairs(&read("/proc/vmstat")));
    text.links();
    text.disks(&read("/proc/diskstats"));
    text.table(
        "kata_guest_meminfo",
        "Memory of the guest, in bytes",
        &memory(&read("/proc/meminfo")),
    );
    text.0
}

/// Names and values, in the kernel's order.
type Items = Vec<(String, f64)>;

/// The exposition format of Prometheus.
#[derive(Default)]
struct Text(String);

impl Text {
    /// Writing to a string does not fail.
    fn line(&mut self, line: std::fmt::Arguments<'_>) {
        let _ = self.0.write_fmt(format_args!("{line}\n"));
    }

    fn family(&mut self, name: &str, kind: &str, help: &str) {
        self.line(format_args!("# HELP {name} {help}."));
        self.line(format_args!("# TYPE {name} {kind}"));
        self.0.push_str(name);
    }

    /// The only value of a family.
    fn plain(&mut self, value: impl std::fmt::Display) {
        self.line(format_args!(" {value}"));
    }

    fn gauge(&mut self, name: &str, help: &str, value: f64) {
        self.family(name, "gauge", help);
        self.plain(value);
    }

    /// One family with a value for each `item`.
    fn table(&mut self, name: &str, help: &str, items: &Items) {
        let lines =
            items.iter().map(|(item, value)| (format!("item=\"{}\"", escape(item)), *value));
        self.labelled(name, help, lines.collect());
    }

    fn labelled(&mut self, name: &str, help: &str, lines: Vec<(String, f64)>) {
        if lines.is_empty() {
            return;
        }
        self.line(format_args!("# HELP {name} {help}."));
        self.line(format_args!("# TYPE {name} gauge"));
        for (labels, value) in lines {
            self.line(format_args!("{name}{{{labels}}} {value}"));
        }
    }

    /// In ticks, as the kernel counts.
    fn cpu_time(&mut self, stat: &str) {
        const ITEMS: [&str; 10] = [
            "user",
            "nice",
            "system",
            "idle",
            "iowait",
            "irq",
            "softirq",
            "steal",
            "guest",
            "guest_nice",
        ];
        let mut lines = Vec::new();
        for line in stat.lines().filter(|line| line.starts_with("cpu")) {
            let mut words = line.split_ascii_whitespace();
            let cpu = match words.next() {
                Some("cpu") | None => "total",
                Some(cpu) => cpu.trim_start_matches("cpu"),
            };
            for (item, value) in ITEMS.iter().zip(words.filter_map(|word| word.parse().ok())) {
                lines.push((format!("cpu=\"{cpu}\",item=\"{item}\""), value));
            }
        }
        self.labelled("kata_guest_cpu_time", "CPU time of the guest, in ticks", lines);
    }

    #[allow(clippy::cast_precision_loss)] // Prometheus has nothing but floating point.
    fn links(&mut self) {
        let mut lines = Vec::new();
        for link in network::stats() {
            for (item, value) in [
                ("recv_bytes", link.rx_bytes),
                ("recv_packets", link.rx_packets),
                ("recv_errs", link.rx_errors),
                ("recv_drop", link.rx_dropped),
                ("sent_bytes", link.tx_bytes),
                ("sent_packets", link.tx_packets),
                ("sent_errs", link.tx_errors),
                ("sent_drop", link.tx_dropped),
            ] {
                let interface = escape(&link.name);
                lines.push((format!("interface=\"{interface}\",item=\"{item}\""), value as f64));
            }
        }
        self.labelled("kata_guest_netdev_stat", "Network links of the guest", lines);
    }

    /// Documentation/admin-guide/iostats.rst of Linux.
    fn disks(&mut self, diskstats: &str) {
        const ITEMS: [&str; 17] = [
            "reads",
            "merged",
            "sectors_read",
            "time_reading",
            "writes",
            "writes_merged",
            "sectors_written",
            "time_writing",
            "in_progress",
            "time_in_progress",
            "weighted_time_in_progress",
            "discards",
            "discards_merged",
            "sectors_discarded",
            "time_discarding",
            "flushes",
            "time_flushing",
        ];
        let mut lines = Vec::new();
        for line in diskstats.lines() {
            let mut words = line.split_ascii_whitespace().skip(2);
            let Some(disk) = words.next().map(escape) else { continue };
            for (item, value) in ITEMS.iter().zip(words.filter_map(|word| word.parse().ok())) {
                lines.push((format!("disk=\"{disk}\",item=\"{item}\""), value));
            }
        }
        self.labelled("kata_guest_diskstat", "Disks of the guest", lines);
    }
}

fn escape(label: &str) -> String {
    label.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[allow(clippy::cast_precision_loss)]
fn system(variable: SysconfVar) -> f64 {
    sysconf(variable).ok().flatten().unwrap_or_default() as f64
}

/// proc_pid_stat(5), from the third field on: the second is a name in parentheses, which may hold anything.
fn fields(stat: &str) -> Vec<f64> {
    let (_, tail) = stat.rsplit_once(") ").unwrap_or_default();
    tail.split_ascii_whitespace().map(|word| word.parse().unwrap_or_default()).collect()
}

/// Numbers of fields in proc_pid_stat(5).
const UTIME: usize = 14;
const STIME: usize = 15;
const CUTIME: usize = 16;
const CSTIME: usize = 17;
const THREADS: usize = 20;
const START: usize = 22;
const VSIZE: usize = 23;
const RSS: usize = 24;

fn field(fields: &[f64], number: usize) -> f64 {
    fields.get(number - 3).copied().unwrap_or_default()
}

fn agent(text: &mut Text, stat: &str) {
    let fields = fields(stat);
    let (ticks, page) = (system(SysconfVar::CLK_TCK), system(SysconfVar::PAGE_SIZE));
    let field = |number| field(&fields, number);
    text.gauge("kata_agent_threads", "Threads of the agent", field(THREADS));
    let time = (field(UTIME) + field(STIME)) / ticks;
    text.gauge("kata_agent_total_time", "CPU time of the agent, in seconds", time);
    text.gauge("kata_agent_total_vm", "Virtual memory of the agent, in bytes", field(VSIZE));
    let resident = field(RSS) * page;
    text.gauge("kata_agent_total_rss", "Memory of the agent, in bytes", resident);
    let stat = [("utime", UTIME), ("stime", STIME), ("cutime", CUTIME), ("cstime", CSTIME)]
        .map(|(name, number)| (name.to_string(), field(number)));
    text.table("kata_agent_proc_stat", "CPU time of the agent, in ticks", &stat.to_vec());
}

/// What every Prometheus client library says of its own process.
#[allow(clippy::cast_precision_loss)]
fn agent_process(text: &mut Text, stat: &str, system_stat: &str) {
    let fields = fields(stat);
    let (ticks, page) = (system(SysconfVar::CLK_TCK), system(SysconfVar::PAGE_SIZE));
    let field = |number| field(&fields, number);
    let boot: f64 = system_stat
        .lines()
        .find_map(|line| line.strip_prefix("btime ")?.parse().ok())
        .unwrap_or_default();
    let open = fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
    for (name, help, value) in [
        ("cpu_seconds_total", "CPU time", (field(UTIME) + field(STIME)) / ticks),
        ("open_fds", "Open file descriptors", open as f64),
        ("max_fds", "Most file descriptors that may be open", system(SysconfVar::OPEN_MAX)),
        ("virtual_memory_bytes", "Virtual memory", field(VSIZE)),
        ("resident_memory_bytes", "Memory", field(RSS) * page),
        ("start_time_seconds", "When it was started", boot + field(START) / ticks),
    ] {
        text.gauge(&format!("kata_agent_process_{name}"), &format!("{help} of the agent"), value);
    }
}

/// `NAME: VALUE` or `NAME VALUE`; what is not a number is left out.
fn pairs(text: &str) -> Items {
    text.lines()
        .filter_map(|line| {
            let mut words = line.split_ascii_whitespace();
            let name = words.next()?.trim_end_matches(':');
            Some((name.to_owned(), words.next()?.parse().ok()?))
        })
        .collect()
}

/// The sizes and counts of proc_pid_status(5), sizes in bytes.
fn status(text: &str) -> Items {
    let wanted = |name: &str| {
        name.starts_with("vm")
            || name.starts_with("rss")
            || ["hugetlbpages", "voluntary_ctxt_switches", "nonvoluntary_ctxt_switches"]
                .contains(&name)
    };
    let lower = memory(text).into_iter().map(|(name, value)| (name.to_ascii_lowercase(), value));
    lower.filter(|(name, _)| wanted(name)).collect()
}

/// `NAME: VALUE kB`.
fn memory(text: &str) -> Items {
    text.lines()
        .filter_map(|line| {
            let (name, value) = line.split_once(':')?;
            let value = value.trim();
            let bytes = match value.strip_suffix(" kB") {
                Some(value) => value.parse::<f64>().ok()? * 1024.0,
                None => value.parse().ok()?,
            };
            Some((name.to_owned(), bytes))
        })
        .collect()
}

fn load(text: &str) -> Items {
    let names = ["load1", "load5", "load15"].map(String::from).into_iter();
    names.zip(text.split_ascii_whitespace().filter_map(|word| word.parse().ok())).collect()
}

/// `RUNNING/ALL`, the fourth word.
fn tasks(text: &str) -> Items {
    let tasks = text.split_ascii_whitespace().nth(3).and_then(|word| word.split_once('/'));
    let value = |word: &str| word.parse().unwrap_or_default();
    tasks.map_or_else(Vec::new, |(current, all)| {
        vec![("cur".to_string(), value(current)), ("max".to_string(), value(all))]
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_that_dashboards_know() {
        let text = text();
        for family in [
            "kata_agent_scrape_count",
            "kata_agent_threads",
            "kata_agent_total_time",
            "kata_agent_total_vm",
            "kata_agent_total_rss",
            "kata_agent_proc_status",
            "kata_agent_proc_stat",
            "kata_agent_process_open_fds",
            "kata_guest_load",
            "kata_guest_tasks",
            "kata_guest_cpu_time",
            "kata_guest_vm_stat",
            "kata_guest_netdev_stat",
            "kata_guest_meminfo",
        ] {
            assert_eq!(text.matches(&format!("# TYPE {family} ")).count(), 1, "{family}");
        }
    }

    #[test]
    fn every_line_is_a_sample_or_a_comment() {
        for line in text().lines().filter(|line| !line.starts_with('#')) {
            let (name, value) = line.rsplit_once(' ').unwrap();
            assert!(value.parse::<f64>().is_ok(), "{line}");
            assert!(name.starts_with("kata_"), "{line}");
            assert_eq!(name.contains('{'), name.ends_with("\"}"), "{line}");
        }
    }

    #[test]
    fn what_the_kernel_writes() {
        assert_eq!(
            pairs("rchar: 12\nx\nnr_free 7\n"),
            [("rchar".into(), 12.0), ("nr_free".into(), 7.0)]
        );
        assert_eq!(
            memory("MemTotal:  2 kB\nHuge:  3\n"),
            [("MemTotal".into(), 2048.0), ("Huge".into(), 3.0)]
        );
        assert_eq!(status("Name:\tx\nVmRSS:\t 1 kB\n"), [("vmrss".into(), 1024.0)]);
        let average = "0.50 0.25 0.10 2/75 1234\n";
        assert_eq!(load(average)[2], ("load15".into(), 0.1));
        assert_eq!(tasks(average), [("cur".into(), 2.0), ("max".into(), 75.0)]);
        assert_eq!(field(&fields("1 (a) b) S 0 1 1 0 -1 0 0 0 0 0 17 4 0"), UTIME), 17.0);
        assert!(fields("").is_empty());
    }

    #[test]
    fn labels_are_escaped() {
        assert_eq!(escape("a\"b\\c\n"), "a\\\"b\\\\c\\n");
    }
}
