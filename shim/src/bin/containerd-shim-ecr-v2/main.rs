// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! `containerd-shim-ecr-v2`.

fn main() {}
