// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The virtual machine monitor as a library.
//!
//! It lives as a guest in somebody's process: it never exits, forks, changes process-wide state,
//! installs signal handlers or prints. See `docs/architecture.md`.

#![deny(clippy::print_stdout, clippy::print_stderr)]

pub mod boot;
pub mod cmdline;
pub mod config;
pub mod control;
mod handle;
pub mod hypervisor;
mod machine;
pub mod memory;
pub mod probe;
pub mod qmp;
pub mod vcpu;
pub mod vm;

pub use handle::VmHandle;
pub use vm::{StartError, VmOptions, start};
