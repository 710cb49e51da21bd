// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What is refused before there is a guest.

use std::fs;

use crate::guest;
use crate::program::Program;

#[test]
fn help_and_version_go_to_standard_output() {
    let help = Program::start(["--help"]).end();
    assert_eq!((help.status, help.stderr.as_str()), (0, ""));
    assert!(help.stdout.contains("--kernel") && help.stdout.contains("Examples:"));
    let version = Program::start(["--version"]).end();
    assert_eq!(version.stdout, concat!("ecr-vmm ", env!("CARGO_PKG_VERSION"), "\n"));
}

#[test]
fn bad_arguments_are_status_2_and_one_line() {
    for (arguments, text) in [
        (&[][..], "--kernel <FILE>"),
        (&["--kernel", "k", "--cpus", "0"], "cpus.boot: 0"),
        (&["--kernel", "k", "--memory", "lots"], "such as 512M"),
        (&["--kernel", "k", "--disk", "a,b=c"], "there is no \"b\""),
        (&["--kernel", "k", "--turbo"], "'--turbo'"),
        (&["--kernel", "k", "stray"], "'stray'"),
    ] {
        Program::start(arguments).end().assert(2, text);
    }
}

#[test]
fn a_kernel_that_is_none_is_status_2() {
    if !guest::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    Program::vm(&dir.path().join("missing"), &[]).end().assert(2, "No such file");
    Program::vm(dir.path(), &[]).end().assert(2, "not a regular file");
    let text = dir.path().join("text");
    fs::write(&text, "not a kernel, but longer than any header of one. ".repeat(100)).unwrap();
    Program::vm(&text, &[]).end().assert(2, "neither a bzImage nor an ELF file");
    fs::write(&text, "").unwrap();
    Program::vm(&text, &[]).end().assert(2, "empty");
}

#[test]
fn what_cannot_be_had_is_status_2() {
    if !guest::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let kernel = guest::kernel(dir.path(), guest::IDLE);
    let odd = dir.path().join("odd");
    fs::write(&odd, [0; 1000]).unwrap();
    let odd = odd.to_str().unwrap();
    for (arguments, text) in [
        (["--cpus", "100000"], "100000 CPUs were asked for"),
        (["--disk", odd], "not a positive multiple of 512"),
        (["--disk", "/no/such/disk"], "/no/such/disk"),
        (["--image", odd], "not a multiple of"),
        (["--image", "/"], "not a regular file"),
        (["--qmp", "unix:/no/such/socket"], "/no/such/socket"),
        (["--serial", "file:/no/such/file"], "/no/such/file"),
        (["--vsock", "cid=3,socket=/no/such/socket"], "/no/such/socket"),
    ] {
        Program::vm(&kernel, &arguments).end().assert(2, text);
    }
}

#[test]
fn a_log_that_cannot_be_written_is_said_so() {
    let run = Program::start(["--kernel", "k", "--log", "info,file=/no/such/file"]);
    run.end().assert(2, "open \"/no/such/file\" for the log");
}
