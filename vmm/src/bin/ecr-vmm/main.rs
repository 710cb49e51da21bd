// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! `ecr-vmm`: run one virtual machine from the command line. What belongs to the whole process (the terminal,
//! signals, the log, the exit status) is here; the rest is the library.

mod logger;
mod signals;
mod supervisor;
mod terminal;

use std::error::Error;
use std::io::{self, IsTerminal};
use std::os::fd::AsRawFd;
use std::process::ExitCode;
use std::sync::Arc;

use ecr_vmm::cmdline::{self, CmdlineError, Invocation};
use ecr_vmm::config::{ChardevConfig, VmConfig};
use ecr_vmm::control::ShutdownReason;
use ecr_vmm::hypervisor::kvm::Kvm;
use ecr_vmm::{StartError, VmOptions};

use signals::Signals;
use supervisor::Supervisor;
use terminal::Terminal;

const BAD_ARGUMENTS: u8 = 2;
const GUEST_PANICKED: u8 = 3;
const VM_FAILED: u8 = 4;

fn main() -> ExitCode {
    let invocation = match cmdline::parse(std::env::args_os()) {
        Ok(invocation) => invocation,
        Err(error) => return refuse(&error),
    };
    if let Err(error) = logger::install(&invocation.log) {
        return conclude_with(BAD_ARGUMENTS, &error.to_string());
    }
    match run(invocation) {
        Ok(reason) => conclude(&reason),
        Err(error) => conclude_with(status_of(&*error), &error.to_string()),
    }
}

/// Run the VM to its end. The terminal is as it was when this returns.
fn run(mut invocation: Invocation) -> Result<ShutdownReason, Box<dyn Error>> {
    // Before there are threads: they inherit that these signals are blocked.
    let signals = Signals::take()?;
    let hypervisor = Arc::new(Kvm::open()?);
    let terminal = if invocation.uses_stdio && io::stdin().is_terminal() {
        eprintln!("ecr-vmm: this terminal is the guest's; {}", terminal::KEYS);
        Some(Terminal::take()?)
    } else {
        None
    };
    if let Some(terminal) = &terminal {
        read_from(&mut invocation.config, terminal);
    }
    let Invocation { config, qmp, paused, .. } = invocation;
    let vm = ecr_vmm::start(config, VmOptions { hypervisor, qmp, paused })?;
    Supervisor::new(&vm, signals, terminal)?.run()?;
    Ok(vm.wait())
}

/// What was asked for and cannot be had is the arguments' fault, everything else is the host's.
fn status_of(error: &(dyn Error + 'static)) -> u8 {
    match error.downcast_ref() {
        None | Some(StartError::Hypervisor(_) | StartError::Host { .. }) => VM_FAILED,
        Some(_) => BAD_ARGUMENTS,
    }
}

/// Let the guest's input come through `terminal`, which watches for its escape key.
fn read_from(config: &mut VmConfig, terminal: &Terminal) {
    for chardev in [&mut config.console, &mut config.serial] {
        if let ChardevConfig::Fds { input, .. } = chardev {
            *input = Some(terminal.guest_end().as_raw_fd());
        }
    }
}

/// Say how it ended.
fn conclude(reason: &ShutdownReason) -> ExitCode {
    match reason {
        ShutdownReason::GuestShutdown => conclude_with(0, "the guest has powered off"),
        ShutdownReason::GuestReset => {
            conclude_with(0, "the guest has rebooted, which ends it here")
        }
        ShutdownReason::HostQuit => conclude_with(0, "ended on request"),
        ShutdownReason::GuestPanic => conclude_with(GUEST_PANICKED, "the guest's kernel panicked"),
        ShutdownReason::Failed(text) => conclude_with(VM_FAILED, text),
    }
}

fn conclude_with(status: u8, text: &str) -> ExitCode {
    eprintln!("ecr-vmm: {text}");
    ExitCode::from(status)
}

/// Say what is wrong with the arguments, or give the help that was asked for.
fn refuse(error: &CmdlineError) -> ExitCode {
    match error {
        CmdlineError::Arguments(error) if !error.use_stderr() => {
            // Nobody may read it.
            let _ = error.print();
            ExitCode::SUCCESS
        }
        CmdlineError::Arguments(error) => {
            let text = error.to_string();
            let text = text.split("\n\nUsage:").next().unwrap_or_default();
            let text = text.split("\n\nFor more").next().unwrap_or_default();
            let words: Vec<&str> = text.trim_start_matches("error: ").split_whitespace().collect();
            conclude_with(BAD_ARGUMENTS, &format!("{} (see --help)", words.join(" ")))
        }
        CmdlineError::Config(error) => conclude_with(BAD_ARGUMENTS, &error.to_string()),
    }
}
