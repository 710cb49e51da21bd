// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The streams of processes, through FIFOs, files and logging programs.

#![allow(clippy::unwrap_used)]

mod fake;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use containerd_shim_protos::api;
use fake::harness::{Shim, delete, exec, limit, reader, start, until, wait};
use serde_json::json;
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;

fn text(path: &Path) -> String {
    path.to_str().unwrap().into()
}

async fn read_all(mut from: pipe::Receiver) -> Vec<u8> {
    let mut all = Vec::new();
    from.read_to_end(&mut all).await.unwrap();
    all
}

fn close_stdin(id: &str, exec: &str) -> api::CloseIORequest {
    api::CloseIORequest { id: id.into(), exec_id: exec.into(), stdin: true, ..Default::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn output_arrives_whole_before_the_exit() {
    let shim = Shim::new().await;
    let client = shim.client().await;
    let (out, err) = (shim.fifo("out"), shim.fifo("err"));
    let (from_out, from_err) = (reader(&out), reader(&err));
    let call = api::CreateTaskRequest {
        stdout: text(&out),
        stderr: text(&err),
        ..shim.create("s1", "echo to-out; echo to-err >&2; exit 3", json!({}))
    };
    shim.run(&client, call).await;
    assert_eq!(client.wait(limit(), &wait("s1", "")).await.unwrap().exit_status, 3);
    // The shim has closed its ends.
    assert_eq!(read_all(from_out).await, b"to-out\n");
    assert_eq!(read_all(from_err).await, b"to-err\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn much_goes_through_both_ways_unchanged() {
    const SIZE: usize = 32 << 20;
    let shim = Shim::new().await;
    let client = shim.client().await;
    let (stdin, out) = (shim.fifo("in"), shim.fifo("out"));
    let from_out = reader(&out);
    let call = api::CreateTaskRequest {
        stdin: text(&stdin),
        stdout: text(&out),
        ..shim.create("s1", "cat", json!({}))
    };
    shim.run(&client, call).await;
    let data: Vec<u8> = (0..SIZE).map(|i| (i * 7 + i / 251) as u8).collect();
    let sum = Sha256::digest(&data);
    let writer = async {
        let mut end = pipe::OpenOptions::new().open_sender(&stdin).unwrap();
        end.write_all(&data).await.unwrap();
        // As ctr does: first the call, then its end of the FIFO is closed.
        client.close_io(limit(), &close_stdin("s1", "")).await.unwrap();
    };
    let ((), got) = tokio::join!(writer, read_all(from_out));
    assert_eq!(got.len(), SIZE);
    assert_eq!(Sha256::digest(&got), sum);
    assert_eq!(client.wait(limit(), &wait("s1", "")).await.unwrap().exit_status, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn writers_and_readers_may_come_and_go() {
    let shim = Shim::new().await;
    let client = shim.client().await;
    let (stdin, out) = (shim.fifo("in"), shim.fifo("out"));
    let call = api::CreateTaskRequest {
        stdin: text(&stdin),
        stdout: text(&out),
        ..shim.create("s1", "cat", json!({}))
    };
    shim.run(&client, call).await;
    // As when containerd restarts: it has just gone, and comes back.
    drop(shim.connect().await);
    tokio::time::sleep(Duration::from_millis(100)).await;
    for line in ["one\n", "two\n"] {
        let mut end = pipe::OpenOptions::new().open_sender(&stdin).unwrap();
        let mut from_out = reader(&out);
        end.write_all(line.as_bytes()).await.unwrap();
        let mut got = vec![0; line.len()];
        from_out.read_exact(&mut got).await.unwrap();
        assert_eq!(got, line.as_bytes());
    }
    client.close_io(limit(), &close_stdin("s1", "")).await.unwrap();
    client.wait(limit(), &wait("s1", "")).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn input_ends_with_its_last_writer_while_containerd_is_there() {
    let shim = Shim::new().await;
    let client = shim.client().await;
    let (stdin, out) = (shim.fifo("in"), shim.fifo("out"));
    let from_out = reader(&out);
    let call = api::CreateTaskRequest {
        stdin: text(&stdin),
        stdout: text(&out),
        ..shim.create("s1", "cat", json!({}))
    };
    shim.run(&client, call).await;
    let mut end = pipe::OpenOptions::new().open_sender(&stdin).unwrap();
    end.write_all(b"all there is").await.unwrap();
    drop(end);
    assert_eq!(client.wait(limit(), &wait("s1", "")).await.unwrap().exit_status, 0);
    assert_eq!(read_all(from_out).await, b"all there is");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_without_streams_neither_waits_nor_hangs() {
    let shim = Shim::new().await;
    let client = shim.client().await;
    // Its input is at its end, and a lot of output goes nowhere.
    let script = "cat; head -c 1000000 /dev/zero; exit 5";
    shim.run(&client, shim.create("s1", script, json!({}))).await;
    assert_eq!(client.wait(limit(), &wait("s1", "")).await.unwrap().exit_status, 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn input_closed_before_the_start_is_closed_after_it() {
    let shim = Shim::new().await;
    let client = shim.client().await;
    let stdin = shim.fifo("in");
    let call =
        api::CreateTaskRequest { stdin: text(&stdin), ..shim.create("s1", "cat", json!({})) };
    client.create(limit(), &call).await.unwrap();
    client.close_io(limit(), &close_stdin("s1", "")).await.unwrap();
    client.start(limit(), &start("s1", "")).await.unwrap();
    assert_eq!(client.wait(limit(), &wait("s1", "")).await.unwrap().exit_status, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminal_is_one_stream_and_has_a_size() {
    let shim = Shim::new().await;
    let client = shim.client().await;
    let (stdin, out) = (shim.fifo("in"), shim.fifo("out"));
    let mut from_out = reader(&out);
    let mut call = api::CreateTaskRequest {
        terminal: true,
        stdin: text(&stdin),
        stdout: text(&out),
        ..shim.create("s1", "", json!({}))
    };
    // The specification says so, too.
    let path = Path::new(&call.bundle).join("config.json");
    let script = "sleep 0.3; stty size; echo to-err >&2; read line; stty size; exit 6";
    let mut spec: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    spec["process"]["terminal"] = true.into();
    spec["process"]["args"][2] = script.into();
    fs::write(&path, spec.to_string()).unwrap();
    call.terminal = true;
    client.create(limit(), &call).await.unwrap();
    let size = |height, width| api::ResizePtyRequest {
        id: "s1".into(),
        height,
        width,
        ..Default::default()
    };
    client.resize_pty(limit(), &size(33, 77)).await.unwrap();
    client.start(limit(), &start("s1", "")).await.unwrap();
    let mut seen = String::new();
    while !seen.contains("to-err") {
        let mut part = [0; 256];
        let read = from_out.read(&mut part).await.unwrap();
        seen.push_str(std::str::from_utf8(&part[..read]).unwrap());
    }
    assert!(seen.contains("33 77"), "{seen}");
    client.resize_pty(limit(), &size(20, 50)).await.unwrap();
    let mut end = pipe::OpenOptions::new().open_sender(&stdin).unwrap();
    end.write_all(b"go\n").await.unwrap();
    assert_eq!(client.wait(limit(), &wait("s1", "")).await.unwrap().exit_status, 6);
    let rest = String::from_utf8(read_all(from_out).await).unwrap();
    assert!(rest.contains("20 50"), "{rest}");
    let plain = api::ResizePtyRequest { exec_id: "x".into(), ..size(1, 1) };
    assert!(client.resize_pty(limit(), &plain).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn who_holds_a_stream_in_the_background_does_not_keep_the_exec() {
    let shim = Shim::new().await;
    let client = shim.client().await;
    shim.run(&client, shim.create("s1", "sleep 100", json!({}))).await;
    let out = shim.fifo("out");
    let mut from_out = reader(&out);
    let script = "echo started; (sleep 12; echo late) & exit 2";
    let call = api::ExecProcessRequest { stdout: text(&out), ..exec("s1", "x1", script) };
    client.exec(limit(), &call).await.unwrap();
    let began = Instant::now();
    client.start(limit(), &start("s1", "x1")).await.unwrap();
    assert_eq!(client.wait(limit(), &wait("s1", "x1")).await.unwrap().exit_status, 2);
    assert!(began.elapsed() < Duration::from_secs(11), "{:?}", began.elapsed());
    // What it writes still arrives, as long as the exec is known.
    let mut got = vec![0; 13];
    from_out.read_exact(&mut got).await.unwrap();
    assert_eq!(got, b"started\nlate\n");
    client.delete(limit(), &delete("s1", "x1")).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn output_that_nobody_reads_does_not_keep_the_container() {
    let shim = Shim::new().await;
    let client = shim.client().await;
    let out = shim.fifo("out");
    let call = api::CreateTaskRequest {
        stdout: text(&out),
        ..shim.create("s1", "head -c 600000 /dev/zero; exit 8", json!({}))
    };
    shim.run(&client, call).await;
    let killed = api::KillRequest { id: "s1".into(), signal: 9, ..Default::default() };
    tokio::time::sleep(Duration::from_millis(500)).await;
    client.kill(limit(), &killed).await.unwrap();
    client.wait(limit(), &wait("s1", "")).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn files_and_programs_take_output() {
    let shim = Shim::new().await;
    let client = shim.client().await;
    let file = shim.dir.path().join("log/out");
    let call = api::CreateTaskRequest {
        stdout: format!("file://{}", file.display()),
        ..shim.create("s1", "echo to-file; sleep 100", json!({}))
    };
    shim.run(&client, call).await;
    until(|| fs::read(&file).is_ok_and(|text| text == b"to-file\n")).await;

    let program = shim.dir.path().join("logger");
    let log = shim.dir.path().join("program.log");
    let script = "#!/bin/sh\nexec 5>&-\n\
                  { echo \"$CONTAINER_ID $CONTAINER_NAMESPACE $2\"; cat <&3; cat <&4; echo end; } >\"$1\"\n";
    fs::write(&program, script).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let uri = format!("binary://{}?{}&key", program.display(), log.display());
    let call = api::ExecProcessRequest {
        stdout: uri.clone(),
        stderr: uri,
        ..exec("s1", "x1", "echo out; echo err >&2")
    };
    client.exec(limit(), &call).await.unwrap();
    client.start(limit(), &start("s1", "x1")).await.unwrap();
    client.wait(limit(), &wait("s1", "x1")).await.unwrap();
    until(|| fs::read(&log).is_ok_and(|text| text == b"s1 test key\nout\nerr\nend\n")).await;

    let call = api::ExecProcessRequest {
        stdout: "binary:///no/such/program".into(),
        ..exec("s1", "x2", "true")
    };
    client.exec(limit(), &call).await.unwrap();
    let refused = client.start(limit(), &start("s1", "x2")).await.unwrap_err();
    assert!(refused.to_string().contains("/no/such/program"), "{refused}");
}
