// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The testbed: a machine on which every integration test can run.
//!
//! Tests that boot Linux need a KVM that can run a stock kernel. Where this machine has one, tests run here
//! ([`native`]). Elsewhere QEMU's software emulation plays a *host* that has one ([`emulated`]): nested SVM on
//! x86_64, EL2 on aarch64, with vhost-net and vhost-vsock. [`choice`] decides which, by a probe.
//!
//! ```text
//!  ecr-testbed ── runner ── Host ─┬─ native:   a process group of this machine
//!   (bin)        (tests)          └─ emulated: QEMU ══ virtio-serial ══ ecr-testbed-init (pid 1 there)
//!                                                        protocol            └─ exec: a cgroup
//! ```
//!
//! [`exec`] runs one command with a time limit and is the same code in both places. [`image`] builds the
//! emulated host's disk from Debian packages, once, into a cache; [`packages`] unpacks single ones, [`emulator`] has QEMU itself.
//!
//! Left out: a network between the emulated host and this machine; tests need none.

pub mod arch;
pub mod cache;
pub mod choice;
pub mod cpio;
pub mod emulated;
pub mod emulator;
pub mod exec;
pub mod files;
pub mod host;
pub mod image;
pub mod init;
pub mod init_program;
pub mod interrupt;
pub mod mirror;
pub mod native;
pub mod packages;
pub mod protocol;
pub mod qemu;
pub mod runner;
pub mod tool;
pub mod tree;
