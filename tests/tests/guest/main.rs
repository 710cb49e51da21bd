// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Real guests. They need a place whose KVM can run a stock kernel, so they are marked as ignored and
//! `tools/dev test` runs them, here or in the testbed.

#![allow(clippy::unwrap_used)] // A failed step is a failed test.

mod boot;
mod control;
mod disks;
mod network;
mod share;
mod virt;
mod vsock;

use anyhow::{Context, Result, ensure};
use ecr_tests::guest::{Boot, Guest};
use ecr_tests::place::Place;

/// Exit statuses of `ecr-vmm`.
const POWERED_OFF: i32 = 0;
const BAD_ARGUMENTS: i32 = 2;
const PANICKED: i32 = 3;

fn place() -> Place {
    Place::from_environment().unwrap()
}

/// Wait for the end and see that the guest powered off. Returns what was said.
fn ends_well(guest: Guest) -> Result<String> {
    let (status, said) = guest.wait_end()?;
    ensure!(status == POWERED_OFF, "exit status {status}:\n{said}");
    Ok(said)
}

/// Boot to the end and see that the guest was up and powered off cleanly. Returns what was said.
fn powers_off(boot: Boot) -> Result<String> {
    let said = ends_well(boot.start()?)?;
    ensure!(said.contains(" ready in "), "the agent was not up:\n{said}");
    Ok(said)
}

/// What the guest's script printed as `KEY=value`.
fn value<'a>(said: &'a str, key: &str) -> Result<&'a str> {
    said.lines()
        .find_map(|line| line.trim().strip_prefix(key)?.strip_prefix('='))
        .with_context(|| format!("no {key}= in:\n{said}"))
}
