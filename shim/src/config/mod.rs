// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Kata's configuration files and annotations.

mod container_type;

pub use container_type::{ContainerType, container_type, sandbox_id};
