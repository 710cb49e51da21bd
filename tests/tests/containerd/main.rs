// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Containers through real containerds, by `ctr` and by CRI. They need root and a place whose KVM can run a stock
//! kernel, so they are marked as ignored and `tools/dev test` runs them, here or in the testbed.
//!
//! Each test has a containerd of its own, and at its end nothing may be left behind (`ecr_tests::containerd::leaks`).
//! With `ECR_TEST_RUNTIME=runc` all of it runs with runc.

#![allow(clippy::unwrap_used)] // A failed step is a failed test.

/// Makes a test of each function, on each of the containerds that stand before it.
macro_rules! tests_on {
    ($($module:ident: $version:ident, [$($name:ident),+ $(,)?];)+) => {
        $(mod $module {
            use ecr_tests::containerd::{Version, with_containerd};
            $(#[test]
            #[ignore = "runs containers"]
            fn $name() -> anyhow::Result<()> {
                crate::skip_unless_core(stringify!($version), stringify!($name));
                with_containerd(Version::$version, super::$name)
            })+
        })+
    };
}

/// What a second architecture has to show, on the middle one of the containerds: that each way from containerd into a
/// guest leads there.
const CORE: [&str; 8] = [
    "a_container_has_a_kernel_of_its_own",
    "exit_codes_come_back",
    "exec_runs_beside",
    "a_terminal_can_be_resized",
    "two_containers_share_the_network",
    "pods_and_host_reach_each_other",
    "limits_can_be_changed",
    "a_block_device_is_a_root",
];

fn skip_unless_core(version: &str, name: &str) {
    if version != "V1_7" || !CORE.contains(&name) {
        ecr_tests::skip::same_everywhere();
    }
}

mod bad_input;
mod basic;
mod failures;
mod many;
mod pods;
mod storage;
