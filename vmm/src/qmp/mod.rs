// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The QEMU Machine Protocol (QEMU's `docs/interop/qmp-spec.rst`), for the clients that people already have.
//!
//! A [`Server`] has one descriptor to poll; the control thread polls it and lends itself as the
//! [`Controller`] that carries out what clients ask for. From the socket inwards: `server` moves bytes,
//! `session` keeps what one client said, `codec` cuts and writes JSON, `command` and `event` are the tables
//! from which dispatch, `query-commands` and `query-qmp-schema` all come, `info` spells replies.
//!
//! Left out: out-of-band execution (the capability is not offered), strings in single quotes, the
//! check for members given twice (the last one counts), and descriptors sent along with a command, which the
//! kernel discards.

mod codec;
mod command;
mod event;
mod info;
mod request;
mod schema;
mod server;
mod session;

use crate::control::{Command, CommandError, Event, Reply};

pub use server::Server;

/// Who carries out what clients ask for.
pub trait Controller {
    /// Carry out a command.
    ///
    /// # Errors
    /// The machine refused; it is as it was.
    fn execute(&mut self, command: Command) -> Result<Reply, CommandError>;

    /// Events since the last call, oldest first. The server asks after each command, so that clients see
    /// what a command caused before they see its reply, as with QEMU.
    fn take_events(&mut self) -> Vec<Event>;
}
