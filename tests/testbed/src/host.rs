// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! A machine that commands can be run on: this one or an emulated one.

use std::path::Path;

use anyhow::Result;

use crate::exec::{CommandSpec, Ending, Stream};
use crate::files::GivenFile;

/// What a caller does with output as it comes.
pub type Output<'a> = &'a mut dyn FnMut(Stream, &[u8]);

/// A machine that runs commands, one at a time, with the given files at hand.
pub trait Host: Send {
    /// Runs `spec` to its end and leaves nothing of it behind.
    ///
    /// # Errors
    /// The command could not be started, or the host was lost; the next call has a working host again if that is
    /// possible at all.
    fn run(&mut self, spec: &CommandSpec, output: Output<'_>) -> Result<Ending>;

    /// Runs `spec` on the terminal of standard input.
    ///
    /// # Errors
    /// As for [`Host::run`].
    fn run_on_terminal(&mut self, spec: &CommandSpec) -> Result<Ending>;

    /// Where a command finds the file of this name.
    fn path_of(&self, file: &GivenFile) -> String;

    /// Copies what commands left in the directory `ECR_COLLECT` to `to`.
    ///
    /// # Errors
    /// The host was lost or `to` cannot be written.
    fn collect(&mut self, to: &Path) -> Result<()>;
}
