// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! A client that waits for each line.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde_json::{Value, json};

use crate::machine::Running;

/// A server that does not answer fails the test instead of stopping it.
const PATIENCE: Duration = Duration::from_secs(30);

pub struct Client {
    stream: BufReader<UnixStream>,
}

impl Client {
    /// Connect and read the greeting.
    pub fn greeted(server: &Running) -> (Self, Value) {
        let stream = UnixStream::connect(server.socket()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        let mut client = Self { stream: BufReader::new(stream) };
        let greeting = client.line();
        (client, greeting)
    }

    /// Connect and negotiate.
    pub fn new(server: &Running) -> Self {
        let (mut client, _) = Self::greeted(server);
        assert_eq!(client.ask(r#"{"execute":"qmp_capabilities"}"#), json!({"return": {}}));
        client
    }

    pub fn stream(&mut self) -> &mut UnixStream {
        self.stream.get_mut()
    }

    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.get_mut().write_all(bytes.as_ref()).unwrap();
    }

    /// The next line.
    pub fn line(&mut self) -> Value {
        let mut line = String::new();
        self.stream.read_line(&mut line).unwrap();
        assert!(line.ends_with("\r\n"), "{line:?}");
        serde_json::from_str(&line).unwrap()
    }

    /// Send and take the next line.
    pub fn ask(&mut self, bytes: impl AsRef<[u8]>) -> Value {
        self.send(bytes);
        self.line()
    }

    /// Send what is refused and take QEMU's text for it.
    pub fn refusal(&mut self, bytes: impl AsRef<[u8]>) -> String {
        let answer = self.ask(bytes);
        answer["error"]["desc"].as_str().unwrap_or_else(|| panic!("{answer}")).to_owned()
    }

    /// Whether the session still works.
    pub fn assert_served(&mut self) {
        let answer = self.ask(r#"{"execute":"query-name","id":"still there"}"#);
        assert_eq!(answer, json!({"return": {"name": "scripted"}, "id": "still there"}));
    }

    /// Read up to the end of the connection.
    pub fn rest(&mut self) -> Vec<u8> {
        let mut rest = Vec::new();
        self.stream.read_to_end(&mut rest).unwrap();
        rest
    }
}
