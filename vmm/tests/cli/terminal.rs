// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The terminal belongs to the guest while it runs, and is as before afterwards.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::{Command, Stdio};
use std::ptr;
use std::time::{Duration, Instant};

use crate::guest;
use crate::program::Program;

/// A pseudo-terminal: the end of the person and the end of the program.
fn terminal() -> (File, OwnedFd) {
    let (mut person, mut program) = (-1, -1);
    // SAFETY: both numbers are written to; the other pointers may be null (openpty(3)).
    let rc = unsafe {
        libc::openpty(&raw mut person, &raw mut program, ptr::null_mut(), ptr::null(), ptr::null())
    };
    assert_eq!(rc, 0);
    // SAFETY: both were just opened, and nobody else knows them.
    unsafe { (File::from_raw_fd(person), OwnedFd::from_raw_fd(program)) }
}

/// Its local and output modes.
fn modes(terminal: &OwnedFd) -> (libc::tcflag_t, libc::tcflag_t) {
    let mut termios = MaybeUninit::<libc::termios>::uninit();
    // SAFETY: the call writes a `termios` to where the pointer points, or fails.
    assert_eq!(unsafe { libc::tcgetattr(terminal.as_raw_fd(), termios.as_mut_ptr()) }, 0);
    // SAFETY: the call has succeeded.
    let termios = unsafe { termios.assume_init() };
    (termios.c_lflag, termios.c_oflag)
}

fn start(code: &[u8], terminal: &OwnedFd) -> (Program, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let kernel = guest::kernel(dir.path(), code);
    let mut command = Command::new(env!("CARGO_BIN_EXE_ecr-vmm"));
    command.args(["--memory", "16M", "--kernel"]).arg(kernel);
    command.stdin(terminal.try_clone().unwrap());
    command.stdout(terminal.try_clone().unwrap()).stderr(Stdio::piped());
    (Program::from_child(command.spawn().unwrap()), dir)
}

fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !holds() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn it_is_raw_until_the_way_out_is_typed_and_then_as_before() {
    if !guest::kvm() {
        return;
    }
    let (mut person, terminal) = terminal();
    let before = modes(&terminal);
    let (program, _dir) = start(guest::IDLE, &terminal);
    wait_until("the terminal is not raw", || modes(&terminal).0 & libc::ICANON == 0);
    // A Ctrl-C is the guest's.
    person.write_all(b"text\x03\x01\x01\x01x").unwrap();
    let ended = program.end();
    assert_eq!(ended.status, 0, "{ended:?}");
    assert!(ended.stderr.contains("Ctrl-A X ends the VM"), "{ended:?}");
    assert_eq!(modes(&terminal), before);
}

#[test]
fn it_is_as_before_however_the_vm_ends() {
    if !guest::kvm() {
        return;
    }
    for (code, status) in [(guest::POWER_OFF, 0), (guest::PANIC, 3), (guest::TRIPLE_FAULT, 4)] {
        let (_person, terminal) = terminal();
        let before = modes(&terminal);
        let (program, _dir) = start(code, &terminal);
        assert_eq!(program.end().status, status);
        assert_eq!(modes(&terminal), before);
    }
}

#[test]
fn its_flags_are_left_alone() {
    if !guest::kvm() {
        return;
    }
    let (mut person, terminal) = terminal();
    let (program, _dir) = start(guest::IDLE, &terminal);
    wait_until("the terminal is not raw", || modes(&terminal).0 & libc::ICANON == 0);
    person.write_all(b"\x01x").unwrap();
    program.end();
    // A shell would not survive a terminal that does not block: reading must wait here.
    let reader = std::thread::spawn(move || {
        let mut input = File::from(terminal);
        input.read(&mut [0; 16]).map_err(|error| error.kind())
    });
    std::thread::sleep(Duration::from_millis(50));
    assert!(!reader.is_finished(), "{:?}", ErrorKind::WouldBlock);
    person.write_all(b"line\n").unwrap();
    assert_eq!(reader.join().unwrap(), Ok(5));
}
