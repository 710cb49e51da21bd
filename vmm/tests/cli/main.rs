// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The program `ecr-vmm` as a person or a script sees it: its words, its exit status, what it leaves behind.
//! The guests are a few bytes long and run on this machine's KVM.

// A helper of a test fails the test, too.
#![allow(clippy::unwrap_used)]

mod arguments;
mod guest;
mod program;
mod running;
mod terminal;
