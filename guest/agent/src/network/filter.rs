// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The packet filter, by the programs that the image has for it: their text is the format of the calls.

use anyhow::{Context, Result};

use crate::exec::{find_program, run_to_end};
use crate::reaper::Reaper;

/// Another program may be at the tables.
const SECONDS_TO_WAIT: &str = "5";

/// The rules as `iptables-save` or `ip6tables-save` writes them.
pub async fn get_tables(v6: bool, reaper: &Reaper) -> Result<Vec<u8>> {
    let program = if v6 { "ip6tables-save" } else { "iptables-save" };
    run(program, &[], Vec::new(), reaper).await
}

/// Replace the rules by `rules`, which is what [`get_tables`] returns.
pub async fn set_tables(v6: bool, rules: Vec<u8>, reaper: &Reaper) -> Result<Vec<u8>> {
    let program = if v6 { "ip6tables-restore" } else { "iptables-restore" };
    run(program, &["--wait", SECONDS_TO_WAIT], rules, reaper).await
}

async fn run(
    program: &str,
    arguments: &[&str],
    input: Vec<u8>,
    reaper: &Reaper,
) -> Result<Vec<u8>> {
    let path = find_program(program)?;
    let finished = run_to_end(&path, arguments, input, reaper)
        .await
        .with_context(|| format!("run {program}"))?;
    finished.check(program)?;
    Ok(finished.output)
}
