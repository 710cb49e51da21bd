// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! How runs end.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;

use crate::guest;
use crate::program::{Ended, Program};

/// Run a guest of these bytes to its end.
fn run(code: &[u8], arguments: &[&str]) -> Option<Ended> {
    let dir = tempfile::tempdir().unwrap();
    guest::kvm().then(|| Program::vm(&guest::kernel(dir.path(), code), arguments).end())
}

#[test]
fn power_off_is_status_0() {
    let Some(ended) = run(guest::POWER_OFF, &[]) else { return };
    ended.assert(0, "the guest has powered off");
}

#[test]
fn the_last_that_a_guest_says_is_heard() {
    let serial = ["--serial", "stdio"];
    let Some(ended) = run(guest::SAY_AND_POWER_OFF, &serial) else { return };
    ended.assert(0, "the guest has powered off");
    assert_eq!(ended.stdout.len(), guest::SAID);
}

#[test]
fn a_panic_is_status_3() {
    let Some(ended) = run(guest::PANIC, &[]) else { return };
    ended.assert(3, "panicked");
}

#[test]
fn a_failure_is_status_4() {
    let Some(ended) = run(guest::TRIPLE_FAULT, &[]) else { return };
    ended.assert(4, "triple-faulted");
}

#[test]
fn a_reboot_ends_where_there_is_to_be_none() {
    let Some(ended) = run(guest::RESET, &["--no-reboot"]) else { return };
    ended.assert(0, "rebooted");
}

#[test]
fn a_socket_in_use_is_status_2() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("qmp.sock");
    let _listener = UnixListener::bind(&socket).unwrap();
    let qmp = format!("unix:{}", socket.display());
    let Some(ended) = run(guest::IDLE, &["--qmp", &qmp]) else { return };
    ended.assert(2, "in use");
    assert!(socket.exists());
}

/// A guest that does nothing, its QMP socket, and the directory of both.
fn idle() -> Option<(Program, std::path::PathBuf, tempfile::TempDir)> {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("qmp.sock");
    let qmp = format!("unix:{}", socket.display());
    guest::kvm()
        .then(|| Program::vm(&guest::kernel(dir.path(), guest::IDLE), &["--qmp", &qmp]))
        .map(|program| (program, socket, dir))
}

fn quit(program: &mut Program, socket: &Path) {
    let mut stream = program.connect(socket);
    stream.write_all(br#"{"execute":"qmp_capabilities"} {"execute":"quit"}"#).unwrap();
    let lines: Vec<String> = BufReader::new(stream).lines().map(Result::unwrap).collect();
    assert!(lines.iter().any(|line| line.contains("host-qmp-quit")), "{lines:?}");
}

#[test]
fn quit_is_status_0_and_leaves_no_socket() {
    let Some((mut program, socket, _dir)) = idle() else { return };
    quit(&mut program, &socket);
    program.end().assert(0, "ended on request");
    assert!(!socket.exists());
}

#[test]
fn the_first_signal_asks_and_the_second_ends() {
    let Some((mut program, socket, _dir)) = idle() else { return };
    let events = BufReader::new({
        let mut stream = program.connect(&socket);
        stream.write_all(br#"{"execute":"qmp_capabilities"}"#).unwrap();
        stream
    });
    let mut events = events.lines().map(Result::unwrap);
    events.find(|line| line.contains("return"));
    program.signal(libc::SIGTERM);
    assert!(events.any(|line| line.contains("POWERDOWN")));
    program.signal(libc::SIGINT);
    assert!(events.any(|line| line.contains("SHUTDOWN")));
    let ended = program.end();
    assert_eq!(ended.status, 0, "{ended:?}");
    assert!(ended.stderr.contains("asking the guest to power off"), "{ended:?}");
    assert!(ended.stderr.ends_with("ecr-vmm: ended on request\n"), "{ended:?}");
}

#[test]
fn a_hang_up_ends_at_once() {
    let Some((mut program, socket, _dir)) = idle() else { return };
    drop(program.connect(&socket));
    program.signal(libc::SIGHUP);
    program.end().assert(0, "ended on request");
}

#[test]
fn a_paused_guest_waits_for_cont() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("qmp.sock");
    if !guest::kvm() {
        return;
    }
    let kernel = guest::kernel(dir.path(), guest::POWER_OFF);
    let qmp = format!("unix:{}", socket.display());
    let mut program = Program::vm(&kernel, &["--qmp", &qmp, "--paused"]);
    let mut stream = BufReader::new(program.connect(&socket));
    let commands = br#"{"execute":"qmp_capabilities"} {"execute":"query-status"}"#;
    stream.get_mut().write_all(commands).unwrap();
    let mut lines = stream.by_ref().lines().map(Result::unwrap);
    assert!(lines.any(|line| line.contains(r#""status":"prelaunch""#)));
    stream.get_mut().write_all(br#"{"execute":"cont"}"#).unwrap();
    program.end().assert(0, "the guest has powered off");
}

/// The same script that drives the scripted machine in `tests/qmp`.
#[test]
fn qemus_own_client_drives_a_vm() {
    let Some(python) = std::env::var_os("ECR_QMP_PYTHON") else {
        eprintln!("SKIPPED: ECR_QMP_PYTHON names no Python that has qemu.qmp");
        return;
    };
    let Some((mut program, socket, _dir)) = idle() else { return };
    drop(program.connect(&socket));
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/qmp/drive.py");
    let output = Command::new(python).arg(script).arg(&socket).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    program.end().assert(0, "ended on request");
}
