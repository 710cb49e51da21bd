// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What hostile or broken clients can do: get errors and lose their connection, no more.

use std::fs;
use std::io::{ErrorKind, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use ecr_vmm::control::EventKind;
use serde_json::json;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::client::Client;
use crate::machine::Running;

#[test]
fn garbage_costs_errors_and_nothing_else() {
    let server = Running::new();
    let mut client = Client::new(&server);
    assert_eq!(client.refusal("{bad json}\n"), "JSON parse error, invalid keyword 'bad'");
    assert_eq!(client.refusal("[]"), "QMP input must be a JSON object");
    assert_eq!(client.refusal("\0"), "JSON parse error, stray '\0'");
    assert_eq!(client.refusal("}"), "JSON parse error, expecting value");
    client.assert_served();
}

#[test]
fn invalid_utf8_costs_one_error() {
    let server = Running::new();
    let mut client = Client::new(&server);
    assert_eq!(
        client.refusal(b"{\"execute\":\"query-\xc3(\"}"),
        "JSON parse error, invalid UTF-8 sequence in string"
    );
    client.assert_served();
}

#[test]
fn a_line_of_10_mib_costs_one_error() {
    let server = Running::new();
    let mut client = Client::new(&server);
    let mut line = br#"{"execute":""#.to_vec();
    line.resize(10 << 20, b'a');
    line.extend(b"\"}\n");
    assert_eq!(client.refusal(line), "JSON token size limit exceeded");
    client.assert_served();
}

#[test]
fn deep_nesting_costs_one_error() {
    let server = Running::new();
    let mut client = Client::new(&server);
    let line = ["[".repeat(1 << 20), "\n".into()].concat();
    assert_eq!(client.refusal(line), "JSON nesting depth limit exceeded");
    client.assert_served();
}

#[test]
fn half_a_command_and_silence_hold_nobody_up() {
    let server = Running::new();
    let mut silent = Client::new(&server);
    silent.send(r#"{"execute":"query"#);
    let mut other = Client::new(&server);
    other.assert_served();
    silent.send(r#"-name"}"#);
    assert_eq!(silent.line(), json!({"return": {"name": "scripted"}}));
}

#[test]
fn unknown_and_wrong_things_are_named_as_qemu_names_them() {
    let server = Running::new();
    let mut client = Client::new(&server);
    for (request, text) in [
        (r#"{"execute":"nope"}"#, "The command nope has not been found"),
        (r#"{"execute":"stop","arguments":{"a":1}}"#, "Parameter 'a' is unexpected"),
        (r#"{"execute":"stop","arguments":7}"#, "QMP input member 'arguments' must be an object"),
        (r#"{"execute":["stop"]}"#, "QMP input member 'execute' must be a string"),
        (r#"{"exec-oob":"stop"}"#, "QMP input member 'exec-oob' is unexpected"),
    ] {
        assert_eq!(client.refusal(request), text);
    }
    client.assert_served();
}

#[test]
fn a_thousand_commands_at_once_are_answered_in_order() {
    let server = Running::new();
    let mut client = Client::new(&server);
    // Written from another thread: the server stops reading while its answers are not read.
    let mut writer = client.stream().try_clone().unwrap();
    let sender = std::thread::spawn(move || {
        let commands: String = (0..1000)
            .map(|id| json!({"execute": "query-qmp-schema", "id": id}).to_string())
            .collect();
        writer.write_all(commands.as_bytes()).unwrap();
    });
    for id in 0..1000 {
        assert_eq!(client.line()["id"], id);
    }
    sender.join().unwrap();
    client.assert_served();
}

#[test]
fn a_client_that_goes_in_the_middle_of_a_reply_leaves_nothing() {
    let server = Running::new();
    for _ in 0..50 {
        let mut client = Client::new(&server);
        client.send(r#"{"execute":"query-qmp-schema"}"#.repeat(100));
    }
    Client::new(&server).assert_served();
}

#[test]
fn a_client_that_never_reads_is_not_read_from() {
    let server = Running::new();
    let mut client = Client::new(&server);
    client.stream().set_nonblocking(true).unwrap();
    let commands = r#"{"execute":"query-qmp-schema"}"#.repeat(1000);
    let mut sent = 0;
    let deadline = Instant::now() + Duration::from_secs(30);
    // What both socket buffers and the server take is bounded; nothing of that moves any more.
    let mut refused = 0;
    while refused < 20 {
        assert!(sent < 64 << 20 && Instant::now() < deadline, "{sent} bytes were taken");
        match client.stream().write(commands.as_bytes()) {
            Ok(length) => sent += length,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                refused += 1;
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(error) => panic!("{error}"),
        }
    }
    Client::new(&server).assert_served();
}

#[test]
fn a_client_that_lets_events_pile_up_is_given_up() {
    let server = Running::new();
    let mut lazy = Client::new(&server);
    for _ in 0..100_000 {
        server.happen(EventKind::Stop);
    }
    let mut other = Client::new(&server);
    other.assert_served();
    let taken = lazy.rest().len();
    assert!(taken < 100_000 * 75, "all {taken} bytes of events were kept for it");
}

#[test]
fn clients_beyond_the_limit_are_turned_away_and_others_served() {
    let server = Running::new();
    let mut clients: Vec<Client> = (0..16).map(|_| Client::new(&server)).collect();
    let turned_away = UnixStream::connect(server.socket()).unwrap();
    turned_away.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    assert_eq!(std::io::Read::read(&mut &turned_away, &mut [0]).unwrap(), 0);
    clients.iter_mut().for_each(Client::assert_served);
    drop(clients);
    Client::new(&server).assert_served();
}

#[test]
fn descriptors_that_nobody_asked_for_are_closed() {
    let server = Running::new();
    let mut client = Client::new(&server);
    let (given, kept) = UnixStream::pair().unwrap();
    kept.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let command: &[u8] = br#"{"execute":"query-name"}"#;
    client.stream().send_with_fds(&[command], &[given.as_raw_fd(); 16]).unwrap();
    assert_eq!(client.line(), json!({"return": {"name": "scripted"}}));
    drop(given);
    // The other end sees the end only when nobody has this one any more.
    assert_eq!(std::io::Read::read(&mut &kept, &mut [0]).unwrap(), 0);
}

#[test]
fn the_socket_goes_with_the_server() {
    let server = Running::new();
    let socket = server.socket().to_owned();
    let _client = Client::new(&server);
    drop(server);
    assert!(!fs::exists(socket).unwrap());
}
