// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Containers.

/// The containers of the sandbox.
#[derive(Debug, Default)]
pub struct Containers {}
