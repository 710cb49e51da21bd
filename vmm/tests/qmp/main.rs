// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The QMP server over real sockets, with a scripted machine behind it: what clients of QEMU see, and what
//! hostile ones can do.

// A helper of a test fails the test, too.
#![allow(clippy::unwrap_used)]

mod client;
mod hostile;
mod machine;
mod python;
mod session;
mod transcripts;
