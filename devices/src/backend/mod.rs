// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What stands behind devices on the host's side.

pub mod block;
pub mod chardev;
pub(crate) mod stream;
pub mod tap;
pub mod unix_socket;
