// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! aarch64 processors: identification and boot registers. Arm Architecture Reference Manual, DDI 0487.

pub mod id;
pub mod regs;
