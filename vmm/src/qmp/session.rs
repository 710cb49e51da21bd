// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What one client has said and what it has yet to be told. Knows no socket.

use std::os::fd::OwnedFd;

use serde_json::{Map, Value, json};

use super::Controller;
use super::backends::Backends;
use super::codec::{Decoder, write_line};
use super::command::{self, Run, Workbench};
use super::fds::FdTable;
use super::info;
use super::request::{self, Answer, QmpError, Request};

/// While more than this many bytes wait for a client that does not read, it is not served.
const OUTPUT_PAUSE: usize = 64 << 10;
/// A client for which more than this many bytes wait, because events go on, is given up.
const OUTPUT_MAX: usize = 1 << 20;

/// One client.
#[derive(Debug)]
pub(super) struct Session {
    decoder: Decoder,
    negotiated: bool,
    fds: FdTable,
    output: Vec<u8>,
}

impl Session {
    /// A client that has just connected: it is greeted.
    pub(super) fn new() -> Self {
        let mut session = Self {
            decoder: Decoder::new(),
            negotiated: false,
            fds: FdTable::default(),
            output: Vec::new(),
        };
        write_line(&mut session.output, &info::greeting());
        session
    }

    /// Take what the client sent.
    pub(super) fn receive(&mut self, bytes: &[u8]) {
        self.decoder.feed(bytes);
    }

    /// Take a descriptor that the client sent along.
    pub(super) fn receive_fd(&mut self, fd: OwnedFd) {
        self.fds.receive(fd);
    }

    /// Carry out the next command that has wholly arrived.
    pub(super) fn next_answer(
        &mut self,
        backends: &mut Backends,
        controller: &mut dyn Controller,
    ) -> Option<Answer> {
        let Some(message) = self.decoder.next() else {
            if self.decoder.is_between_values() {
                self.fds.forget_waiting();
            }
            return None;
        };
        let (id, request) = match message {
            Ok(message) => request::parse(message),
            Err(error) => (None, Err(error)),
        };
        let result = request.and_then(|request| self.execute(&request, backends, controller));
        Some(Answer::new(id, result))
    }

    fn execute(
        &mut self,
        request: &Request,
        backends: &mut Backends,
        controller: &mut dyn Controller,
    ) -> Result<Value, QmpError> {
        if !self.negotiated && request.command != "qmp_capabilities" {
            return Err(QmpError::command_not_found(
                "Expecting capabilities negotiation with 'qmp_capabilities'",
            ));
        }
        let spec = command::find(&request.command, &request.arguments)?;
        match &spec.run {
            Run::Negotiate => self.negotiate(&request.arguments),
            Run::Here(answer) => Ok(answer()),
            Run::Control(command, spell) => {
                let reply = controller.execute(command.clone())?;
                spell(&reply).ok_or_else(|| {
                    QmpError::generic(format!("{command:?} was answered with {reply:?}"))
                })
            }
            Run::Plug(run) => {
                let mut at = Workbench { backends, fds: &mut self.fds, controller };
                run(&request.arguments, &mut at)
            }
        }
    }

    fn negotiate(&mut self, arguments: &Map<String, Value>) -> Result<Value, QmpError> {
        if self.negotiated {
            return Err(QmpError::command_not_found(
                "Capabilities negotiation is already complete, command ignored",
            ));
        }
        // None is offered, so whatever is asked for is not there.
        let wanted: Vec<&str> = arguments
            .get("enable")
            .and_then(Value::as_array)
            .map(|names| names.iter().filter_map(Value::as_str).collect())
            .unwrap_or_default();
        if !wanted.is_empty() {
            let wanted = wanted.join(", ");
            return Err(QmpError::generic(format!("Capability {wanted} not available")));
        }
        self.negotiated = true;
        Ok(json!({}))
    }

    /// Queue an answer.
    pub(super) fn answer(&mut self, answer: &Answer) {
        write_line(&mut self.output, answer);
    }

    /// Queue an event, already encoded. A client that has not negotiated hears of none.
    pub(super) fn notify(&mut self, line: &[u8]) {
        if self.negotiated {
            self.output.extend_from_slice(line);
        }
    }

    /// What is to be sent.
    pub(super) fn output(&self) -> &[u8] {
        &self.output
    }

    /// The first `length` bytes of the output are on their way.
    pub(super) fn sent(&mut self, length: usize) {
        self.output.drain(..length);
        if self.output.is_empty() {
            self.output = Vec::new();
        }
    }

    /// Whether the client must read before it is served again.
    pub(super) fn is_paused(&self) -> bool {
        self.output.len() > OUTPUT_PAUSE
    }

    /// Whether so much waits for the client that it is given up.
    pub(super) fn is_lost(&self) -> bool {
        self.output.len() > OUTPUT_MAX
    }
}
