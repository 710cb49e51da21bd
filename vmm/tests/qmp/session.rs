// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What orderly clients see.

use std::net::Shutdown;

use ecr_vmm::control::{EventKind, ShutdownReason};
use serde_json::json;

use crate::client::Client;
use crate::machine::Running;

#[test]
fn nothing_is_answered_before_the_negotiation() {
    let server = Running::new();
    let (mut client, greeting) = Client::greeted(&server);
    assert_eq!(greeting["QMP"]["version"]["qemu"]["major"], 10);
    let expecting = "Expecting capabilities negotiation with 'qmp_capabilities'";
    for command in ["query-status", "no-such-command"] {
        let answer = client.ask(json!({"execute": command, "id": 1}).to_string());
        assert_eq!(
            answer,
            json!({"id": 1, "error": {"class": "CommandNotFound", "desc": expecting}})
        );
    }
    let enable = |what: &str| {
        json!({"execute": "qmp_capabilities", "arguments": {"enable": [what]}}).to_string()
    };
    assert_eq!(client.refusal(enable("oob")), "Capability oob not available");
    assert_eq!(client.refusal(enable("x")), "Parameter 'enable[0]' does not accept value 'x'");
    assert_eq!(client.ask(r#"{"execute":"qmp_capabilities"}"#), json!({"return": {}}));
    assert_eq!(
        client.refusal(r#"{"execute":"qmp_capabilities"}"#),
        "Capabilities negotiation is already complete, command ignored"
    );
    client.assert_served();
}

#[test]
fn an_id_of_any_type_comes_back() {
    let server = Running::new();
    let mut client = Client::new(&server);
    for id in [json!("x"), json!(7), json!(2.5), json!(null), json!({"a": [1, {}]}), json!([])] {
        let answer = client.ask(json!({"execute": "stop", "id": id}).to_string());
        assert_eq!(answer, json!({"return": {}, "id": id}));
    }
}

#[test]
fn an_event_comes_before_the_reply_of_the_command_that_caused_it() {
    let server = Running::new();
    let mut client = Client::new(&server);
    client.send(r#"{"execute":"cont"}{"execute":"stop"} {"execute":"query-status"}"#);
    let event = client.line();
    assert_eq!(event["event"], "RESUME");
    assert!(event["timestamp"]["seconds"].as_u64().unwrap() > 1_700_000_000);
    assert!(event["timestamp"]["microseconds"].as_u64().unwrap() < 1_000_000);
    assert_eq!(client.line(), json!({"return": {}}));
    assert_eq!(client.line()["event"], "STOP");
    assert_eq!(client.line(), json!({"return": {}}));
    assert_eq!(client.line(), json!({"return": {"status": "paused", "running": false}}));
}

#[test]
fn every_client_that_has_negotiated_hears_of_events() {
    let server = Running::new();
    let mut first = Client::new(&server);
    let mut second = Client::new(&server);
    let (mut silent, _) = Client::greeted(&server);
    assert_eq!(first.ask(r#"{"execute":"cont"}"#)["event"], "RESUME");
    assert_eq!(second.line()["event"], "RESUME");
    server.happen(EventKind::GuestPanicked);
    server.happen(EventKind::Shutdown(ShutdownReason::GuestPanic));
    assert_eq!(second.line()["data"], json!({"action": "pause"}));
    assert_eq!(second.line()["data"], json!({"guest": true, "reason": "guest-panic"}));
    // It hears nothing but its own reply.
    assert_eq!(silent.ask(r#"{"execute":"qmp_capabilities"}"#), json!({"return": {}}));
}

#[test]
fn clients_come_and_go() {
    let server = Running::new();
    for _ in 0..100 {
        Client::new(&server).assert_served();
    }
}

#[test]
fn a_refusal_of_the_machine_is_a_generic_error() {
    let server = Running::new();
    let mut client = Client::new(&server);
    assert_eq!(
        client.ask(r#"{"execute":"system_powerdown"}"#),
        json!({"error": {"class": "GenericError", "desc": "nobody hears the button"}})
    );
}

#[test]
fn a_client_that_sends_no_more_still_gets_its_replies() {
    let server = Running::new();
    let mut client = Client::new(&server);
    client.send(r#"{"execute":"query-name"}"#.repeat(3));
    client.stream().shutdown(Shutdown::Write).unwrap();
    for _ in 0..3 {
        assert_eq!(client.line(), json!({"return": {"name": "scripted"}}));
    }
    assert_eq!(client.rest(), b"");
}

#[test]
fn quit_is_answered_before_the_end() {
    let server = Running::new();
    let socket = server.socket().to_owned();
    let mut client = Client::new(&server);
    let event = client.ask(r#"{"execute":"quit"}"#);
    assert_eq!(event["data"], json!({"guest": false, "reason": "host-qmp-quit"}));
    assert_eq!(client.line(), json!({"return": {}}));
    assert_eq!(client.rest(), b"");
    server.wait();
    assert!(!socket.exists());
}
