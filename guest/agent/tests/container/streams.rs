// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Standard streams and terminals.

use std::time::Instant;

use ecr_agent_protocol::agent as msg;
use ecr_agent_protocol::oci;
use protobuf::MessageField;
use ttrpc::Code;

use crate::harness::{Agent, process, reason, soon};

#[tokio::test]
async fn input_to_its_end() {
    let Some(agent) = Agent::start().await else { return };
    agent.create("c1", agent.spec("c1", "exec md5sum")).await.unwrap();
    agent.start_container("c1").await.unwrap();
    let part = vec![b'x'; 256 << 10];
    for _ in 0..16 {
        agent.write("c1", "", &part).await;
    }
    agent.close_stdin("c1", "").await;
    let output = String::from_utf8(agent.stdout("c1", "").await).unwrap();
    assert_eq!(output, md5_outside());
    assert_eq!(agent.wait("c1", "").await, 0);
    let late = msg::WriteStreamRequest {
        container_id: "c1".into(),
        data: b"late".to_vec(),
        ..Default::default()
    };
    assert!(agent.client.agent.write_stdin(soon(), &late).await.is_err());
    agent.remove("c1").await.unwrap();
}

/// What is said of the same 4 MiB outside of a container.
fn md5_outside() -> String {
    let script = "head -c 4194304 /dev/zero | tr '\\0' x | md5sum";
    let output = std::process::Command::new("sh").args(["-c", script]).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

#[tokio::test]
async fn a_hundred_megabytes_of_output() {
    let Some(agent) = Agent::start().await else { return };
    let spec = agent.spec("c1", "exec head -c 104857600 /dev/zero");
    agent.create("c1", spec).await.unwrap();
    let before = Instant::now();
    agent.start_container("c1").await.unwrap();
    let output = agent.stdout("c1", "").await;
    println!("100 MiB in {:?}", before.elapsed());
    assert_eq!(output.len(), 100 << 20);
    assert!(output.iter().all(|&byte| byte == 0));
    agent.remove("c1").await.unwrap();
}

#[tokio::test]
async fn a_broken_pipe_is_felt() {
    let Some(agent) = Agent::start().await else { return };
    // Had SIGPIPE stayed ignored, "yes" would complain.
    let spec = agent.spec("c1", "yes 2>&1 | head -n 1");
    assert_eq!(agent.run("c1", spec).await, (0, "y\n".into(), String::new()));
}

#[tokio::test]
async fn terminals() {
    let Some(agent) = Agent::start().await else { return };
    let resize = |exec_id: &str| msg::TtyWinResizeRequest {
        container_id: "c1".into(),
        exec_id: exec_id.into(),
        row: 33,
        column: 99,
        ..Default::default()
    };
    let mut spec = agent.spec(
        "c1",
        "tty; stty size; read word; stty size; echo got $word; ls -l /dev/console; exit 6",
    );
    let process_ = spec.process.mut_or_insert_default();
    process_.terminal = true;
    process_.console_size =
        MessageField::some(oci::Box { height: 24, width: 80, ..Default::default() });
    agent.create("c1", spec).await.unwrap();
    agent.start_container("c1").await.unwrap();
    let request =
        msg::ReadStreamRequest { container_id: "c1".into(), len: 4096, ..Default::default() };
    let mut seen = String::new();
    while !seen.contains("24 80") {
        let data = agent.client.agent.read_stdout(soon(), &request).await.unwrap().data;
        seen += str::from_utf8(&data).unwrap();
    }
    assert!(seen.starts_with("/dev/pts/0\r\n"), "{seen}");
    agent.client.agent.tty_win_resize(soon(), &resize("")).await.unwrap();
    agent.write("c1", "", b"word\n").await;
    let rest = String::from_utf8(agent.stdout("c1", "").await).unwrap();
    assert!(rest.contains("33 99\r\ngot word\r\n"), "{rest}");
    assert_eq!(agent.stderr("c1", "").await, b"");
    assert_eq!(agent.wait("c1", "").await, 6);
    agent.remove("c1").await.unwrap();

    // And in a process beside the first, which has none.
    agent.sleeper("c1").await;
    let plain = agent.client.agent.tty_win_resize(soon(), &resize("")).await.map_err(reason);
    assert_eq!(plain.unwrap_err().0, Code::UNAVAILABLE);
    let mut exec = process(&["sh", "-c", "tty; test -t 0 && test -t 2 && cat"]);
    exec.terminal = true;
    agent.exec("c1", "e1", exec).await.unwrap();
    agent.client.agent.tty_win_resize(soon(), &resize("e1")).await.unwrap();
    agent.write("c1", "e1", b"line\n\x04").await;
    let output = String::from_utf8(agent.stdout("c1", "e1").await).unwrap();
    assert!(output.contains("/dev/pts/"), "{output}");
    // What was typed, and what cat made of it.
    assert_eq!(output.matches("line\r\n").count(), 2, "{output}");
    assert_eq!(agent.wait("c1", "e1").await, 0);
    agent.remove("c1").await.unwrap();
}
