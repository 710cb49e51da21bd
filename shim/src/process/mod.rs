// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The contract between containerd and the shim as a process.
