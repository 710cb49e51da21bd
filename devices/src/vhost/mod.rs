// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Devices whose queues the host's kernel serves (Linux, drivers/vhost).

pub mod kernel;
pub mod memory;
pub mod vsock;
