// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Tests that cannot run here say so to the testbed's runner, and count as skipped.

use std::fmt::Display;

/// Why a test cannot run here, as an error.
#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error("{0}")]
pub struct Skipped(pub &'static str);

/// Ends this process as a skipped test, which is what the runner takes this line and this exit status for.
pub fn skip(why: impl Display) -> ! {
    println!("SKIPPED: {why}");
    std::process::exit(77)
}
