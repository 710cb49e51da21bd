// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What the integration tests and benchmarks share: where things are, guests that run in a VMM process of their
//! own, a small QMP client, and containerds of their own with small clients for `ctr`'s and Kubernetes' interfaces.
//!
//! The testbed hands files in through the directory `$ECR_FILES`: `vmm` is the program `ecr-vmm`, `guest` the built
//! guest (see `guest/build`).

#![allow(clippy::unwrap_used, clippy::expect_used)] // A failed step is a failed test.

pub mod containerd;
pub mod guest;
pub mod place;
pub mod qmp;
pub mod skip;
