// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Containers by the agent, on this machine's kernel, through the protocol. Needs root and Debian's `busybox-static`;
//! says so and passes where these are missing.

#![allow(clippy::unwrap_used)] // Helpers too: a failed step is a failed test.

mod harness;
mod isolation;
mod streams;

use std::fs;
use std::time::Duration;

use ecr_agent_protocol::agent as msg;
use ecr_agent_protocol::oci;
use harness::{Agent, process, reason, soon};
use protobuf::MessageField;
use ttrpc::Code;

#[tokio::test]
async fn a_container_from_beginning_to_end() {
    let Some(agent) = Agent::start().await else { return };
    let mut spec =
        agent.spec("c1", "echo out $HOSTNAME $HOME; hostname; echo err >&2; pwd; exit 3");
    spec.hostname = "box".into();
    spec.linux.namespaces.iter().for_each(|one| assert!(one.path.is_empty()));
    spec.process.mut_or_insert_default().cwd = "/made/on/the/way".into();
    let (status, stdout, stderr) = agent.run("c1", spec).await;
    assert_eq!((status, stderr.as_str()), (3, "err\n"));
    assert_eq!(stdout, "out box /root\nbox\n/made/on/the/way\n");
    agent.assert_gone("c1");
    // The name is free again, and the bundle is described while it lives.
    agent.create("c1", agent.spec("c1", "true")).await.unwrap();
    let config = agent.inside("/run/kata-containers/c1/config.json");
    assert!(fs::read_to_string(config).unwrap().contains("\"args\":[\"sh\",\"-c\",\"true\"]"));
    agent.remove("c1").await.unwrap();
    agent.assert_gone("c1");
}

#[tokio::test]
async fn ends_and_signals() {
    let Some(agent) = Agent::start().await else { return };
    // Handled by the program.
    agent.sleeper("handled").await;
    let waiters = async { tokio::join!(agent.wait("handled", ""), agent.wait("handled", "")) };
    let (both, signalled) = tokio::join!(waiters, agent.signal("handled", "", libc::SIGTERM));
    signalled.unwrap();
    assert_eq!(both, (5, 5));
    agent.signal("handled", "", libc::SIGTERM).await.unwrap();
    assert_eq!(agent.wait("handled", "").await, 5, "asked again later");
    // The first process of a namespace does not feel what it does not handle.
    agent.create("plain", agent.spec("plain", "exec sleep 1000")).await.unwrap();
    agent.start_container("plain").await.unwrap();
    agent.signal("plain", "", libc::SIGTERM).await.unwrap();
    assert_eq!(agent.wait("plain", "").await, 128 + libc::SIGKILL);
    // Never started.
    agent.create("early", agent.spec("early", "true")).await.unwrap();
    agent.signal("early", "", libc::SIGKILL).await.unwrap();
    assert_eq!(agent.wait("early", "").await, 137);
    assert!(agent.start_container("early").await.is_err());
    // Killed by the program's own signal.
    agent.create("own", agent.spec("own", "sh -c 'kill -SEGV $$'; exit $?")).await.unwrap();
    agent.start_container("own").await.unwrap();
    assert_eq!(agent.wait("own", "").await, 128 + libc::SIGSEGV);
    assert_eq!(agent.signal("own", "", 65).await.unwrap_err().0, Code::INVALID_ARGUMENT);
    for id in ["handled", "plain", "early", "own"] {
        agent.remove(id).await.unwrap();
        agent.assert_gone(id);
    }
}

#[tokio::test]
async fn processes_beside_the_first() {
    let Some(agent) = Agent::start().await else { return };
    agent.sleeper("c1").await;
    agent
        .exec("c1", "e1", process(&["sh", "-c", "echo $$ $HOME; ps | wc -l; exit 7"]))
        .await
        .unwrap();
    let output = String::from_utf8(agent.stdout("c1", "e1").await).unwrap();
    assert!(output.contains("/root") && !output.starts_with("1 "), "{output}");
    assert_eq!(agent.wait("c1", "e1").await, 7);
    assert!(agent.exec("c1", "e1", process(&["true"])).await.is_ok(), "a name of the past is free");
    // Each signal is for its own process.
    agent.exec("c1", "e2", process(&["sleep", "1000"])).await.unwrap();
    let again = agent.exec("c1", "e2", process(&["true"])).await.unwrap_err();
    assert_eq!(again.0, Code::ALREADY_EXISTS);
    agent.signal("c1", "e2", libc::SIGTERM).await.unwrap();
    assert_eq!(agent.wait("c1", "e2").await, 128 + libc::SIGTERM);
    // Errors read as people know them.
    let error = |args: &'static [&str]| {
        let agent = &agent;
        async move { agent.exec("c1", "bad", process(args)).await.unwrap_err().1 }
    };
    assert_eq!(error(&["foo"]).await, "exec: \"foo\": executable file not found in $PATH");
    let expected = "exec: \"/foo\": stat /foo: no such file or directory";
    assert_eq!(error(&["/foo"]).await, expected);
    assert_eq!(error(&["/etc/passwd"]).await, "exec: \"/etc/passwd\": permission denied");
    assert_eq!(error(&[]).await, "args must not be empty");
    let mut lost = process(&["true"]);
    lost.cwd = "/nowhere".into();
    let error = agent.exec("c1", "bad", lost).await.unwrap_err().1;
    let expected =
        "chdir to cwd (\"/nowhere\") set in config.json failed: no such file or directory";
    assert_eq!(error, expected);
    // With the first process all others end.
    agent.exec("c1", "e3", process(&["sleep", "1000"])).await.unwrap();
    agent.signal("c1", "", libc::SIGKILL).await.unwrap();
    assert_eq!(agent.wait("c1", "e3").await, 137);
    let late = agent.exec("c1", "e4", process(&["true"])).await.unwrap_err();
    assert_eq!(late.0, Code::FAILED_PRECONDITION);
    assert!(late.1.contains("not running"), "{late:?}");
    agent.remove("c1").await.unwrap();
}

/// Makes a good specification bad.
type Spoil = fn(&mut oci::Spec);

#[tokio::test]
async fn wrong_order_and_wrong_words() {
    let Some(agent) = Agent::start().await else { return };
    agent.create("c1", agent.spec("c1", "sleep 1000")).await.unwrap();
    let twice = agent.create("c1", agent.spec("c1", "true")).await.unwrap_err();
    assert_eq!(twice.0, Code::ALREADY_EXISTS);
    let early = agent.exec("c1", "e1", process(&["true"])).await.unwrap_err();
    assert_eq!(early.0, Code::FAILED_PRECONDITION);
    agent.start_container("c1").await.unwrap();
    assert_eq!(agent.start_container("c1").await.unwrap_err().0, Code::FAILED_PRECONDITION);
    assert_eq!(agent.remove("c2").await.unwrap_err().0, Code::INVALID_ARGUMENT);
    assert_eq!(agent.signal("c1", "x", 9).await.unwrap_err().0, Code::NOT_FOUND);
    assert_eq!(agent.start_container("").await.unwrap_err().0, Code::INVALID_ARGUMENT);
    agent.remove("c1").await.unwrap();

    // Whatever fails on the way leaves nothing behind.
    let bad: [(&str, Spoil); 7] = [
        ("root file system", |spec| spec.root.mut_or_insert_default().path = "/no/such".into()),
        ("executable file not found in $PATH", |spec| {
            spec.process.mut_or_insert_default().args = vec!["foo".into()];
        }),
        ("\"/no/such/source\"", |spec| {
            spec.mounts.push(harness::mount("/x", "bind", "/no/such/source", &["rbind"]));
        }),
        ("no name of a cgroup", |spec| {
            spec.linux.mut_or_insert_default().cgroups_path = "/../x".into();
        }),
        ("limit \"RLIMIT_MOOD\"", |spec| {
            let limit = oci::POSIXRlimit { type_: "RLIMIT_MOOD".into(), ..Default::default() };
            spec.process.mut_or_insert_default().rlimits.push(limit);
        }),
        ("no/such/parameter", |spec| {
            let parameters = &mut spec.linux.mut_or_insert_default().sysctl;
            parameters.insert("no.such.parameter".into(), "1".into());
        }),
        ("namespace \"user\"", |spec| {
            let user = oci::LinuxNamespace { type_: "user".into(), ..Default::default() };
            spec.linux.mut_or_insert_default().namespaces.push(user);
        }),
    ];
    for (words, spoil) in bad {
        let mut spec = agent.spec("bad", "true");
        spoil(&mut spec);
        let error = agent.create("bad", spec).await.unwrap_err();
        assert!(error.1.contains(words), "{error:?}");
        agent.assert_gone("bad");
    }
    assert_eq!(
        agent.create("../up", agent.spec("up", "")).await.unwrap_err().0,
        Code::INVALID_ARGUMENT
    );
}

#[tokio::test]
async fn pause_stats_and_removal_while_paused() {
    let Some(agent) = Agent::start().await else { return };
    agent.sleeper("c1").await;
    let pause = msg::PauseContainerRequest { container_id: "c1".into(), ..Default::default() };
    let resume = msg::ResumeContainerRequest { container_id: "c1".into(), ..Default::default() };
    agent.client.agent.pause_container(soon(), &pause).await.unwrap();
    let again = agent.client.agent.pause_container(soon(), &pause).await.map_err(reason);
    assert_eq!(again.unwrap_err().0, Code::FAILED_PRECONDITION);
    let frozen = fs::read_to_string(agent.cgroup_of("c1").join("cgroup.events")).unwrap();
    assert!(frozen.contains("frozen 1"), "{frozen}");
    let exec = agent.exec("c1", "e1", process(&["true"])).await.unwrap_err();
    assert!(exec.1.contains("paused"), "{exec:?}");
    agent.client.agent.resume_container(soon(), &resume).await.unwrap();
    agent.exec("c1", "e1", process(&["true"])).await.unwrap();
    assert_eq!(agent.wait("c1", "e1").await, 0);

    let request = msg::StatsContainerRequest { container_id: "c1".into(), ..Default::default() };
    let stats = agent.client.agent.stats_container(soon(), &request).await.unwrap();
    let usage = &stats.cgroup_stats.cpu_stats.cpu_usage;
    assert!(usage.total_usage > 0, "{stats:?}");
    assert!(stats.cgroup_stats.memory_stats.stats.contains_key("total_inactive_file"));

    agent.client.agent.pause_container(soon(), &pause).await.unwrap();
    agent.remove("c1").await.unwrap();
    agent.assert_gone("c1");
}

#[tokio::test]
async fn containers_of_a_pod_may_share_their_processes() {
    let Some(agent) = Agent::start().await else { return };
    let create = |id: &str, script: &str| msg::CreateContainerRequest {
        container_id: id.into(),
        oci: MessageField::some(agent.spec(id, script)),
        sandbox_pidns: true,
        ..Default::default()
    };
    agent.create_with(create("pause", "exec sleep 1000")).await.unwrap();
    agent.start_container("pause").await.unwrap();
    let script = "sleep 1001 & echo $$; ps -o pid,args | grep '[s]leep 1000'; wait";
    agent.create_with(create("app", script)).await.unwrap();
    agent.start_container("app").await.unwrap();
    let request =
        msg::ReadStreamRequest { container_id: "app".into(), len: 4096, ..Default::default() };
    let mut seen = String::new();
    while !seen.contains("sleep 1000") {
        let data = agent.client.agent.read_stdout(soon(), &request).await.unwrap().data;
        assert!(!data.is_empty(), "{seen}");
        seen += str::from_utf8(&data).unwrap();
    }
    assert!(!seen.starts_with("1\n"), "{seen}");
    agent.exec("app", "e1", process(&["sh", "-c", "exit 4"])).await.unwrap();
    assert_eq!(agent.wait("app", "e1").await, 4);
    // Its descendants end with it, though the namespace lives on.
    agent.signal("app", "", libc::SIGTERM).await.unwrap();
    assert_eq!(agent.wait("app", "").await, 137);
    let procs = agent.cgroup_of("app").join("cgroup.procs");
    for _ in 0..100 {
        if fs::read_to_string(&procs).unwrap().is_empty() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(fs::read_to_string(&procs).unwrap(), "");
    agent.remove("app").await.unwrap();
    agent.remove("pause").await.unwrap();
    agent.assert_gone("app");
}

#[tokio::test]
async fn the_end_of_the_sandbox_ends_everything() {
    let Some(agent) = Agent::start().await else { return };
    agent.sleeper("c1").await;
    let next = msg::GetOOMEventRequest::new();
    let destroy = msg::DestroySandboxRequest::new();
    let context = soon();
    let (event, destroyed) =
        tokio::join!(agent.client.agent.get_oom_event(context, &next), async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            agent.client.agent.destroy_sandbox(soon(), &destroy).await
        });
    assert_eq!(event.map_err(reason).unwrap_err(), (Code::INTERNAL, String::new()));
    destroyed.unwrap();
    assert!(!agent.cgroup_of("c1").exists());
}

#[tokio::test]
async fn limits_and_lack_of_memory() {
    let Some(agent) = Agent::start().await else { return };
    let controllers = agent.inside("/sys/fs/cgroup/cgroup.controllers");
    if !fs::read_to_string(controllers).unwrap().contains("memory") {
        eprintln!("SKIPPED: this kernel's memory controller is not one of cgroup version 2");
        return;
    }
    let resources = |processes| oci::LinuxResources {
        memory: MessageField::some(oci::LinuxMemory {
            limit: 32 << 20,
            swap: 32 << 20,
            ..Default::default()
        }),
        cpu: MessageField::some(oci::LinuxCPU {
            shares: 512,
            quota: 50_000,
            period: 100_000,
            cpus: "0".into(),
            ..Default::default()
        }),
        pids: MessageField::some(oci::LinuxPids { limit: processes, ..Default::default() }),
        hugepage_limits: ["2MB", "1GB", "64KB"]
            .map(|size| oci::LinuxHugepageLimit { pagesize: size.into(), ..Default::default() })
            .into(),
        ..Default::default()
    };
    // More and more of one line that never ends.
    let mut spec = agent.spec("c1", "read line; tail /dev/zero");
    spec.linux.mut_or_insert_default().resources = MessageField::some(resources(20));
    agent.create("c1", spec).await.unwrap();
    let read = |file: &str| fs::read_to_string(agent.cgroup_of("c1").join(file)).unwrap();
    assert_eq!(read("memory.max"), "33554432\n");
    assert_eq!(read("memory.swap.max"), "0\n");
    assert_eq!(read("cpu.max"), "50000 100000\n");
    assert_eq!(read("cpuset.cpus"), "0\n");
    assert_eq!(read("pids.max"), "20\n");
    agent.start_container("c1").await.unwrap();
    let update = msg::UpdateContainerRequest {
        container_id: "c1".into(),
        resources: MessageField::some(resources(30)),
        ..Default::default()
    };
    agent.client.agent.update_container(soon(), &update).await.unwrap();
    assert_eq!(read("pids.max"), "30\n");
    let request = msg::StatsContainerRequest { container_id: "c1".into(), ..Default::default() };
    let stats = agent.client.agent.stats_container(soon(), &request).await.unwrap();
    let memory = &stats.cgroup_stats.memory_stats;
    assert_eq!(memory.usage.limit, 32 << 20);
    assert!(memory.usage.usage > 0 && memory.stats["anon"] == memory.stats["rss"], "{stats:?}");
    assert_eq!(stats.cgroup_stats.pids_stats.limit, 30);
    agent.close_stdin("c1", "").await;
    let event = msg::GetOOMEventRequest::new();
    let event = agent.client.agent.get_oom_event(soon(), &event).await.unwrap();
    assert_eq!(event.container_id, "c1");
    assert_eq!(agent.wait("c1", "").await, 137);
    agent.remove("c1").await.unwrap();
    agent.assert_gone("c1");
}
