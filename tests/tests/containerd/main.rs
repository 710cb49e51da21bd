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
                with_containerd(Version::$version, super::$name)
            })+
        })+
    };
}

mod bad_input;
mod basic;
mod failures;
mod many;
mod pods;
mod storage;
