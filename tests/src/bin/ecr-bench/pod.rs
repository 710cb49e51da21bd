// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! `ecr-bench pod`: containers by the same containerd with runc and with ecr, in turn.
//!
//! From the start of `ctr run` to the first byte that the container writes; the CPU time of the whole host until
//! `ctr` has ended; the phases of a start as the shim's log tells them; and the memory per idle sandbox, which is the
//! proportional set size of shim and virtiofsd without guest RAM and image.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ecr_tests::containerd::{Containerd, HostProcess, Runtime, Version};
use serde_json::json;

use super::{MIB, median};

/// Idle sandboxes; the first pays for what all share.
const IDLE: usize = 4;
/// What a sandbox still does behind its container's start.
const SETTLED: Duration = Duration::from_secs(3);
/// Mappings of a file in memory from this size on are guest RAM.
const GUEST_RAM: u64 = 16 * MIB;
/// The phase that is not our own work.
const GUEST: &str = "guest";

/// Numbers of one runtime.
#[derive(Default)]
struct Figures {
    first_byte: Vec<f64>,
    cpu: Vec<f64>,
    phases: BTreeMap<String, Vec<f64>>,
}

pub(super) fn run(runs: usize) -> Result<()> {
    let containerd = Containerd::start(Version::V1_7)?.context("containerd was not handed in")?;
    measure(&containerd, runs).with_context(|| containerd.log())
}

fn measure(containerd: &Containerd, runs: usize) -> Result<()> {
    let runtimes = [Runtime::Runc, Runtime::Ecr];
    let mut figures = [Figures::default(), Figures::default()];
    for run in 0..=runs {
        for (runtime, figures) in runtimes.into_iter().zip(&mut figures) {
            one(containerd, runtime, figures)?;
            if run == 0 {
                *figures = Figures::default(); // It has filled the page cache.
            }
        }
    }
    let memory = idle_memory(containerd)?;
    let [runc, ecr] = &figures;

    println!("medians of {runs} runs each, runc and ecr in turn, by {}\n", Version::V1_7.name());
    println!("| figure | runc | ecr | ratio |\n|---|---|---|---|");
    let row = |name: &str, theirs: f64, ours: f64| {
        println!("| {name} | {theirs:.2} | {ours:.2} | {:.2} |", ours / theirs);
    };
    let (theirs, ours) = (median(&runc.first_byte), median(&ecr.first_byte));
    row("ctr run to the first byte, s", theirs, ours);
    let guest = ecr.phases.get(GUEST).map_or(0.0, |values| median(values)) / 1e3;
    row("of it, outside the guest's boot, s", theirs, ours - guest);
    row("CPU time of the host, s", median(&runc.cpu), median(&ecr.cpu));
    println!("\n| phase of ecr's start | ms |\n|---|---|");
    for (name, values) in &ecr.phases {
        println!("| {name} | {:.0} |", median(values));
    }
    println!("\n| memory beyond guest RAM and image | MiB |\n|---|---|");
    println!("| first sandbox | {:.1} |", memory[0]);
    println!("| each of {} more | {:.1} |", IDLE - 1, median(&memory[1..]));
    let report = json!({
        "first byte, s": { "runc": runc.first_byte, "ecr": ecr.first_byte },
        "CPU, s": { "runc": runc.cpu, "ecr": ecr.cpu },
        "phases, ms": ecr.phases, "memory, MiB": memory,
    });
    println!("\n{report}");
    Ok(())
}

fn one(containerd: &Containerd, runtime: Runtime, figures: &mut Figures) -> Result<()> {
    let logged = containerd.whole_log().len();
    let mut command = containerd.run_command(runtime, &["--rm"], "bench", "echo here");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit());
    let (started, cpu) = (Instant::now(), host_cpu()?);
    let mut child = command.spawn().context("start ctr")?;
    let mut byte = [0];
    let read = child.stdout.take().context("no output")?.read(&mut byte)?;
    let first_byte = started.elapsed();
    ensure!(child.wait()?.success() && read == 1, "the container did not say anything");
    figures.first_byte.push(first_byte.as_secs_f64());
    figures.cpu.push(host_cpu()? - cpu);
    for (name, milliseconds) in phases(&containerd.whole_log()[logged..]) {
        figures.phases.entry(name).or_default().push(milliseconds);
    }
    Ok(())
}

/// What stands as `phase=NAME ms=N` in the shim's log, which is a part of containerd's.
fn phases(log: &str) -> Vec<(String, f64)> {
    let word = |text: &str| {
        let end = text.find(|c: char| !c.is_ascii_alphanumeric() && !"-_.".contains(c));
        text[..end.unwrap_or(text.len())].to_owned()
    };
    log.split("phase=")
        .skip(1)
        .filter_map(|rest| {
            let (name, rest) = (word(rest), rest.lines().next()?);
            let milliseconds = word(rest.split_once("ms=")?.1).parse().ok()?;
            Some((name, milliseconds))
        })
        .collect()
}

/// Seconds that all processors of this host have worked (proc(5), `/proc/stat`: all but idle and iowait; a guest's
/// time is in the user time).
fn host_cpu() -> Result<f64> {
    let stat = fs::read_to_string("/proc/stat")?;
    let fields: Vec<u64> = stat
        .lines()
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .skip(1)
        .filter_map(|field| field.parse().ok())
        .collect();
    ensure!(fields.len() >= 8, "/proc/stat begins with {stat:.80}");
    let ticks = fields[0] + fields[1] + fields[2] + fields[5] + fields[6];
    // SAFETY: sysconf takes and returns numbers.
    let hz = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    Ok(ticks as f64 / hz as f64)
}

/// The memory of each of some idle sandboxes, in the order of their start; all measured when all are there.
fn idle_memory(containerd: &Containerd) -> Result<Vec<f64>> {
    let ids: Vec<String> = (0..IDLE).map(|n| format!("idle{n}")).collect();
    for id in &ids {
        containerd.run_detached(Runtime::Ecr, &[], id, "sleep 100000")?;
    }
    std::thread::sleep(SETTLED);
    let memory = ids
        .iter()
        .map(|id| {
            let processes = containerd.processes_of(id);
            ensure!(!processes.is_empty(), "no processes of {id}");
            let sizes = processes.iter().map(own_memory).collect::<Result<Vec<u64>>>()?;
            Ok(sizes.iter().sum::<u64>() as f64 / 1024.0)
        })
        .collect::<Result<Vec<f64>>>()?;
    for id in &ids {
        containerd.remove(id)?;
    }
    Ok(memory)
}

/// Proportional set size of a process in KiB, without guest RAM and the guest's image.
fn own_memory(process: &HostProcess) -> Result<u64> {
    let maps = fs::read_to_string(format!("/proc/{}/smaps", process.pid))?;
    let (mut counted, mut total) = (true, 0);
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        if let Some((start, end)) = first.split_once('-') {
            let size = u64::from_str_radix(end, 16)? - u64::from_str_radix(start, 16)?;
            let ram = size >= GUEST_RAM && line.contains("/memfd:");
            counted = !ram && !line.ends_with("rootfs.img");
        } else if first == "Pss:" && counted {
            total += words.next().context("no size in smaps")?.parse::<u64>()?;
        }
    }
    Ok(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_are_found_in_a_log() {
        let log =
            "time=\"x\" level=info msg=\"phase=host ms=12\"\nother\nINFO phase=guest ms=340\n";
        assert_eq!(phases(log), [("host".to_owned(), 12.0), ("guest".to_owned(), 340.0)]);
    }
}
