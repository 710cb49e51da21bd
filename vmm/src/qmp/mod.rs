// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The QEMU Machine Protocol (QEMU's `docs/interop/qmp-spec.rst`), for the clients that people already have.
//!
//! A [`Server`] has one descriptor to poll; the control thread polls it and lends itself as the
//! [`Controller`] that carries out what clients ask for. From the socket inwards: `server` moves bytes,
//! `session` keeps what one client said, `codec` cuts and writes JSON, `command` and `event` are the tables
//! from which dispatch, `query-commands` and `query-qmp-schema` all come, `info` spells replies.
//!
//! Devices that come and go are described to `backends`, `device` and `fds`, which is all that the server itself
//! remembers.
//!
//! Left out: out-of-band execution (the capability is not offered), strings in single quotes, and the
//! check for members given twice (the last one counts).

mod backends;
mod codec;
mod command;
mod device;
mod event;
mod fds;
mod info;
mod property;
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
