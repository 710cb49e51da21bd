// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! `ecr-runtime check`: can this host run ecr, and if not, why.
//!
//! A virtual machine is created and runs what a stock kernel needs; flags and modules alone prove nothing. Devices that
//! ecr can do without are reported when they are missing, as pods are slower without them.

use std::fmt;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::Args;

use ecr_shim::config::{self, Config, SharedFs, Sources};

use crate::host;

#[derive(Debug, Args)]
pub struct Arguments {
    /// Count what ecr can do without, too
    #[arg(long, short)]
    strict: bool,
    /// Show what is as it should be, too
    #[arg(long, short)]
    verbose: bool,
    /// Accepted as by Kata: this program never uses the network
    #[arg(long, short, hide = true)]
    no_network_checks: bool,
    /// Of Kata; not offered
    #[arg(long, hide = true)]
    check_version_only: bool,
    /// Of Kata; not offered
    #[arg(long, hide = true)]
    include_all_releases: bool,
    /// Of Kata; not offered
    #[arg(long, hide = true)]
    only_list_releases: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Ok,
    /// It would be faster otherwise.
    Hint,
    /// ecr can do without.
    Warning,
    Failed,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ok => "ok",
            Self::Hint => "hint",
            Self::Warning => "WARNING",
            Self::Failed => "ERROR",
        })
    }
}

/// Findings, printed as they come.
struct Report {
    verbose: bool,
    strict: bool,
    failed: bool,
}

impl Report {
    fn note(&mut self, verdict: Verdict, text: impl fmt::Display) {
        let counts = verdict == Verdict::Failed || (self.strict && verdict == Verdict::Warning);
        self.failed |= counts;
        if matches!(verdict, Verdict::Ok | Verdict::Hint) {
            if self.verbose {
                println!("{verdict}: {text}");
            }
        } else {
            eprintln!("{verdict}: {text}");
        }
    }
}

/// Look at everything, and conclude.
pub fn run(arguments: &Arguments, named: Option<PathBuf>) -> Result<ExitCode> {
    if arguments.check_version_only
        || arguments.only_list_releases
        || arguments.include_all_releases
    {
        bail!("there is no list of releases to look at: see where ecr was installed from");
    }
    let mut report = Report { verbose: arguments.verbose, strict: arguments.strict, failed: false };
    check_processor(&mut report);
    let kvm = check_devices(&mut report);
    check_configuration(&mut report, named);
    if kvm {
        check_machine(&mut report);
    }
    if report.failed {
        eprintln!("ERROR: System is not capable of running Kata Containers");
        return Ok(ExitCode::FAILURE);
    }
    println!("System is capable of running Kata Containers");
    println!("System can currently create Kata Containers");
    Ok(ExitCode::SUCCESS)
}

/// Flags; whether virtualization works is found out by a virtual machine.
fn check_processor(report: &mut Report) {
    if !cfg!(target_arch = "x86_64") {
        return;
    }
    let missing = host::missing_cpu_flags(&["lm", "sse4_1"]);
    if missing.is_empty() {
        report.note(Verdict::Ok, "the processor has lm, sse4_1");
    } else {
        report.note(Verdict::Failed, format!("the processor lacks {}", missing.join(", ")));
    }
    if host::missing_cpu_flags(&["vmx", "svm"]).len() == 2 {
        let text = "the processor shows neither vmx nor svm: is virtualization enabled in the firmware, or nested \
                    virtualization in the host of this machine?";
        report.note(Verdict::Warning, text);
    } else {
        report.note(Verdict::Ok, "the processor shows vmx or svm");
    }
}

/// True when a virtual machine can be tried.
fn check_devices(report: &mut Report) -> bool {
    let kvm = host::can_use("/dev/kvm");
    match &kvm {
        Ok(()) => report.note(Verdict::Ok, "/dev/kvm can be opened"),
        Err(error) => report.note(
            Verdict::Failed,
            format!("open /dev/kvm: {error}: load its module, if it is one, and run as root or in the group kvm"),
        ),
    }
    for (device, module, without) in [
        ("/dev/net/tun", "tun", "pods have no network"),
        ("/dev/vhost-net", "vhost_net", "the shim serves the network itself, slower"),
        (
            "/dev/vhost-vsock",
            "vhost_vsock",
            "the shim serves vsock itself, and the agent is reached through a socket",
        ),
    ] {
        match host::can_use(device) {
            Ok(()) => report.note(Verdict::Ok, format!("{device} can be opened")),
            Err(error) => {
                let advice = if host::has_module(module) {
                    String::new()
                } else {
                    format!(" (`modprobe {module}`)")
                };
                report.note(
                    Verdict::Warning,
                    format!("open {device}: {error}{advice}; without it {without}"),
                );
            }
        }
    }
    kvm.is_ok()
}

/// The configuration, and the programs and files that it names.
fn check_configuration(report: &mut Report, named: Option<PathBuf>) {
    let config = Sources::of_tool(named).and_then(|sources| config::load(&sources));
    let config = match config {
        Ok(config) => config,
        Err(error) => {
            report.note(Verdict::Failed, format!("configuration: {error}"));
            return;
        }
    };
    report.note(Verdict::Ok, format!("configuration: {}", config.path.display()));
    for line in config.not_honoured() {
        report.note(Verdict::Warning, line);
    }
    check_virtiofsd(report, &config);
    check_shared_memory(report, &config);
}

fn check_virtiofsd(report: &mut Report, config: &Config) {
    if config.hypervisor.shared_fs != SharedFs::VirtioFs {
        return;
    }
    let Some(daemon) = &config.hypervisor.virtio_fs_daemon else { return };
    match executable(daemon) {
        Ok(()) => report.note(Verdict::Ok, format!("virtiofsd: {}", daemon.display())),
        Err(why) => report.note(
            Verdict::Failed,
            format!("virtiofsd: {}: {why}: install it, or set virtio_fs_daemon", daemon.display()),
        ),
    }
}

/// A guest that shares files has its memory in a file.
fn check_shared_memory(report: &mut Report, config: &Config) {
    if config.hypervisor.shared_fs == SharedFs::VirtioFs
        && host::huge_shared_memory() == Some(false)
    {
        let file = host::HUGE_SHARED_MEMORY;
        let text = format!("guests that share files boot faster after `echo advise > {file}`");
        report.note(Verdict::Hint, text);
    }
}

fn executable(path: &Path) -> std::result::Result<(), String> {
    let metadata = path.metadata().map_err(|error| error.to_string())?;
    if metadata.is_file() && metadata.permissions().mode() & 0o111 != 0 {
        Ok(())
    } else {
        Err("it is no program".into())
    }
}

/// Create a virtual machine, and let it do what a kernel does.
fn check_machine(report: &mut Report) {
    let proof = ecr_vmm::hypervisor::host()
        .map_err(|error| error.to_string())
        .and_then(|host| ecr_vmm::probe::probe(&host).map_err(|error| error.to_string()));
    match proof {
        Ok(proof) if proof.steps.is_empty() => {
            report.note(Verdict::Ok, "a virtual machine can be created");
        }
        Ok(proof) => report.note(Verdict::Ok, format!("a virtual machine runs: {proof}")),
        Err(why) => report.note(Verdict::Failed, why),
    }
}
