// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What becomes of a container's specification, root file system and volumes on the way into the guest.

pub mod rootfs;
pub mod spec;
pub mod volume;
pub mod wire;
