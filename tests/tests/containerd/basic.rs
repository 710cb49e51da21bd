// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! One container by `ctr`: its end, its signals, its streams.

use std::fs;
use std::io::Write;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ecr_tests::containerd::{Containerd, LIMIT, Runtime};
use sha2::{Digest, Sha256};

tests_on! {
    v1_6: V1_6, [
        a_container_has_a_kernel_of_its_own, exit_codes_come_back, signals_reach_the_process,
        exec_runs_beside, a_terminal_can_be_resized, standard_input_ends, pause_stops_and_resume_goes_on,
        metrics_are_told,
    ];
    v1_7: V1_7, [
        a_container_has_a_kernel_of_its_own, exit_codes_come_back, signals_reach_the_process,
        exec_runs_beside, a_terminal_can_be_resized, standard_input_ends, pause_stops_and_resume_goes_on,
        metrics_are_told, a_hundred_megabytes_go_each_way, user_directory_and_environment_are_set,
        two_streams_stay_apart,
    ];
    v2: V2, [
        a_container_has_a_kernel_of_its_own, exit_codes_come_back, signals_reach_the_process,
        exec_runs_beside, a_terminal_can_be_resized, standard_input_ends, pause_stops_and_resume_goes_on,
        metrics_are_told,
    ];
}

const PATIENCE: Duration = Duration::from_secs(60);

fn a_container_has_a_kernel_of_its_own(containerd: &mut Containerd) -> Result<()> {
    let runtime = Runtime::wanted();
    let said = containerd.run(runtime, &[], "t1", "uname -a")?.expect(0)?.text();
    let host = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    ensure!(said.starts_with("Linux "), "{said}");
    ensure!(
        said.contains(host.trim()) == (runtime == Runtime::Runc),
        "host {host}, container {said}"
    );
    Ok(())
}

fn exit_codes_come_back(containerd: &mut Containerd) -> Result<()> {
    for (script, code) in [("true", 0), ("exit 3", 3), ("exit 255", 255), ("kill -9 $$", 137)] {
        // The first process of a namespace cannot kill itself, so a second one does it, and is waited for.
        let script = format!("sh -c '{script}'; exit $?");
        containerd.run(Runtime::wanted(), &[], "t1", &script)?.expect(code)?;
    }
    Ok(())
}

fn signals_reach_the_process(containerd: &mut Containerd) -> Result<()> {
    let script = "trap 'echo got it; exit 42' USR1; echo up; while :; do sleep 0.1; done";
    let mut run = containerd.run_with_input(Runtime::wanted(), &[], "t1", script)?;
    let input = run.stdin();
    containerd.wait_for_state("t1", Some("RUNNING"))?;
    // The trap is set a moment after the start.
    let mut tries = 0;
    while containerd.exec("t1", "grep SigCgt: /proc/1/status")?.text().trim().ends_with("0000") {
        tries += 1;
        ensure!(tries < 100, "the trap is not set");
    }
    containerd.ctr(&["tasks", "kill", "-s", "SIGUSR1", "t1"])?.expect(0)?;
    let finished = run.finish(LIMIT)?.expect(42)?;
    ensure!(finished.text().contains("got it"), "{finished}");
    drop(input);

    containerd.run_detached(Runtime::wanted(), &[], "t2", "sleep 1000")?;
    containerd.ctr(&["tasks", "kill", "-s", "SIGKILL", "t2"])?.expect(0)?;
    containerd.wait_for_state("t2", Some("STOPPED"))?;
    ensure!(containerd.remove_task("t2")? == 137);
    containerd.ctr(&["containers", "rm", "t2"])?.expect(0)?;
    Ok(())
}

fn exec_runs_beside(containerd: &mut Containerd) -> Result<()> {
    containerd.run_detached(Runtime::wanted(), &[], "t1", "echo here > /tmp/file; sleep 1000")?;
    for _ in 0..3 {
        let finished = containerd.exec("t1", "cat /tmp/file; exit 5")?.expect(5)?;
        ensure!(finished.text() == "here\n", "{finished}");
    }
    let finished = containerd.exec("t1", "kill -9 $$")?;
    ensure!(finished.code == 137, "{finished}");
    // Many at once.
    thread::scope(|scope| {
        let containerd = &*containerd;
        let runs: Vec<_> = (0..4)
            .map(|n| {
                scope.spawn(move || {
                    containerd.exec("t1", &format!("sleep 0.2; exit {n}"))?.expect(n)
                })
            })
            .collect();
        runs.into_iter().try_for_each(|run| run.join().unwrap().map(drop))
    })?;
    // A program that is not there.
    let missing =
        containerd.ctr(&["tasks", "exec", "--exec-id", "no", "t1", "/no/such/program"])?;
    ensure!(missing.code != 0 && missing.errors().contains("/no/such/program"), "{missing}");
    containerd.remove("t1")
}

fn a_terminal_can_be_resized(containerd: &mut Containerd) -> Result<()> {
    // ctr tells the size a moment after the start; until then there is none.
    let script = "until stty size 2>/dev/null; do sleep 0.1; done; read line; stty size; exit 7";
    let mut run = containerd.run_on_terminal(Runtime::wanted(), "t1", script)?;
    run.wait_for("24 80", PATIENCE)?;
    run.resize(33, 101)?;
    // The new size takes its way through containerd; what is typed takes another.
    thread::sleep(Duration::from_secs(1));
    run.type_in("word\n")?;
    run.wait_for("33 101", PATIENCE)?;
    ensure!(run.finish(LIMIT)? == 7);
    Ok(())
}

fn standard_input_ends(containerd: &mut Containerd) -> Result<()> {
    let mut run = containerd.run_with_input(Runtime::wanted(), &[], "t1", "cat; echo the end")?;
    let mut input = run.stdin().context("no pipe")?;
    input.write_all(b"one\ntwo\n")?;
    drop(input);
    let finished = run.finish(LIMIT)?.expect(0)?;
    ensure!(finished.text() == "one\ntwo\nthe end\n", "{finished}");
    Ok(())
}

fn two_streams_stay_apart(containerd: &mut Containerd) -> Result<()> {
    let script = "i=0; while [ $i -lt 500 ]; do echo o$i; echo e$i >&2; i=$((i+1)); done";
    let finished = containerd.run(Runtime::wanted(), &[], "t1", script)?.expect(0)?;
    for (letter, text) in [("o", finished.text()), ("e", finished.errors())] {
        let expected: String = (0..500).map(|n| format!("{letter}{n}\n")).collect();
        ensure!(text == expected, "{text}");
    }
    Ok(())
}

/// `100 MB`, and the same on every machine.
const BIG: usize = 100_000_000;
const LINE: &[u8] = b"0123456789abcdef0123456789abcdef\n";

fn a_hundred_megabytes_go_each_way(containerd: &mut Containerd) -> Result<()> {
    let big: Vec<u8> = LINE.iter().copied().cycle().take(BIG).collect();
    let sum: String = Sha256::digest(&big).iter().map(|byte| format!("{byte:02x}")).collect();
    let runtime = Runtime::wanted();

    let line = String::from_utf8_lossy(LINE).trim().to_owned();
    let out =
        containerd.run(runtime, &[], "t1", &format!("yes {line} | head -c {BIG}"))?.expect(0)?;
    ensure!(out.stdout == big, "{} bytes came, or others than were sent", out.stdout.len());
    println!("{BIG} bytes out in {:.1} s", out.wall.as_secs_f64());

    let mut run = containerd.run_with_input(runtime, &[], "t2", "sha256sum")?;
    let mut input = run.stdin().context("no pipe")?;
    let writer = thread::spawn(move || input.write_all(&big));
    let finished = run.finish(LIMIT)?.expect(0)?;
    writer.join().unwrap()?;
    ensure!(finished.text().starts_with(&sum), "{sum} was sent; {finished}");
    println!("{BIG} bytes in in {:.1} s", finished.wall.as_secs_f64());
    Ok(())
}

fn pause_stops_and_resume_goes_on(containerd: &mut Containerd) -> Result<()> {
    let script = "i=0; while :; do i=$((i+1)); echo $i > /tmp/count; sleep 0.05; done";
    containerd.run_detached(Runtime::wanted(), &[], "t1", script)?;
    let count = |containerd: &Containerd| -> Result<u64> {
        let said = containerd.exec("t1", "cat /tmp/count")?.expect(0)?.text();
        Ok(said.trim().parse().unwrap_or_default())
    };
    while count(containerd)? == 0 {}
    containerd.ctr(&["tasks", "pause", "t1"])?.expect(0)?;
    containerd.wait_for_state("t1", Some("PAUSED"))?;
    containerd.ctr(&["tasks", "resume", "t1"])?.expect(0)?;
    containerd.wait_for_state("t1", Some("RUNNING"))?;
    let before = count(containerd)?;
    while count(containerd)? <= before {}
    containerd.remove("t1")
}

fn metrics_are_told(containerd: &mut Containerd) -> Result<()> {
    containerd.run_detached(Runtime::wanted(), &[], "t1", "while :; do :; done")?;
    let said = containerd.ctr(&["tasks", "metrics", "t1"])?.expect(0)?.text();
    let value = |name: &str| -> Option<u64> {
        said.lines().find_map(|line| line.trim().strip_prefix(name)?.trim().parse().ok())
    };
    ensure!(
        value("memory.usage_in_bytes").or(value("memory.usage")).is_some_and(|n| n > 0),
        "{said}"
    );
    containerd.remove("t1")
}

fn user_directory_and_environment_are_set(containerd: &mut Containerd) -> Result<()> {
    let options = ["--user", "65534:65534", "--cwd", "/tmp", "--env", "GREETING=hello there"];
    let script = "id -u; id -g; pwd; echo $GREETING";
    let said = containerd.run(Runtime::wanted(), &options, "t1", script)?.expect(0)?.text();
    ensure!(said == "65534\n65534\n/tmp\nhello there\n", "{said}");
    // Read-only.
    let script = "touch /file 2>&1; echo $?";
    let said = containerd.run(Runtime::wanted(), &["--read-only"], "t2", script)?.expect(0)?.text();
    ensure!(said.contains("Read-only file system") && said.ends_with("1\n"), "{said}");
    Ok(())
}
