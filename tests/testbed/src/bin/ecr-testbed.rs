// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The testbed's command line.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};
use ecr_testbed::arch::{Arch, Gic};
use ecr_testbed::choice::{self, Choice, Place, Wish};
use ecr_testbed::emulated::{self, Emulated};
use ecr_testbed::exec::{CommandSpec, Stream};
use ecr_testbed::files::{EMULATED_VARIABLE, GivenFile};
use ecr_testbed::host::Host;
use ecr_testbed::image::Image;
use ecr_testbed::interrupt;
use ecr_testbed::native::Native;
use ecr_testbed::packages;
use ecr_testbed::runner::{self, Plan};

/// Run commands and tests on a machine with working KVM: this one, or one that QEMU emulates.
#[derive(Parser)]
#[command(version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Build the emulated host's kernel and disk, if they are not in the cache, and print where they are.
    Image {
        /// The architecture to build for [default: this machine's].
        #[arg(long, value_enum)]
        arch: Option<Arch>,
    },
    /// Fetch the containerds that tests run, if they are not in the cache; print NAME=PATH of each, as `--files`
    /// takes it. One that cannot be had is left out, and why is said.
    Containerds {
        /// The architecture to fetch for [default: this machine's].
        #[arg(long, value_enum)]
        arch: Option<Arch>,
        /// Only this one.
        #[arg(long, value_name = "NAME")]
        only: Option<String>,
    },
    /// Print where commands and tests would run, `native` or `testbed`, and on standard error why.
    Place {
        #[command(flatten)]
        host: HostArgs,
    },
    /// Run one command; its exit status becomes ours (124: time limit).
    Run {
        #[command(flatten)]
        host: HostArgs,
        /// Kill the command after this many seconds.
        #[arg(long, value_name = "SECONDS", default_value_t = 600)]
        timeout: u64,
        /// Copy what the command leaves in the directory $ECR_COLLECT to this one.
        #[arg(long, value_name = "DIRECTORY")]
        collect: Option<PathBuf>,
        /// The command and its arguments. Given files are in the directory $ECR_FILES.
        #[arg(last = true, required = true, value_name = "COMMAND")]
        command: Vec<String>,
    },
    /// Run the tests of test binaries, one after the other on each host, each with its own time limit.
    Test {
        #[command(flatten)]
        host: HostArgs,
        /// Emulated hosts that share the tests [default: one for each processor of this machine, at most 4].
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
        hosts: Option<u32>,
        /// Binaries that follow the command line of Rust's test harness.
        #[arg(long, value_name = "PATH", num_args = 1.., required = true)]
        test_binaries: Vec<PathBuf>,
        /// Only tests whose name contains this.
        #[arg(long, value_name = "TEXT", default_value = "")]
        filter: String,
        /// Only the tests that are marked as ignored.
        #[arg(long)]
        ignored: bool,
        /// Kill a test after this many seconds and go on with the next.
        #[arg(long, value_name = "SECONDS", default_value_t = 180)]
        per_test_timeout: u64,
        /// Print the tests' output as it comes.
        #[arg(long)]
        show_output: bool,
        /// Copy what the tests leave in the directory $ECR_COLLECT to this one.
        #[arg(long, value_name = "DIRECTORY")]
        collect: Option<PathBuf>,
    },
    /// An interactive shell.
    Shell {
        #[command(flatten)]
        host: HostArgs,
    },
}

#[derive(Args)]
struct HostArgs {
    /// The architecture of the host [default: this machine's].
    #[arg(long, value_enum)]
    arch: Option<Arch>,
    /// Where to run [default: $ECR_TEST_HOST, or auto]: `auto` is this machine if the probe succeeds.
    #[arg(long, value_enum)]
    host: Option<Wish>,
    /// A shell command that succeeds within 20 s if this machine's KVM can run a stock kernel.
    #[arg(long, value_name = "COMMAND")]
    probe_command: Option<String>,
    /// Hand in this file or directory as $ECR_FILES/NAME.
    #[arg(long, value_name = "NAME=PATH", num_args = 1..)]
    files: Vec<GivenFile>,
    /// Add this to the command's environment.
    #[arg(long, value_name = "NAME=VALUE", num_args = 1..)]
    env: Vec<String>,
    /// Memory of the emulated host in MiB; what it does not touch costs nothing.
    #[arg(long, value_name = "MIB", default_value_t = 8192)]
    memory: u32,
    /// Processors of the emulated host. With more than one, the emulation of nested SVM loses interrupts now and then,
    /// and so guests or the host.
    #[arg(long, value_name = "N", default_value_t = 1)]
    cpus: u32,
    /// Version of the emulated host's interrupt controller on aarch64.
    #[arg(long, value_enum, value_name = "VERSION", default_value = "3")]
    gic: Gic,
    /// Print the emulated host's console.
    #[arg(long)]
    console: bool,
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("testbed: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run(cli: Cli) -> Result<ExitCode> {
    interrupt::handle().context("preparing for interrupts")?;
    match cli.verb {
        Verb::Image { arch } => {
            let image = Image::get(arch_or_native(arch)?)?;
            println!("{}", image.disk().parent().unwrap_or(Path::new(".")).display());
            Ok(ExitCode::SUCCESS)
        }
        Verb::Containerds { arch, only } => {
            containerds(arch_or_native(arch)?, only.as_deref());
            Ok(ExitCode::SUCCESS)
        }
        Verb::Place { host } => {
            let place = match host.choice()?.place {
                Place::Native => "native",
                Place::Testbed => "testbed",
            };
            println!("{place}");
            Ok(ExitCode::SUCCESS)
        }
        Verb::Run { host, timeout, collect, command } => {
            let mut host = host.choose_one()?;
            run_command(host.as_mut(), command, Duration::from_secs(timeout), collect.as_deref())
        }
        Verb::Test {
            host,
            hosts,
            test_binaries,
            filter,
            ignored,
            per_test_timeout,
            show_output,
            collect,
        } => {
            let binaries: Vec<GivenFile> = (test_binaries.iter().enumerate())
                .map(|(number, path)| GivenFile::new(&format!("ecr-tests-{number}"), path))
                .collect::<Result<_, _>>()?;
            let mut hosts = host.choose(&binaries, hosts.unwrap_or_else(lanes))?;
            let plan = Plan {
                binaries: binaries.iter().map(|binary| hosts[0].path_of(binary)).collect(),
                filter,
                ignored,
                time_limit: Duration::from_secs(per_test_timeout),
                show_output,
            };
            let summary = runner::run(&plan, &mut hosts, &mut std::io::stdout())?;
            if let Some(to) = collect {
                hosts.iter_mut().try_for_each(|host| host.collect(&to))?;
            }
            Ok(ExitCode::from(u8::from(summary.failed > 0)))
        }
        Verb::Shell { host } => {
            let shell =
                CommandSpec { argv: vec!["bash".into(), "-l".into()], ..CommandSpec::default() };
            let ending = host.choose_one()?.run_on_terminal(&shell)?;
            Ok(ExitCode::from(ending.status()))
        }
    }
}

fn containerds(arch: Arch, only: Option<&str>) {
    for (name, suite) in packages::CONTAINERDS {
        if only.is_some_and(|only| only != name) {
            continue;
        }
        match packages::unpacked(suite, "containerd", arch) {
            Ok(path) => println!("{name}={}", path.display()),
            Err(error) => eprintln!("testbed: there is no {name} here: {error:#}"),
        }
    }
}

fn run_command(
    host: &mut dyn Host,
    argv: Vec<String>,
    timeout: Duration,
    collect: Option<&Path>,
) -> Result<ExitCode> {
    let spec = CommandSpec { argv, time_limit: Some(timeout), ..CommandSpec::default() };
    let mut lines = StampedLines::new();
    let ending = host.run(&spec, &mut |stream, bytes| lines.print(stream, bytes))?;
    lines.finish();
    if let Some(to) = collect {
        host.collect(to)?;
    }
    if ending.status() != 0 {
        eprintln!("testbed: the command: {ending}");
    }
    Ok(ExitCode::from(ending.status()))
}

impl HostArgs {
    fn choice(&self) -> Result<Choice> {
        let arch = arch_or_native(self.arch)?;
        let choice = choice::choose(self.wish()?, arch, self.probe_command.as_deref())?;
        eprintln!("testbed: {choice}");
        Ok(choice)
    }

    fn choose_one(self) -> Result<Box<dyn Host>> {
        self.choose(&[], 1)?.pop().context("no host")
    }

    /// This machine, or that many emulated ones.
    fn choose(self, more: &[GivenFile], hosts: u32) -> Result<Vec<Box<dyn Host>>> {
        let arch = arch_or_native(self.arch)?;
        let choice = self.choice()?;
        let files: Vec<GivenFile> = self.files.iter().chain(more).cloned().collect();
        let mut environment = self
            .env
            .iter()
            .map(|pair| {
                let (name, value) = pair
                    .split_once('=')
                    .with_context(|| format!("`{pair}`: a variable is given as NAME=VALUE"))?;
                Ok((name.to_owned(), value.to_owned()))
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(match choice.place {
            Place::Native => vec![Box::new(Native::new(&files, &environment)?)],
            Place::Testbed => {
                environment.push((EMULATED_VARIABLE.into(), "1".into()));
                let options = emulated::Options {
                    arch,
                    gic: self.gic,
                    memory_mib: self.memory,
                    cpus: self.cpus,
                    show_console: self.console,
                };
                let host = || Emulated::new(options.clone(), &files, &environment);
                (0..hosts).map(|_| Box::new(host()) as Box<dyn Host>).collect()
            }
        })
    }

    fn wish(&self) -> Result<Wish> {
        use clap::ValueEnum;
        if let Some(wish) = self.host {
            return Ok(wish);
        }
        match std::env::var("ECR_TEST_HOST") {
            Ok(text) if !text.is_empty() => Wish::from_str(&text, false).map_err(|_| {
                anyhow::anyhow!("ECR_TEST_HOST is `{text}`; it can be native, testbed or auto")
            }),
            _ => Ok(Wish::Auto),
        }
    }
}

/// How many hosts keep this machine busy.
fn lanes() -> u32 {
    let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    u32::try_from(processors.min(4)).unwrap_or(1)
}

fn arch_or_native(arch: Option<Arch>) -> Result<Arch> {
    arch.or_else(Arch::native).context("this machine's architecture has no testbed; give --arch")
}

/// Prints output line by line with the seconds since the start before each.
struct StampedLines {
    started: Instant,
    unfinished: [Vec<u8>; 2],
}

impl StampedLines {
    fn new() -> Self {
        Self { started: Instant::now(), unfinished: [Vec::new(), Vec::new()] }
    }

    fn print(&mut self, stream: Stream, bytes: &[u8]) {
        let stamp = self.started.elapsed().as_secs_f64();
        let pending = &mut self.unfinished[usize::from(stream == Stream::Stderr)];
        pending.extend_from_slice(bytes);
        while let Some(end) = pending.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = pending.drain(..=end).collect();
            print_line(stream, stamp, &line);
        }
    }

    fn finish(&mut self) {
        let stamp = self.started.elapsed().as_secs_f64();
        for stream in [Stream::Stdout, Stream::Stderr] {
            let mut line =
                std::mem::take(&mut self.unfinished[usize::from(stream == Stream::Stderr)]);
            if !line.is_empty() {
                line.push(b'\n');
                print_line(stream, stamp, &line);
            }
        }
    }
}

fn print_line(stream: Stream, stamp: f64, line: &[u8]) {
    let text = [format!("[{stamp:8.3}] ").as_bytes(), line].concat();
    // Nobody left to read it is no reason to stop the command.
    let _ = match stream {
        Stream::Stdout => std::io::stdout().write_all(&text),
        Stream::Stderr => std::io::stderr().write_all(&text),
    };
}
