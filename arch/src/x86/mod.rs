// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! x86_64: what a vCPU is told about itself and the state it starts in.

pub mod cpuid;
pub mod lapic;
pub mod msr;
pub mod regs;
