// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What a client of the host says before it is connected: `CONNECT <port>\n`.

use std::io;
use std::os::unix::net::UnixStream;

use crate::backend::stream;

/// Longest line, with its end. The longest right one has 19 bytes.
const MAX_LINE: usize = 32;

/// A client that has not said where it wants to go.
#[derive(Debug)]
pub struct Handshake {
    stream: UnixStream,
    line: Vec<u8>,
}

/// How far a handshake has come.
#[derive(Debug)]
pub enum Progress {
    /// The line is not complete.
    Waiting,
    /// The client wants to this port of the guest.
    Connect(u32),
    /// The client has left or said something else.
    Failed(io::Error),
}

impl Handshake {
    /// A new client.
    pub fn new(stream: UnixStream) -> Self {
        Self { stream, line: Vec::with_capacity(MAX_LINE) }
    }

    /// Read on. Byte by byte, because what follows the line is for the guest.
    pub fn advance(&mut self) -> Progress {
        while self.line.len() < MAX_LINE {
            let mut byte = [0];
            match stream::receive(&self.stream, &mut byte) {
                Ok(0) => return Progress::Failed(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) if byte == *b"\n" => break,
                Ok(_) => self.line.extend(byte),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Progress::Waiting;
                }
                Err(error) => return Progress::Failed(error),
            }
        }
        match parse(&self.line) {
            Some(port) => Progress::Connect(port),
            None => Progress::Failed(io::Error::other(format!(
                "{:?} is not CONNECT <port>",
                self.line.escape_ascii().to_string()
            ))),
        }
    }

    /// The client, with everything after the line still unread.
    pub fn into_stream(self) -> UnixStream {
        self.stream
    }
}

fn parse(line: &[u8]) -> Option<u32> {
    let port = str::from_utf8(line).ok()?.strip_prefix("CONNECT ")?.trim_end_matches('\r');
    port.bytes().all(|byte| byte.is_ascii_digit()).then(|| port.parse().ok())?
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn a_line_may_come_in_pieces_and_what_follows_stays() {
        let (mut client, server) = UnixStream::pair().unwrap();
        let mut handshake = Handshake::new(server);
        assert!(matches!(handshake.advance(), Progress::Waiting));
        client.write_all(b"CONN").unwrap();
        assert!(matches!(handshake.advance(), Progress::Waiting));
        client.write_all(b"ECT 1024\nhello").unwrap();
        assert!(matches!(handshake.advance(), Progress::Connect(1024)));
        let mut rest = [0; 5];
        handshake.into_stream().read_exact(&mut rest).unwrap();
        assert_eq!(&rest, b"hello");
    }

    #[test]
    fn refuses_anything_else() {
        let long = [b'1'; 100];
        let lines: [&[u8]; 8] = [
            b"\n",
            b"GET / HTTP/1.1\n",
            b"CONNECT\n",
            b"CONNECT 4294967296\n",
            b"CONNECT -1\n",
            b"CONNECT +1\n",
            b"CONNECT \xff\n",
            &long,
        ];
        for line in lines {
            let (mut client, server) = UnixStream::pair().unwrap();
            client.write_all(line).unwrap();
            let progress = Handshake::new(server).advance();
            assert!(matches!(progress, Progress::Failed(_)), "{progress:?}");
        }
        let (_, server) = UnixStream::pair().unwrap();
        assert!(matches!(Handshake::new(server).advance(), Progress::Failed(_)));
    }
}
