// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! `ecr-runtime config`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;

use ecr_shim::config::{self, Sources};

#[derive(Debug, Args)]
pub struct Arguments {
    /// Leave out what is at its default
    #[arg(long)]
    changed: bool,
}

/// Print the effective configuration; then say what has no effect, and what keeps it from being used.
pub fn run(arguments: &Arguments, named: Option<PathBuf>) -> Result<ExitCode> {
    let sources = Sources::of_tool(named)?;
    let config = config::read(&sources)?;
    print!("{}", config.describe(!arguments.changed));
    for line in config.not_honoured() {
        eprintln!("WARNING: {line}");
    }
    config::load(&sources)?;
    Ok(ExitCode::SUCCESS)
}
