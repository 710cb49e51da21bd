// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Devices whose queues somebody else serves: the host's kernel (Linux, drivers/vhost), or another process.

pub mod kernel;
pub mod memory;
pub mod net;
pub mod user;
pub mod vsock;
