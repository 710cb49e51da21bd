// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! `ecr-runtime`: what an operator asks of ecr on a host. Names, options and output are those of Kata's `kata-runtime`
//! where it has them.

mod check;
mod client;
mod config;
mod env;
mod exec;
mod host;
mod log;
mod version;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{CommandFactory as _, Parser, Subcommand, ValueEnum};

use ecr_shim::config::DEFAULT_PATHS;

/// Check a host for ecr, show its configuration, and look into running sandboxes.
#[derive(Debug, Parser)]
#[command(name = "ecr-runtime", disable_version_flag = true, max_term_width = 100)]
struct Cli {
    /// Configuration file
    #[arg(long, visible_alias = "kata-config", value_name = "FILE", global = true)]
    config: Option<PathBuf>,
    /// Where this program's own messages go
    #[arg(long, value_name = "FILE", default_value = "/dev/null", global = true)]
    log: PathBuf,
    /// Format of those messages
    #[arg(long, value_enum, default_value = "text", global = true)]
    log_format: LogFormat,
    /// Where the sockets of sandboxes are
    #[arg(long, value_name = "DIR", default_value = "/run/vc/sbs", global = true)]
    root: PathBuf,
    /// Accepted as by Kata; has no effect
    #[arg(long, value_enum, default_value = "auto", global = true, hide = true)]
    rootless: Rootless,
    /// Accepted as by Kata; has no effect
    #[arg(long, global = true, hide = true)]
    systemd_cgroup: bool,
    /// Show where a configuration file is looked for, and exit
    #[arg(long)]
    show_default_config_paths: bool,
    /// Show the version, and exit
    #[arg(long, short = 'v')]
    version: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Rootless {
    Auto,
    True,
    False,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show the version
    Version,
    /// Find out whether this host can run ecr: a virtual machine is created and runs what a kernel needs
    #[command(alias = "kata-check")]
    Check(check::Arguments),
    /// Show what a sandbox would be made of on this host
    #[command(alias = "kata-env")]
    Env(env::Arguments),
    /// Show the effective configuration, and where each value comes from
    Config(config::Arguments),
    /// Open the debug console of a sandbox; needs debug_console_enabled in its configuration
    Exec(exec::Arguments),
    /// Show the figures of a sandbox in Prometheus' format
    Metrics {
        /// The sandbox
        #[arg(value_name = "SANDBOX")]
        sandbox: String,
    },
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("ERROR: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<ExitCode> {
    if cli.version {
        version::print();
        return Ok(ExitCode::SUCCESS);
    }
    if cli.show_default_config_paths {
        DEFAULT_PATHS.iter().for_each(|path| println!("{path}"));
        return Ok(ExitCode::SUCCESS);
    }
    log::install(&cli.log, matches!(cli.log_format, LogFormat::Json))?;
    match cli.command {
        None => {
            Cli::command().print_help()?;
            Ok(ExitCode::SUCCESS)
        }
        Some(Command::Version) => {
            version::print();
            Ok(ExitCode::SUCCESS)
        }
        Some(Command::Check(arguments)) => check::run(&arguments, cli.config),
        Some(Command::Env(arguments)) => env::run(&arguments, cli.config),
        Some(Command::Config(arguments)) => config::run(&arguments, cli.config),
        Some(Command::Exec(arguments)) => exec::run(&arguments, &cli.root),
        Some(Command::Metrics { sandbox }) => {
            print!("{}", client::ask(&cli.root, &sandbox, "/metrics")?);
            Ok(ExitCode::SUCCESS)
        }
    }
}
