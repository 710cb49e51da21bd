// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What a real QEMU (10.0.2, and 7.2 where the name says so) was asked and answered, asked again of our server. Refusals must read the same;
//! replies must have members that QEMU's have, of the same types.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::client::Client;
use crate::machine::Running;

/// Members that QEMU has and leaves out of these transcripts.
const OPTIONAL: &[&str] = &["name", "is-default", "irq", "subsystem", "mem_type_64", "prefetch"];

fn transcripts() -> Vec<(String, Value)> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/qmp/transcripts");
    let mut all: Vec<(String, Value)> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| {
            let name = path.file_stem().unwrap().to_string_lossy().into_owned();
            (name, serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap())
        })
        .collect();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    all
}

/// Everything in `ours` has the type that it has in `theirs`.
fn compare(at: &str, ours: &Value, theirs: &Value) {
    match (ours, theirs) {
        (Value::Object(ours), Value::Object(theirs)) => {
            for (name, value) in ours {
                let at = format!("{at}.{name}");
                match theirs.get(name) {
                    Some(theirs) => compare(&at, value, theirs),
                    None => assert!(OPTIONAL.contains(&name.as_str()), "QEMU has no {at}"),
                }
            }
        }
        (Value::Array(ours), Value::Array(theirs)) => {
            if let Some(theirs) = theirs.first() {
                ours.iter().for_each(|ours| compare(at, ours, theirs));
            }
        }
        _ => assert_eq!(
            std::mem::discriminant(ours),
            std::mem::discriminant(theirs),
            "{at}: {ours} instead of {theirs}"
        ),
    }
}

#[test]
fn qemus_clients_see_what_they_know() {
    let server = Running::new();
    let (mut client, greeting) = Client::greeted(&server);
    let mut replayed = 0;
    for (name, transcript) in transcripts() {
        let Some(request) = transcript.get("request") else {
            compare(&name, &greeting, &transcript);
            continue;
        };
        let request = request.as_str().map_or_else(|| request.to_string(), str::to_owned);
        client.send(request);
        let mut answer = client.line();
        while answer.get("event").is_some() {
            answer = client.line();
        }
        let theirs = &transcript["reply"];
        assert_eq!(answer.get("id"), theirs.get("id"), "{name}");
        assert_eq!(answer.get("error"), theirs.get("error"), "{name}");
        compare(&name, &answer, theirs);
        replayed += 1;
    }
    assert!(replayed > 20, "only {replayed} transcripts were found");
}
