// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The task API over a real connection, with a fake sandbox below it: the life of containers and execs.

#![allow(clippy::unwrap_used)]

mod fake;

use std::time::{Duration, Instant};

use containerd_shim_protos::api::{self, Status};
use containerd_shim_protos::events::task::TaskExit;
use fake::harness::{LIMIT, Shim, delete, exec, kill, limit, refusal, start, state, until, wait};
use protobuf::Message;
use protobuf::well_known_types::any::Any;
use serde_json::json;
use tokio::time::timeout;
use ttrpc::{Code, context};

#[tokio::test(flavor = "multi_thread")]
async fn a_container_from_create_to_shutdown() {
    let shim = Shim::new().await;
    let client = shim.client().await;
    let created = client.create(limit(), &shim.create("s1", "exit 7", json!({}))).await.unwrap();
    assert_eq!(created.pid, std::process::id());
    let before = client.state(limit(), &state("s1", "")).await.unwrap();
    assert_eq!(before.status(), Status::CREATED);
    client.start(limit(), &start("s1", "")).await.unwrap();
    let waited = client.wait(limit(), &wait("s1", "")).await.unwrap();
    assert_eq!(waited.exit_status, 7);
    let after = client.state(limit(), &state("s1", "")).await.unwrap();
    assert_eq!((after.status(), after.exit_status), (Status::STOPPED, 7));
    assert_eq!(after.exited_at, waited.exited_at);
    let deleted = client.delete(limit(), &delete("s1", "")).await.unwrap();
    assert_eq!((deleted.exit_status, deleted.pid), (7, created.pid));
    client.shutdown(limit(), &api::ShutdownRequest::new()).await.unwrap();
    timeout(LIMIT, shim.pod.finished()).await.unwrap();
    shim.until_topic("/tasks/delete", 1).await;
    assert_eq!(shim.topics(), ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"]);
    let exit = TaskExit::parse_from_bytes(&shim.received.lock()[2].1.value).unwrap();
    assert_eq!((exit.container_id.as_str(), exit.id.as_str(), exit.exit_status), ("s1", "s1", 7));
    assert!(shim.launcher.noted("stop"));
    shim.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn both_versions_of_the_api_are_served() {
    let shim = Shim::new().await;
    let client = shim.connect().await;
    for version in ["v2", "v3"] {
        let request = ttrpc::Request {
            service: format!("containerd.task.{version}.Task"),
            method: "Connect".into(),
            payload: api::ConnectRequest { id: "s1".into(), ..Default::default() }
                .write_to_bytes()
                .unwrap(),
            ..Default::default()
        };
        let response = client.request(request).await.unwrap();
        let connected = api::ConnectResponse::parse_from_bytes(&response.payload).unwrap();
        assert_eq!(connected.shim_pid, std::process::id());
        assert_eq!(connected.task_pid, 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_there_is_not_found() {
    let shim = Shim::new().await;
    let client = shim.client().await;
    let id = || "none".to_owned();
    let not_found = |refused: (Code, String)| {
        assert_eq!(refused.0, Code::NOT_FOUND);
        assert!(refused.1.contains("container none not found"), "{}", refused.1);
    };
    not_found(refusal(client.state(limit(), &state("none", "")).await));
    not_found(refusal(client.start(limit(), &start("none", "")).await));
    not_found(refusal(client.delete(limit(), &delete("none", "")).await));
    not_found(refusal(client.wait(limit(), &wait("none", "x")).await));
    not_found(refusal(client.kill(limit(), &kill("none", "", 9)).await));
    not_found(refusal(client.exec(limit(), &exec("none", "x", "true")).await));
    let call = api::PidsRequest { id: id(), ..Default::default() };
    not_found(refusal(client.pids(limit(), &call).await));
    let call = api::PauseRequest { id: id(), ..Default::default() };
    not_found(refusal(client.pause(limit(), &call).await));
    let call = api::ResumeRequest { id: id(), ..Default::default() };
    not_found(refusal(client.resume(limit(), &call).await));
    let call = api::StatsRequest { id: id(), ..Default::default() };
    not_found(refusal(client.stats(limit(), &call).await));
    let call = api::UpdateTaskRequest { id: id(), ..Default::default() };
    not_found(refusal(client.update(limit(), &call).await));
    let call = api::CloseIORequest { id: id(), stdin: true, ..Default::default() };
    not_found(refusal(client.close_io(limit(), &call).await));
    let call = api::ResizePtyRequest { id: id(), ..Default::default() };
    not_found(refusal(client.resize_pty(limit(), &call).await));
    let call = api::CheckpointTaskRequest { id: id(), ..Default::default() };
    assert_eq!(refusal(client.checkpoint(limit(), &call).await).0, Code::UNIMPLEMENTED);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_happens_twice() {
    let shim = Shim::new().await;
    let client = shim.client().await;
    let call = shim.create("s1", "exit 0", json!({}));
    client.create(limit(), &call).await.unwrap();
    let refused = refusal(client.create(limit(), &call).await);
    assert_eq!(refused, (Code::ALREADY_EXISTS, "container s1 already exists".into()));
    let other = shim.create("other", "exit 0", json!({}));
    let refused = refusal(client.create(limit(), &other).await);
    assert!(refused.1.contains("cannot create another sandbox in sandbox: s1"), "{}", refused.1);

    client.start(limit(), &start("s1", "")).await.unwrap();
    let refused = refusal(client.start(limit(), &start("s1", "")).await);
    assert_eq!(refused.0, Code::FAILED_PRECONDITION);
    client.wait(limit(), &wait("s1", "")).await.unwrap();
    assert_eq!(refusal(client.start(limit(), &start("s1", "")).await).0, Code::FAILED_PRECONDITION);

    let refused = refusal(client.exec(limit(), &exec("s1", "x", "true")).await);
    assert_eq!(refused.0, Code::FAILED_PRECONDITION);
    assert!(refused.1.contains("container s1: it is stopped"), "{}", refused.1);

    client.delete(limit(), &delete("s1", "")).await.unwrap();
    assert_eq!(refusal(client.delete(limit(), &delete("s1", "")).await).0, Code::NOT_FOUND);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_makes_no_sense_is_refused_before_anything_is_launched() {
    let shim = Shim::new().await;
    let client = shim.client().await;
    let good = shim.create("s1", "true", json!({}));
    for id in ["", "x", "../s1", "a/b", "a b", "-a"] {
        let call = api::CreateTaskRequest { id: id.into(), ..good.clone() };
        let refused = refusal(client.create(limit(), &call).await);
        assert_eq!(refused.0, Code::INVALID_ARGUMENT, "{id}");
        assert!(refused.1.contains(&format!("{id:?} is not allowed")), "{}", refused.1);
    }
    let call = api::CreateTaskRequest { bundle: "relative".into(), ..good.clone() };
    assert_eq!(refusal(client.create(limit(), &call).await).0, Code::INVALID_ARGUMENT);
    let call = api::CreateTaskRequest { bundle: "/nowhere".into(), ..good.clone() };
    assert!(refusal(client.create(limit(), &call).await).1.contains("/nowhere/config.json"));
    let call = api::CreateTaskRequest { stdout: "/no/fifo".into(), ..good.clone() };
    assert!(refusal(client.create(limit(), &call).await).1.contains("/no/fifo"));
    let call = api::CreateTaskRequest { checkpoint: "/c".into(), ..good.clone() };
    assert_eq!(refusal(client.create(limit(), &call).await).0, Code::UNIMPLEMENTED);
    let member = json!({"io.kubernetes.cri.container-type": "container",
                        "io.kubernetes.cri.sandbox-id": "s1"});
    let refused = refusal(client.create(limit(), &shim.create("c1", "true", member)).await);
    assert!(refused.1.contains("BUG: Cannot start the container"), "{}", refused.1);
    let strange = json!({"io.kubernetes.cri.container-type": "what"});
    let refused = refusal(client.create(limit(), &shim.create("c1", "true", strange)).await);
    assert!(refused.1.contains("Unknown container type what"), "{}", refused.1);
    assert_eq!(shim.launcher.notes(), Vec::<String>::new());
    // Nothing of all this is in the way of a good one.
    client.create(limit(), &good).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn state_does_not_wait_for_a_slow_create() {
    let shim = Shim::new().await;
    let client = shim.client().await;
    shim.run(&client, shim.create("s1", "sleep 100", json!({}))).await;
    let slow = json!({"io.kubernetes.cri.container-type": "container",
                      "io.kubernetes.cri.sandbox-id": "s1", "fake/create-delay": "20000"});
    let call = shim.create("c1", "true", slow);
    let other = shim.client().await;
    let creating = tokio::spawn(async move { other.create(limit(), &call).await });
    until(|| shim.launcher.noted("create c1")).await;
    let asked = Instant::now();
    assert_eq!(client.state(limit(), &state("s1", "")).await.unwrap().status(), Status::RUNNING);
    let refused = refusal(client.state(limit(), &state("c1", "")).await);
    assert!(refused.1.contains("still being created"), "{}", refused.1);
    let again = shim.create("c1", "true", json!({}));
    assert_eq!(refusal(client.create(limit(), &again).await).0, Code::ALREADY_EXISTS);
    assert!(asked.elapsed() < Duration::from_secs(5));
    creating.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_create_that_takes_too_long_is_undone() {
    let shim = Shim::new().await;
    let client = shim.client().await;
    let slow = shim.create("s1", "true", json!({"fake/create-delay": "60000"}));
    let short = context::with_duration(Duration::from_millis(300));
    let refused = client.create(short, &slow).await;
    assert!(refused.is_err());
    until(|| shim.launcher.noted("stop")).await;
    // The name and the sandbox are free again.
    let good = shim.create("s1", "exit 3", json!({}));
    let mut created = client.create(limit(), &good).await;
    while created.is_err() {
        tokio::time::sleep(Duration::from_millis(10)).await;
        created = client.create(limit(), &good).await;
    }
    client.start(limit(), &start("s1", "")).await.unwrap();
    assert_eq!(client.wait(limit(), &wait("s1", "")).await.unwrap().exit_status, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_create_whose_caller_is_gone_is_undone() {
    let shim = Shim::new().await;
    let client = shim.client().await;
    shim.run(&client, shim.create("s1", "sleep 100", json!({}))).await;
    let slow = json!({"io.kubernetes.cri.container-type": "container",
                      "io.kubernetes.cri.sandbox-id": "s1", "fake/create-delay": "60000"});
    let call = shim.create("c1", "true", slow);
    let gone = shim.client().await;
    let creating = tokio::spawn(async move { gone.create(context::with_timeout(0), &call).await });
    until(|| shim.launcher.noted("create c1")).await;
    creating.abort();
    until(|| shim.launcher.noted("remove c1")).await;
    assert!(!shim.launcher.noted("stop"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_create_says_why_and_leaves_nothing() {
    let shim = Shim::new().await;
    let client = shim.client().await;
    let call = shim.create("s1", "true", json!({"fake/launch-error": "no kernel\nlast words"}));
    let refused = refusal(client.create(limit(), &call).await);
    assert_eq!(refused.1, "create container s1: no kernel\nlast words");
    let call = shim.create("s1", "true", json!({"fake/create-error": "no rootfs"}));
    let refused = refusal(client.create(limit(), &call).await);
    assert_eq!(refused.1, "create container s1: no rootfs");
    // It had been stopped before the answer came.
    assert_eq!(shim.launcher.notes().last().unwrap(), "stop");
    client.shutdown(limit(), &api::ShutdownRequest::new()).await.unwrap();
    timeout(LIMIT, shim.pod.finished()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_start_leaves_a_stopped_container() {
    let shim = Shim::new().await;
    let client = shim.client().await;
    let call = shim.create("s1", "true", json!({"fake/start-error": "no such program"}));
    client.create(limit(), &call).await.unwrap();
    let refused = refusal(client.start(limit(), &start("s1", "")).await);
    assert_eq!(refused.1, "start container s1: no such program");
    assert_eq!(client.wait(limit(), &wait("s1", "")).await.unwrap().exit_status, 255);
    client.delete(limit(), &delete("s1", "")).await.unwrap();
    assert!(shim.launcher.noted("stop"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_abandoned_start_is_killed() {
    let shim = Shim::new().await;
    let client = shim.client().await;
    let call = shim.create("s1", "true", json!({"fake/start-delay": "60000"}));
    client.create(limit(), &call).await.unwrap();
    let short = context::with_duration(Duration::from_millis(300));
    assert!(client.start(short, &start("s1", "")).await.is_err());
    assert_eq!(client.wait(limit(), &wait("s1", "")).await.unwrap().exit_status, 255);
    until(|| shim.launcher.noted("signal s1 \"\" 9 true")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn execs_come_and_go() {
    let shim = Shim::new().await;
    let client = shim.client().await;
    shim.run(&client, shim.create("s1", "sleep 100", json!({}))).await;
    client.exec(limit(), &exec("s1", "x1", "exit 9")).await.unwrap();
    let refused = refusal(client.exec(limit(), &exec("s1", "x1", "exit 9")).await);
    assert_eq!(refused.0, Code::ALREADY_EXISTS);
    let before = client.state(limit(), &state("s1", "x1")).await.unwrap();
    assert_eq!((before.id.as_str(), before.pid, before.status()), ("x1", 0, Status::CREATED));
    let refused = refusal(client.kill(limit(), &kill("s1", "x1", 9)).await);
    assert!(refused.1.contains("The exec process does not exist"), "{}", refused.1);

    client.start(limit(), &start("s1", "x1")).await.unwrap();
    assert_eq!(client.wait(limit(), &wait("s1", "x1")).await.unwrap().exit_status, 9);
    let refused = refusal(client.kill(limit(), &kill("s1", "x1", 9)).await);
    assert_eq!(refused, (Code::NOT_FOUND, "process already finished: not found".into()));
    assert_eq!(client.delete(limit(), &delete("s1", "x1")).await.unwrap().exit_status, 9);
    let refused = refusal(client.state(limit(), &state("s1", "x1")).await);
    assert_eq!(refused, (Code::NOT_FOUND, "exec x1 of container s1 not found".into()));

    let bad = api::ExecProcessRequest { spec: None.into(), ..exec("s1", "x2", "true") };
    assert_eq!(refusal(client.exec(limit(), &bad).await).0, Code::INVALID_ARGUMENT);
    assert_eq!(
        refusal(client.exec(limit(), &exec("s1", "a/b", "true")).await).0,
        Code::INVALID_ARGUMENT
    );
    shim.until_topic("/tasks/exit", 1).await;
    let told = shim.topics();
    assert_eq!(told[2..], ["/tasks/exec-added", "/tasks/exec-started", "/tasks/exit"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn signals_and_what_they_leave() {
    let shim = Shim::new().await;
    let client = shim.client().await;
    shim.run(&client, shim.create("s1", "sleep 100", json!({}))).await;
    client.kill(limit(), &kill("s1", "", 15)).await.unwrap();
    assert_eq!(client.wait(limit(), &wait("s1", "")).await.unwrap().exit_status, 143);
    for signal in [9, 15] {
        client.kill(limit(), &kill("s1", "", signal)).await.unwrap();
    }
    let refused = refusal(client.kill(limit(), &kill("s1", "", 1)).await);
    assert_eq!(refused, (Code::NOT_FOUND, "process already finished: not found".into()));
    assert!(shim.launcher.noted("signal s1 \"\" 15 false"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_that_never_ran_can_be_killed_and_deleted() {
    let shim = Shim::new().await;
    let client = shim.client().await;
    client.create(limit(), &shim.create("s1", "true", json!({}))).await.unwrap();
    client.kill(limit(), &kill("s1", "", 9)).await.unwrap();
    assert_eq!(client.wait(limit(), &wait("s1", "")).await.unwrap().exit_status, 137);
    client.delete(limit(), &delete("s1", "")).await.unwrap();
    assert!(shim.launcher.noted("stop"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_container_that_is_deleted_ends_first() {
    let shim = Shim::new().await;
    let client = shim.client().await;
    shim.run(&client, shim.create("s1", "sleep 100", json!({}))).await;
    client.exec(limit(), &exec("s1", "x1", "sleep 100")).await.unwrap();
    client.start(limit(), &start("s1", "x1")).await.unwrap();
    assert_eq!(client.delete(limit(), &delete("s1", "")).await.unwrap().exit_status, 137);
    shim.until_topic("/tasks/delete", 1).await;
    let told = shim.topics();
    assert_eq!(told.last().unwrap(), "/tasks/delete");
    assert_eq!(told.iter().filter(|topic| *topic == "/tasks/exit").count(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn pause_resume_update_stats_pids() {
    let shim = Shim::new().await;
    let client = shim.client().await;
    shim.run(&client, shim.create("s1", "sleep 100", json!({}))).await;
    let pause = api::PauseRequest { id: "s1".into(), ..Default::default() };
    let resume = api::ResumeRequest { id: "s1".into(), ..Default::default() };
    assert_eq!(refusal(client.resume(limit(), &resume).await).0, Code::FAILED_PRECONDITION);
    client.pause(limit(), &pause).await.unwrap();
    assert_eq!(client.state(limit(), &state("s1", "")).await.unwrap().status(), Status::PAUSED);
    assert_eq!(refusal(client.pause(limit(), &pause).await).0, Code::FAILED_PRECONDITION);
    assert_eq!(
        refusal(client.exec(limit(), &exec("s1", "x", "true")).await).0,
        Code::FAILED_PRECONDITION
    );
    client.resume(limit(), &resume).await.unwrap();
    assert_eq!(client.state(limit(), &state("s1", "")).await.unwrap().status(), Status::RUNNING);

    let resources = |json: &str| api::UpdateTaskRequest {
        id: "s1".into(),
        resources: Some(Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".into(),
            value: json.into(),
            ..Default::default()
        })
        .into(),
        ..Default::default()
    };
    client.update(limit(), &resources(r#"{"memory": {"limit": 1048576}}"#)).await.unwrap();
    assert!(shim.launcher.noted("update s1 Some(1048576)"));
    assert_eq!(refusal(client.update(limit(), &resources("[")).await).0, Code::INVALID_ARGUMENT);

    let stats = api::StatsRequest { id: "s1".into(), ..Default::default() };
    let stats = client.stats(limit(), &stats).await.unwrap().stats.unwrap();
    assert!(stats.type_url.starts_with("io.containerd.cgroups.v"), "{}", stats.type_url);
    let pids = api::PidsRequest { id: "s1".into(), ..Default::default() };
    let pids = client.pids(limit(), &pids).await.unwrap().processes;
    assert_eq!(pids.iter().map(|process| process.pid).collect::<Vec<_>>(), [std::process::id()]);
    shim.until_topic("/tasks/resumed", 1).await;
    assert_eq!(shim.topics()[2..], ["/tasks/paused", "/tasks/resumed"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_lives_as_long_as_its_sandbox() {
    let shim = Shim::new().await;
    let client = shim.client().await;
    let sandbox = json!({"io.kubernetes.cri.container-type": "sandbox"});
    let member = json!({"io.kubernetes.cri.container-type": "container",
                        "io.kubernetes.cri.sandbox-id": "s1"});
    shim.run(&client, shim.create("s1", "sleep 100", sandbox)).await;
    shim.run(&client, shim.create("c1", "exit 4", member.clone())).await;
    shim.run(&client, shim.create("c2", "sleep 100", member)).await;
    assert_eq!(client.wait(limit(), &wait("c1", "")).await.unwrap().exit_status, 4);
    client.delete(limit(), &delete("c1", "")).await.unwrap();
    assert!(shim.launcher.noted("remove c1") && !shim.launcher.noted("stop"));
    // Every container's end asks for it; it is heard once none is left.
    client.shutdown(limit(), &api::ShutdownRequest::new()).await.unwrap();
    assert_eq!(client.state(limit(), &state("c2", "")).await.unwrap().status(), Status::RUNNING);
    let strangers = json!({"io.kubernetes.cri.container-type": "container",
                           "io.kubernetes.cri.sandbox-id": "s2"});
    let refused = refusal(client.create(limit(), &shim.create("c3", "true", strangers)).await);
    assert!(refused.1.contains("belongs to sandbox s2"), "{}", refused.1);

    client.kill(limit(), &kill("s1", "", 9)).await.unwrap();
    assert_eq!(client.wait(limit(), &wait("c2", "")).await.unwrap().exit_status, 137);
    until(|| shim.launcher.noted("stop")).await;
    client.delete(limit(), &delete("c2", "")).await.unwrap();
    client.delete(limit(), &delete("s1", "")).await.unwrap();
    client.shutdown(limit(), &api::ShutdownRequest::new()).await.unwrap();
    timeout(LIMIT, shim.pod.finished()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_that_dies_takes_all_with_it_and_says_why() {
    let shim = Shim::new().await;
    let client = shim.client().await;
    shim.run(&client, shim.create("s1", "trap '' TERM; sleep 100", json!({}))).await;
    client.exec(limit(), &exec("s1", "x1", "sleep 100")).await.unwrap();
    shim.launcher.lack_memory("s1");
    shim.until_topic("/tasks/oom", 1).await;
    shim.launcher.die("the guest's kernel panicked").await;
    client.wait(limit(), &wait("s1", "")).await.unwrap();
    until(|| shim.launcher.noted("stop")).await;
    let stats = api::StatsRequest { id: "s1".into(), ..Default::default() };
    let refused = refusal(client.stats(limit(), &stats).await);
    assert_eq!(refused.0, Code::UNAVAILABLE);
    assert!(
        refused.1.contains("sandbox s1 has died: the guest's kernel panicked"),
        "{}",
        refused.1
    );
    client.delete(limit(), &delete("s1", "")).await.unwrap();
    shim.until_topic("/tasks/exit", 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn events_wait_for_a_containerd_that_restarts() {
    let mut shim = Shim::new().await;
    let client = shim.client().await;
    shim.run(&client, shim.create("s1", "sleep 100", json!({}))).await;
    shim.until_topic("/tasks/start", 1).await;
    shim.stop_containerd().await;
    client.kill(limit(), &kill("s1", "", 9)).await.unwrap();
    client.wait(limit(), &wait("s1", "")).await.unwrap();
    client.delete(limit(), &delete("s1", "")).await.unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    shim.start_containerd().await;
    shim.until_topic("/tasks/delete", 1).await;
    assert_eq!(shim.topics()[2..], ["/tasks/exit", "/tasks/delete"]);
}
