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
    // The test harness has begun a line with the test's name.
    println!("\nSKIPPED: {why}");
    std::process::exit(77)
}

/// Whether only those tests are wanted that can tell one architecture from another: because all of them run on another
/// one in the same go.
pub fn only_core() -> bool {
    std::env::var_os("ECR_TEST_CORE").is_some_and(|value| !value.is_empty())
}

/// The test that calls it sees nothing that depends on the architecture: ends this process as a skipped test where only
/// others are wanted.
pub fn same_everywhere() {
    if only_core() {
        skip("nothing in it depends on the architecture, and it runs on another one");
    }
}
