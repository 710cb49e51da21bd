// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The client against a multiplexer played by the test.

#![allow(clippy::unwrap_used)] // Helpers too: a failed step is a failed test.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread::{self, JoinHandle};

use ecr_agent_protocol::client::{AgentClient, ConnectError, connect_multiplexed};
use ecr_agent_protocol::health::CheckRequest;
use tokio::io::AsyncReadExt;

/// Accept one connection in the background, read its first line, and hand both to `serve`.
fn multiplexer(
    serve: impl FnOnce(String, BufReader<UnixStream>) + Send + 'static,
) -> (tempfile::TempDir, std::path::PathBuf, JoinHandle<()>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vsock.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let server = thread::spawn(move || {
        let mut stream = BufReader::new(listener.accept().unwrap().0);
        let mut line = String::new();
        stream.read_line(&mut line).unwrap();
        serve(line, stream);
    });
    (dir, path, server)
}

#[tokio::test(flavor = "current_thread")]
async fn bytes_behind_the_greeting_belong_to_the_guest() {
    let (_dir, path, server) = multiplexer(|line, mut stream| {
        assert_eq!(line, "CONNECT 1024\n");
        stream.get_mut().write_all(b"OK 1073741824\nfrom the guest").unwrap();
    });
    let mut stream = connect_multiplexed(&path, 1024).await.unwrap();
    let mut rest = String::new();
    stream.read_to_string(&mut rest).await.unwrap();
    assert_eq!(rest, "from the guest");
    server.join().unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn a_closed_port_is_refused() {
    let (_dir, path, server) = multiplexer(|_, _| ());
    let error = connect_multiplexed(&path, 1024).await.unwrap_err();
    assert!(matches!(&error, ConnectError::Refused { answer, .. } if answer.is_empty()), "{error}");
    server.join().unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn an_endless_greeting_is_cut_off() {
    let (_dir, path, server) = multiplexer(|_, mut stream| {
        // The client hangs up long before this is through.
        while stream.get_mut().write_all(&[b'O'; 4096]).is_ok() {}
    });
    let error = connect_multiplexed(&path, 1024).await.unwrap_err();
    assert!(
        matches!(&error, ConnectError::Refused { answer, .. } if answer.len() == 64),
        "{error}"
    );
    server.join().unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn no_socket_is_an_io_error() {
    let dir = tempfile::tempdir().unwrap();
    let error = AgentClient::connect(&dir.path().join("none"), 1024).await.unwrap_err();
    assert!(matches!(error, ConnectError::Io { port: 1024, .. }), "{error}");
}

/// One health check, with the request frame checked byte by byte and the response written by hand.
#[tokio::test(flavor = "current_thread")]
async fn a_health_check_on_the_wire() {
    const REQUEST: &[u8] = b"\x0a\x0bgrpc.Health\x12\x05Check";
    let (_dir, path, server) = multiplexer(|_, mut stream| {
        stream.get_mut().write_all(b"OK 7\n").unwrap();
        // Length, stream 1, request, no flags.
        let mut frame = vec![0; 10];
        stream.read_exact(&mut frame).unwrap();
        assert_eq!(frame[4..], [0, 0, 0, 1, 1, 0]);
        let mut payload = vec![0; u32::from_be_bytes(frame[..4].try_into().unwrap()) as usize];
        stream.read_exact(&mut payload).unwrap();
        assert_eq!(&payload[..REQUEST.len()], REQUEST);
        // Status left out (OK); payload: status SERVING.
        stream.get_mut().write_all(&[0, 0, 0, 4, 0, 0, 0, 1, 2, 0, 0x12, 2, 0x08, 1]).unwrap();
    });
    let client = AgentClient::connect(&path, 1024).await.unwrap();
    let reply =
        client.health.check(ttrpc::context::with_timeout(0), &CheckRequest::new()).await.unwrap();
    assert_eq!(reply.status.value(), 1);
    server.join().unwrap();
}
