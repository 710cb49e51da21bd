// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Figures of a sandbox's processes in Prometheus' text format, under Kata's names.
//!
//! The virtual machine lives in the shim's process. What the kernel counts by thread (CPU time, input and output, context
//! switches) is summed over the machine's threads and reported as `kata_hypervisor_*`; memory and descriptors belong to
//! the process, and are in `kata_shim_*` only. CPU times are in clock ticks, as in Kata.

use std::collections::BTreeMap;
use std::fmt::{Display, Write as _};
use std::fs;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::netns;

/// How the names of the machine's threads begin.
const MACHINE_THREADS: [&str; 3] = ["ecr-vcpu", "ecr-io", "ecr-ctl"];
/// Upper limits of a histogram's buckets in milliseconds: 1 to 512.
const BUCKETS: usize = 10;
/// This process.
const SELF: &str = "/proc/self";

/// Calls that the shim has answered.
pub static SHIM_CALLS: Durations = Durations::new(
    "kata_shim_rpc_durations_histogram_milliseconds",
    "RPC latency distributions, in milliseconds.",
);
/// Calls that the agent has answered.
pub static AGENT_CALLS: Durations = Durations::new(
    "kata_shim_agent_rpc_durations_histogram_milliseconds",
    "RPC latency distributions of the agent, in milliseconds.",
);

/// How long calls took, by the name of the call.
#[derive(Debug)]
pub struct Durations {
    name: &'static str,
    help: &'static str,
    actions: Mutex<BTreeMap<&'static str, Histogram>>,
}

#[derive(Debug, Default)]
struct Histogram {
    /// Each counts what the smaller ones count, too.
    buckets: [u64; BUCKETS],
    count: u64,
    sum: f64,
}

impl Durations {
    const fn new(name: &'static str, help: &'static str) -> Self {
        Self { name, help, actions: Mutex::new(BTreeMap::new()) }
    }

    /// A call has been answered.
    pub fn observe(&self, action: &'static str, elapsed: Duration) {
        let milliseconds = elapsed.as_secs_f64() * 1000.0;
        let mut actions = self.actions.lock();
        let histogram = actions.entry(action).or_default();
        for (power, bucket) in (0_u32..).zip(&mut histogram.buckets) {
            *bucket += u64::from(milliseconds <= f64::from(1_u32 << power));
        }
        histogram.count += 1;
        histogram.sum += milliseconds;
    }

    fn put(&self, text: &mut Exposition) {
        let actions = self.actions.lock();
        if actions.is_empty() {
            return;
        }
        text.family(self.name, self.help, "histogram");
        for (action, histogram) in actions.iter() {
            let action = snake_case(action);
            let action = action.as_str();
            let bucket = format!("{}_bucket", self.name);
            for (power, count) in (0_u32..).zip(histogram.buckets) {
                let limit = (1_u32 << power).to_string();
                text.sample(&bucket, &[("action", action), ("le", &limit)], count);
            }
            text.sample(&bucket, &[("action", action), ("le", "+Inf")], histogram.count);
            let labels = [("action", action)];
            text.sample(&format!("{}_sum", self.name), &labels, histogram.sum);
            text.sample(&format!("{}_count", self.name), &labels, histogram.count);
        }
    }
}

/// `CloseIO` becomes `close_io`.
fn snake_case(name: &str) -> String {
    let mut snake = String::new();
    let mut after_small = false;
    for letter in name.chars() {
        if letter.is_ascii_uppercase() && after_small {
            snake.push('_');
        }
        after_small = letter.is_ascii_lowercase();
        snake.push(letter.to_ascii_lowercase());
    }
    snake
}

/// Text that Prometheus reads.
#[derive(Debug, Default)]
struct Exposition(String);

impl Exposition {
    fn family(&mut self, name: &str, help: &str, kind: &str) {
        // Writing into a string succeeds.
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl Display) {
        self.0.push_str(name);
        for (index, (label, value)) in labels.iter().enumerate() {
            let value = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            let _ = write!(self.0, "{}{label}=\"{value}\"", if index == 0 { '{' } else { ',' });
        }
        let _ = writeln!(self.0, "{} {value}", if labels.is_empty() { "" } else { "}" });
    }

    fn gauge(&mut self, name: &str, help: &str, value: impl Display) {
        self.family(name, help, "gauge");
        self.sample(name, &[], value);
    }

    fn items<V: Display>(&mut self, name: &str, help: &str, items: &[(String, V)]) {
        if items.is_empty() {
            return;
        }
        self.family(name, help, "gauge");
        for (item, value) in items {
            self.sample(name, &[("item", item)], value);
        }
    }
}

/// What a scrape looks at, and what it remembers of the last one.
#[derive(Debug, Default)]
pub struct Sampler {
    last: Mutex<Option<(Instant, u64)>>,
}

impl Sampler {
    /// Figures of this process, the machine in it, and virtiofsd. A process that has just ended is left out.
    pub fn sample(&self, virtiofsd: Option<u32>, pod_netns: Option<&Path>) -> String {
        let mut text = Exposition::default();
        SHIM_CALLS.put(&mut text);
        AGENT_CALLS.put(&mut text);
        process(&mut text, "kata_shim", "shim", Path::new(SELF));
        netdev(&mut text, "kata_shim_netdev", "shim", fs::read_to_string("/proc/self/net/dev"));
        machine(&mut text);
        if let Some(netns) = pod_netns {
            let read =
                netns::inside(netns, || Ok(fs::read_to_string("/proc/thread-self/net/dev")?));
            netdev(
                &mut text,
                "kata_hypervisor_netdev",
                "hypervisor",
                read.map_err(io::Error::other),
            );
        }
        let virtiofsd = virtiofsd.map(|pid| Path::new("/proc").join(pid.to_string()));
        if let Some(directory) = &virtiofsd {
            process(&mut text, "kata_virtiofsd", "virtiofsd", directory);
        }
        self.overhead(&mut text, virtiofsd.as_deref());
        text.0
    }

    /// What the sandbox costs beyond what its guest uses: CPU time outside the guest, and memory that is not the
    /// guest's, which is shared with virtiofsd.
    fn overhead(&self, text: &mut Exposition, virtiofsd: Option<&Path>) {
        let processes: Vec<_> = [Some(Path::new(SELF)), virtiofsd].into_iter().flatten().collect();
        let memory: u64 = processes.iter().map(|directory| private_memory(directory)).sum();
        text.gauge(
            "kata_shim_pod_overhead_memory_in_bytes",
            "Kata Pod overhead for memory resources(bytes).",
            memory,
        );
        let guest = guest_ticks();
        let all: u64 = processes.iter().filter_map(|directory| cpu_ticks(directory)).sum();
        let (now, ticks) = (Instant::now(), all.saturating_sub(guest));
        let percent = match self.last.lock().replace((now, ticks)) {
            Some((then, before)) => {
                let seconds = now.duration_since(then).as_secs_f64().max(0.001);
                let spent =
                    Duration::from_millis(ticks.saturating_sub(before) * 1000 / ticks_per_second());
                spent.as_secs_f64() / seconds * 100.0
            }
            None => 0.0,
        };
        text.gauge(
            "kata_shim_pod_overhead_cpu",
            "Kata Pod overhead for CPU resources(percent).",
            percent,
        );
    }
}

fn ticks_per_second() -> u64 {
    let ticks = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok().flatten();
    ticks.and_then(|ticks| u64::try_from(ticks).ok()).filter(|&ticks| ticks > 0).unwrap_or(100)
}

/// The families of a process.
fn process(text: &mut Exposition, prefix: &str, who: &str, directory: &Path) {
    let read = |name: &str| fs::read_to_string(directory.join(name)).unwrap_or_default();
    let status = read("status");
    if status.is_empty() {
        return;
    }
    if let Some(threads) = field(&status, "Threads").and_then(|value| value.parse::<u64>().ok()) {
        text.gauge(&format!("{prefix}_threads"), &format!("Kata {who} process threads."), threads);
    }
    text.items(
        &format!("{prefix}_proc_status"),
        &format!("Kata {who} process status."),
        &status_items(&status),
    );
    text.items(
        &format!("{prefix}_proc_stat"),
        &format!("Kata {who} process statistics."),
        &stat_items(&read("stat")),
    );
    text.items(
        &format!("{prefix}_io_stat"),
        &format!("Kata {who} process IO statistics."),
        &io_items(&read("io")),
    );
    if let Ok(descriptors) = fs::read_dir(directory.join("fd")) {
        let count = descriptors.count();
        text.gauge(&format!("{prefix}_fds"), &format!("Kata {who} process open FDs."), count);
    }
}

/// The families of the machine: sums over its threads.
fn machine(text: &mut Exposition) {
    let threads = machine_threads();
    text.gauge("kata_hypervisor_threads", "Hypervisor threads.", threads.len());
    let sum = |name: &str, items: fn(&str) -> Vec<(String, u64)>| {
        let mut sums = BTreeMap::new();
        for thread in &threads {
            let content = fs::read_to_string(thread.join(name)).unwrap_or_default();
            for (item, value) in items(&content) {
                *sums.entry(item).or_insert(0_u64) += value;
            }
        }
        sums.into_iter().collect::<Vec<_>>()
    };
    let switches = |status: &str| {
        let items = status_items(status).into_iter();
        items.filter(|(item, _)| item.ends_with("ctxt_switches")).collect()
    };
    text.items(
        "kata_hypervisor_proc_status",
        "Hypervisor threads' status.",
        &sum("status", switches),
    );
    text.items(
        "kata_hypervisor_proc_stat",
        "Hypervisor threads' statistics.",
        &sum("stat", stat_items),
    );
    text.items(
        "kata_hypervisor_io_stat",
        "Hypervisor threads' IO statistics.",
        &sum("io", io_items),
    );
}

/// The directories of the machine's threads.
fn machine_threads() -> Vec<std::path::PathBuf> {
    let Ok(tasks) = fs::read_dir("/proc/self/task") else { return Vec::new() };
    tasks
        .flatten()
        .map(|task| task.path())
        .filter(|path| {
            let name = fs::read_to_string(path.join("comm")).unwrap_or_default();
            MACHINE_THREADS.iter().any(|prefix| name.starts_with(prefix))
        })
        .collect()
}

/// The value of a line `name: value`.
fn field<'a>(content: &'a str, name: &str) -> Option<&'a str> {
    content.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim)
}

/// proc(5), `/proc/PID/status`: sizes, in bytes, and context switches.
fn status_items(content: &str) -> Vec<(String, u64)> {
    content
        .lines()
        .filter_map(|line| {
            let (name, value) = line.split_once(':')?;
            let wanted = name.starts_with("Vm")
                || name.starts_with("Rss")
                || name == "HugetlbPages"
                || name.ends_with("ctxt_switches");
            let mut words = wanted.then(|| value.split_whitespace())?;
            let number: u64 = words.next()?.parse().ok()?;
            let unit = if words.next() == Some("kB") { 1024 } else { 1 };
            Some((name.to_lowercase(), number * unit))
        })
        .collect()
}

/// proc(5), `/proc/PID/stat`, from field 3 on; the name in field 2 may hold anything.
fn stat_fields(content: &str) -> impl Iterator<Item = &str> {
    content.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace()
}

fn stat_items(content: &str) -> Vec<(String, u64)> {
    // Fields 14 to 17.
    let values = stat_fields(content).skip(11);
    ["utime", "stime", "cutime", "cstime"]
        .iter()
        .zip(values)
        .filter_map(|(item, value)| Some(((*item).to_owned(), value.parse().ok()?)))
        .collect()
}

/// proc(5), `/proc/PID/io`.
fn io_items(content: &str) -> Vec<(String, u64)> {
    content
        .lines()
        .filter_map(|line| {
            let (name, value) = line.split_once(':')?;
            Some((name.replace('_', ""), value.trim().parse().ok()?))
        })
        .collect()
}

/// User and system time of a process, in ticks.
fn cpu_ticks(directory: &Path) -> Option<u64> {
    let stat = fs::read_to_string(directory.join("stat")).ok()?;
    Some(stat_items(&stat).iter().take(2).map(|(_, ticks)| ticks).sum())
}

/// Time that the machine's threads have spent in the guest, in ticks: field 43 of their `stat`.
fn guest_ticks() -> u64 {
    let threads = machine_threads();
    let stats = threads.iter().filter_map(|thread| fs::read_to_string(thread.join("stat")).ok());
    stats.filter_map(|stat| stat_fields(&stat).nth(40)?.parse::<u64>().ok()).sum()
}

/// Memory of a process that is its own share: not the guest's, which is in shared memory.
fn private_memory(directory: &Path) -> u64 {
    let Ok(rollup) = fs::read_to_string(directory.join("smaps_rollup")) else { return 0 };
    let kilobytes = |name| {
        let value = field(&rollup, name).and_then(|value| value.split_whitespace().next());
        value.and_then(|value| value.parse::<u64>().ok()).unwrap_or(0)
    };
    (kilobytes("Pss_Anon") + kilobytes("Pss_File")) * 1024
}

/// proc(5), `/proc/net/dev`.
const NETDEV_ITEMS: [&str; 16] = [
    "recv_bytes",
    "recv_packets",
    "recv_errs",
    "recv_drop",
    "recv_fifo",
    "recv_frame",
    "recv_compressed",
    "recv_multicast",
    "sent_bytes",
    "sent_packets",
    "sent_errs",
    "sent_drop",
    "sent_fifo",
    "sent_colls",
    "sent_carrier",
    "sent_compressed",
];

fn netdev(text: &mut Exposition, name: &str, who: &str, content: io::Result<String>) {
    let content = match content {
        Ok(content) => content,
        Err(error) => {
            log::debug!("no figures of network interfaces of the {who}: {error}");
            return;
        }
    };
    text.family(name, &format!("Kata {who} network devices statistics."), "gauge");
    for line in content.lines() {
        let Some((interface, values)) = line.split_once(':') else { continue };
        for (item, value) in NETDEV_ITEMS.iter().zip(values.split_whitespace()) {
            if let Ok(value) = value.parse::<u64>() {
                text.sample(name, &[("interface", interface.trim()), ("item", item)], value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_proc_become_items() {
        let status = "Name:\tx\nVmRSS:\t  12 kB\nRssAnon:\t 3 kB\nThreads:\t4\nvoluntary_ctxt_switches:\t7\n";
        let expected = [("vmrss", 12288), ("rssanon", 3072), ("voluntary_ctxt_switches", 7)];
        assert_eq!(status_items(status), expected.map(|(name, value)| (name.to_owned(), value)));
        assert_eq!(field(status, "Threads"), Some("4"));

        let stat = "1 (a) b) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15";
        let expected = [("utime", 11), ("stime", 12), ("cutime", 13), ("cstime", 14)];
        assert_eq!(stat_items(stat), expected.map(|(name, value)| (name.to_owned(), value)));
        assert_eq!(stat_items("nonsense"), []);

        let io = "rchar: 5\nread_bytes: 6\nnonsense\n";
        let expected = [("rchar", 5), ("readbytes", 6)];
        assert_eq!(io_items(io), expected.map(|(name, value)| (name.to_owned(), value)));
    }

    #[test]
    fn interfaces_have_sixteen_items() {
        let mut text = Exposition::default();
        let content =
            "Inter-| Receive\n face |bytes\n  eth0: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16\n";
        netdev(&mut text, "n", "shim", Ok(content.into()));
        assert!(text.0.contains("n{interface=\"eth0\",item=\"recv_bytes\"} 1\n"), "{}", text.0);
        assert!(text.0.contains("n{interface=\"eth0\",item=\"sent_compressed\"} 16\n"));
        assert_eq!(text.0.lines().count(), 18);
    }

    #[test]
    fn durations_are_cumulative() {
        let durations = Durations::new("d", "help");
        for milliseconds in [1, 3, 1000] {
            durations.observe("CloseIO", Duration::from_millis(milliseconds));
        }
        let mut text = Exposition::default();
        durations.put(&mut text);
        for line in [
            "# TYPE d histogram",
            "d_bucket{action=\"close_io\",le=\"1\"} 1",
            "d_bucket{action=\"close_io\",le=\"4\"} 2",
            "d_bucket{action=\"close_io\",le=\"512\"} 2",
            "d_bucket{action=\"close_io\",le=\"+Inf\"} 3",
            "d_sum{action=\"close_io\"} 1004",
            "d_count{action=\"close_io\"} 3",
        ] {
            assert!(text.0.lines().any(|found| found == line), "{line}:\n{}", text.0);
        }
    }

    #[test]
    fn actions_have_katas_names() {
        for (name, action) in
            [("Create", "create"), ("ResizePty", "resize_pty"), ("wait_process", "wait_process")]
        {
            assert_eq!(snake_case(name), action);
        }
    }

    #[test]
    fn labels_are_escaped() {
        let mut text = Exposition::default();
        text.sample("m", &[("l", "a\"b\\c\nd")], 1);
        assert_eq!(text.0, "m{l=\"a\\\"b\\\\c\\nd\"} 1\n");
    }

    #[test]
    fn a_scrape_sees_this_process_and_the_threads_of_a_machine() {
        let (stop, stopped) = std::sync::mpsc::channel::<()>();
        let (runs, running) = std::sync::mpsc::channel();
        let thread = std::thread::Builder::new().name("ecr-vcpu7".into());
        // It gives itself its name, and so has one when it says that it runs.
        let work = move || runs.send(()).map(|()| stopped.recv());
        let thread = thread.spawn(work).unwrap();
        running.recv().unwrap();
        let sampler = Sampler::default();
        sampler.sample(None, None);
        let text = sampler.sample(Some(std::process::id()), Some(Path::new("/proc/self/ns/net")));
        drop(stop);
        let _ = thread.join().unwrap();
        for line in [
            "kata_shim_threads ",
            "kata_shim_fds ",
            "kata_shim_proc_status{item=\"vmrss\"} ",
            "kata_shim_proc_stat{item=\"utime\"} ",
            "kata_shim_io_stat{item=\"rchar\"} ",
            "kata_shim_netdev{interface=\"lo\",item=\"recv_bytes\"} ",
            "kata_shim_pod_overhead_cpu ",
            "kata_hypervisor_threads 1",
            "kata_hypervisor_proc_stat{item=\"utime\"} ",
            "kata_hypervisor_proc_status{item=\"voluntary_ctxt_switches\"} ",
            "kata_virtiofsd_threads ",
        ] {
            assert!(text.lines().any(|found| found.starts_with(line)), "{line}:\n{text}");
        }
        let memory = text.lines().find_map(|line| {
            line.strip_prefix("kata_shim_pod_overhead_memory_in_bytes ")?.parse::<u64>().ok()
        });
        assert!(memory.unwrap() > 0);
    }
}
