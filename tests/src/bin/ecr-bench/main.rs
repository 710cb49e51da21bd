// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! ecr-vmm against Debian's QEMU, in one run: the same kernel, initrd or image, command line, CPUs and memory,
//! one after the other in turn. Prints a table of medians and ratios, and the same as JSON.
//!
//! `ecr-bench boot`: from the start of the process to the agent's line, and the CPU time of the process until
//! then. `ecr-bench memory`: the process's proportional set size without guest RAM and image, when the guest
//! is up and idle.
//!
//! `ecr-bench pod` is another contest: see [`pod`].
//!
//! Started by `tools/dev bench`, which hands the files in. `ECR_QEMU` names another QEMU.

mod pod;

use std::env;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use ecr_tests::place::{COMPRESSED_KERNEL, KERNEL, Place};
use serde_json::json;

/// What the agent prints when it is up.
const BOOT_LINE: &str = "ready in";
const MIB: u64 = 1 << 20;

const ON_ARM: bool = cfg!(target_arch = "aarch64");
/// QEMU's program for this architecture.
const QEMU: &str = if ON_ARM { "qemu-system-aarch64" } else { "qemu-system-x86_64" };
/// Its machine.
const QEMU_MACHINE: &str = if ON_ARM { "virt,gic-version=3,accel=kvm" } else { "q35,accel=kvm" };

/// A machine to boot.
struct Case {
    kernel: &'static str,
    what: &'static str,
    image: bool,
    cpus: u32,
    memory: u64,
}

impl Case {
    /// With an initial RAM disk, one CPU and 256 MiB.
    const INITRD: Self =
        Self { kernel: KERNEL, what: "initrd", image: false, cpus: 1, memory: 256 * MIB };

    fn name(&self) -> String {
        format!("{}, {}", self.kernel, self.what)
    }

    /// On aarch64, QEMU has persistent memory only with firmware, which is another contest.
    fn qemu_can(&self) -> bool {
        !(ON_ARM && self.image)
    }
}

const BOOT: &[Case] = &[
    Case::INITRD,
    Case { kernel: COMPRESSED_KERNEL, ..Case::INITRD },
    Case { what: "nvdimm image", image: true, ..Case::INITRD },
    Case { what: "initrd, 512 MiB", memory: 512 * MIB, ..Case::INITRD },
    Case { what: "initrd, 8 GiB", memory: 8192 * MIB, ..Case::INITRD },
];

const MEMORY: &[Case] = &[
    Case::INITRD,
    Case { what: "nvdimm image", image: true, ..Case::INITRD },
    Case { what: "initrd, 4 vCPUs", cpus: 4, ..Case::INITRD },
];

/// One of the two that are compared.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Vmm {
    Ecr,
    Qemu,
}

/// The two programs and the guest.
struct Contest {
    place: Place,
    qemu: PathBuf,
}

impl Contest {
    fn command(&self, vmm: Vmm, case: &Case) -> Command {
        let path = |name: &str| self.place.guest(name).display().to_string();
        let root =
            if case.image { " root=/dev/pmem0p1 ro rootfstype=ext4 rootflags=dax" } else { "" };
        let cmdline = format!("console=hvc0 quiet panic=-1{root}");
        let (kernel, memory, cpus) = (path(case.kernel), case.memory, case.cpus.to_string());
        match vmm {
            Vmm::Ecr => {
                let mut command = Command::new(self.place.vmm());
                command.args(["--kernel", &kernel, "--cmdline", &cmdline, "--cpus", &cpus]);
                let memory = format!("{}M", memory / MIB);
                command.args(["--memory", &memory, "--rng", "--serial", "off"]);
                if case.image {
                    command.args(["--image", &path("rootfs.img")]);
                } else {
                    command.args(["--initrd", &path("initrd.img")]);
                }
                command
            }
            Vmm::Qemu => {
                let mut command = Command::new(&self.qemu);
                command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
                command
                    .args(["-cpu", "host", "-smp", &cpus, "-kernel", &kernel, "-append", &cmdline]);
                command.args(["-chardev", "stdio,id=c", "-device", "virtio-serial-pci"]);
                command.args(["-device", "virtconsole,chardev=c", "-device", "virtio-rng-pci"]);
                if case.image {
                    let (ram, image) = (memory / MIB, path("rootfs.img"));
                    let size = fs::metadata(&image).map_or(0, |metadata| metadata.len());
                    command.args(["-M", &format!("{QEMU_MACHINE},nvdimm=on")]);
                    command.args(["-m", &format!("{ram}M,slots=1,maxmem={}M", ram + size / MIB)]);
                    command.args(["-object", &format!("memory-backend-file,id=m,mem-path={image},size={size},share=off,readonly=on")]);
                    command.args(["-device", "nvdimm,memdev=m,unarmed=on"]);
                } else {
                    command.args(["-M", QEMU_MACHINE, "-m", &format!("{}M", memory / MIB)]);
                    command.args(["-initrd", &path("initrd.img")]);
                }
                command
            }
        }
    }
}

/// A VMM whose guest is up.
struct Booted {
    child: Child,
    wall: Duration,
    /// Seconds since the kernel's start, as the agent says.
    kernel: f64,
}

fn boot(mut command: Command) -> Result<Booted> {
    // SAFETY: prctl between fork and exec takes numbers only: the child ends with this process.
    unsafe {
        command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        });
    }
    let started = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {command:?}"))?;
    let output = child.stdout.take().context("no output")?;
    let mut seen = String::new();
    for line in BufReader::new(output).split(b'\n') {
        let line = String::from_utf8_lossy(&line?).into_owned();
        if line.contains(BOOT_LINE) {
            return Ok(Booted { child, wall: started.elapsed(), kernel: seconds(&line)? });
        }
        seen.push_str(&line);
        seen.push('\n');
    }
    let mut complaints = String::new();
    if let Some(mut errors) = child.stderr.take() {
        errors.read_to_string(&mut complaints)?;
    }
    bail!("{command:?} ended before its guest was up:\n{seen}{complaints}")
}

/// The number in `ready in 1.234 s`.
fn seconds(line: &str) -> Result<f64> {
    let number = line.split_once(BOOT_LINE).and_then(|(_, rest)| rest.split_whitespace().next());
    number.context("no number in the agent's line")?.parse().context("the agent's line")
}

impl Booted {
    /// User and system time of the process so far.
    fn cpu_time(&self) -> Result<Duration> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id()))?;
        // The name in parentheses may contain anything; fields 14 and 15 are counted from behind it.
        let fields: Vec<&str> =
            stat.rsplit_once(')').context("no name in stat")?.1.split_whitespace().collect();
        let ticks: u64 = fields[11].parse::<u64>()? + fields[12].parse::<u64>()?;
        // SAFETY: sysconf takes and returns numbers.
        let hz = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
        Ok(Duration::from_secs_f64(ticks as f64 / hz as f64))
    }

    /// Proportional set size in KiB, without mappings as large as guest RAM and without the image.
    fn private_memory(&self, case: &Case) -> Result<u64> {
        let maps = fs::read_to_string(format!("/proc/{}/smaps", self.child.id()))?;
        let (mut counted, mut total) = (true, 0);
        for line in maps.lines() {
            let mut words = line.split_whitespace();
            let first = words.next().unwrap_or_default();
            if let Some((start, end)) = first.split_once('-') {
                let size = u64::from_str_radix(end, 16)? - u64::from_str_radix(start, 16)?;
                counted = size < case.memory && !line.ends_with("rootfs.img");
            } else if first == "Pss:" && counted {
                total += words.next().context("no size in smaps")?.parse::<u64>()?;
            }
        }
        Ok(total)
    }
}

impl Drop for Booted {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Numbers of one VMM in one case.
#[derive(Default)]
struct Figures {
    wall: Vec<f64>,
    before: Vec<f64>,
    cpu: Vec<f64>,
    memory: Vec<f64>,
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => f64::midpoint(sorted[n / 2 - 1], sorted[n / 2]),
    }
}

fn measure(contest: &Contest, case: &Case, runs: usize, idle: Duration) -> Result<[Figures; 2]> {
    let mut figures = [Figures::default(), Figures::default()];
    for _ in 0..runs {
        for (vmm, figures) in [Vmm::Ecr, Vmm::Qemu].into_iter().zip(&mut figures) {
            let booted = boot(contest.command(vmm, case))?;
            figures.wall.push(booted.wall.as_secs_f64());
            figures.before.push(booted.wall.as_secs_f64() - booted.kernel);
            figures.cpu.push(booted.cpu_time()?.as_secs_f64());
            // The kernel goes on for a moment behind the agent's line.
            std::thread::sleep(idle);
            figures.memory.push(booted.private_memory(case)? as f64 / 1024.0);
        }
    }
    Ok(figures)
}

fn main() -> Result<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let (what, runs) = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [what] => (what, 5),
        [what, runs] => (what, runs.parse().context("how many runs?")?),
        _ => bail!("usage: ecr-bench boot|memory|pod [RUNS]"),
    };
    if what == "pod" {
        return pod::run(runs);
    }
    let qemu = env::var_os("ECR_QEMU").unwrap_or_else(|| QEMU.into()).into();
    let contest = Contest { place: Place::from_environment()?, qemu };
    let (cases, idle) = match what {
        "boot" => (BOOT, Duration::ZERO),
        "memory" => (MEMORY, Duration::from_millis(500)),
        _ => bail!("no such benchmark: {what} (boot, memory or pod)"),
    };
    println!("medians of {runs} runs each, ecr-vmm and QEMU in turn\n");
    println!("| case | figure | ecr-vmm | QEMU | ratio |\n|---|---|---|---|---|");
    let mut report = Vec::new();
    for case in cases {
        let name = case.name();
        if !case.qemu_can() {
            println!("| {name} | left out: QEMU cannot do it without firmware | | | |");
            continue;
        }
        let [ecr, qemu] = measure(&contest, case, runs, idle)?;
        let rows: &[(&str, &str, &Vec<f64>, &Vec<f64>)] = if what == "boot" {
            &[
                ("to the agent's line", "s", &ecr.wall, &qemu.wall),
                ("of it, outside the kernel", "s", &ecr.before, &qemu.before),
                ("CPU time", "s", &ecr.cpu, &qemu.cpu),
            ]
        } else {
            &[("private memory", "MiB", &ecr.memory, &qemu.memory)]
        };
        for (figure, unit, ours, theirs) in rows {
            let (ours_median, theirs_median) = (median(ours), median(theirs));
            let ratio = ours_median / theirs_median;
            println!(
                "| {name} | {figure}, {unit} | {ours_median:.2} | {theirs_median:.2} | {ratio:.2} |"
            );
            report.push(json!({
                "case": name, "figure": figure, "unit": unit, "ratio": ratio,
                "ecr-vmm": { "median": ours_median, "runs": ours },
                "qemu": { "median": theirs_median, "runs": theirs },
            }));
        }
    }
    println!("\n{}", serde_json::to_string(&report)?);
    Ok(())
}
