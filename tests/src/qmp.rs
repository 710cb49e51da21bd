// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! A QMP client of few lines, for tests: commands, their replies, and the events that come in between.

use std::io::{BufRead, BufReader, IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};

use crate::guest::{PATIENCE, wait_for_socket};

/// A negotiated session.
#[derive(Debug)]
pub struct Qmp {
    stream: BufReader<UnixStream>,
    events: Vec<Value>,
}

impl Qmp {
    /// Connect and negotiate.
    ///
    /// # Errors
    /// Nobody listens, or it is no QMP server.
    pub fn connect(path: &Path) -> Result<Self> {
        let stream = wait_for_socket(path)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut qmp = Self { stream: BufReader::new(stream), events: Vec::new() };
        let greeting = qmp.read()?;
        ensure!(greeting["QMP"]["version"]["qemu"]["major"].is_u64(), "greeting: {greeting}");
        qmp.execute("qmp_capabilities")?;
        Ok(qmp)
    }

    /// Send a command; returns its value.
    ///
    /// # Errors
    /// It was refused, or the connection broke.
    pub fn execute(&mut self, command: &str) -> Result<Value> {
        self.execute_with(command, &json!({}))
    }

    /// Send a command with arguments; returns its value.
    ///
    /// # Errors
    /// It was refused, or the connection broke.
    pub fn execute_with(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        self.execute_giving(command, arguments, &[])
    }

    /// Give the server a descriptor, which is called `name` from then on.
    ///
    /// # Errors
    /// It was refused, or the connection broke.
    pub fn give(&mut self, name: &str, descriptor: BorrowedFd<'_>) -> Result<()> {
        self.execute_giving("getfd", &json!({ "fdname": name }), &[descriptor]).map(drop)
    }

    fn execute_giving(
        &mut self,
        command: &str,
        arguments: &Value,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<Value> {
        let request = json!({ "execute": command, "arguments": arguments, "id": command });
        let request = format!("{request}\n");
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(descriptors));
        }
        let request = request.as_bytes();
        let flags = SendFlags::NOSIGNAL;
        let sent = sendmsg(self.stream.get_ref(), &[IoSlice::new(request)], &mut control, flags)?;
        self.stream.get_mut().write_all(&request[sent..])?;
        loop {
            let reply = self.read()?;
            if reply["event"].is_string() {
                self.events.push(reply);
            } else {
                ensure!(reply["id"] == command, "reply to another command: {reply}");
                ensure!(reply["error"].is_null(), "{command}: {reply}");
                return Ok(reply["return"].clone());
            }
        }
    }

    /// Wait for an event, which may have come already.
    ///
    /// # Errors
    /// The connection broke before, or nothing came in time.
    pub fn wait_event(&mut self, name: &str) -> Result<Value> {
        loop {
            if let Some(at) = self.events.iter().position(|event| event["event"] == name) {
                return Ok(self.events.remove(at));
            }
            let event = self.read().with_context(|| format!("wait for {name}"))?;
            self.events.push(event);
        }
    }

    fn read(&mut self) -> Result<Value> {
        let mut line = String::new();
        let length = self
            .stream
            .read_line(&mut line)
            .with_context(|| format!("nothing came in {PATIENCE:?}, or it broke"))?;
        if length == 0 {
            bail!("the server has closed the connection");
        }
        serde_json::from_str(&line).with_context(|| format!("not JSON: {line}"))
    }
}
