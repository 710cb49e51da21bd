// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The emulated host itself. Each test boots it, so they are marked as ignored.

#![allow(clippy::unwrap_used)] // A failed step is a failed test.

use std::time::{Duration, Instant};

use anyhow::Result;
use ecr_testbed::arch::{Arch, Gic};
use ecr_testbed::emulated::{Emulated, Options};
use ecr_testbed::exec::{CommandSpec, Ending, Stream};
use ecr_testbed::files::GivenFile;
use ecr_testbed::host::Host;

fn host(arch: Arch, given: &[GivenFile]) -> Emulated {
    let options =
        Options { arch, gic: Gic::default(), memory_mib: 2048, cpus: 2, show_console: false };
    Emulated::new(options, given, &[("GIVEN".into(), "by the caller".into())])
}

fn run(host: &mut dyn Host, script: &str, seconds: u64) -> Result<(Ending, String)> {
    let spec = CommandSpec {
        argv: vec!["sh".into(), "-c".into(), script.into()],
        time_limit: Some(Duration::from_secs(seconds)),
        ..CommandSpec::default()
    };
    let mut said = Vec::new();
    let ending = host.run(&spec, &mut |stream, bytes| {
        if stream == Stream::Stdout {
            said.extend_from_slice(bytes);
        }
    })?;
    Ok((ending, String::from_utf8(said)?))
}

#[test]
#[ignore = "boots the emulated host"]
fn commands_find_kvm_and_their_files_and_leave_nothing_behind_on_x86_64() {
    commands_find_kvm_and_their_files_and_leave_nothing_behind(Arch::X86_64);
}

#[test]
#[ignore = "boots the emulated host"]
fn commands_find_kvm_and_their_files_and_leave_nothing_behind_on_aarch64() {
    commands_find_kvm_and_their_files_and_leave_nothing_behind(Arch::Aarch64);
}

fn commands_find_kvm_and_their_files_and_leave_nothing_behind(arch: Arch) {
    let work = tempfile::tempdir().unwrap();
    std::fs::write(work.path().join("file"), "content").unwrap();
    let given = GivenFile::new("tree", work.path()).unwrap();
    let mut host = host(arch, &[given]);

    let machine = format!("{}\n", arch.name());
    assert_eq!(run(&mut host, "uname -m", 60).unwrap(), (Ending::Exited(0), machine));
    let script = "test -c /dev/kvm && test -c /dev/vhost-vsock && test -c /dev/vhost-net && cat $ECR_FILES/tree/file";
    assert_eq!(run(&mut host, script, 60).unwrap(), (Ending::Exited(0), "content".into()));
    assert_eq!(
        run(&mut host, "echo $GIVEN >&1; kill -9 $$", 60).unwrap(),
        (Ending::Signalled(9), "by the caller\n".into())
    );

    // A session of its own saves nobody.
    let stuck = run(&mut host, "setsid sleep 1234 & sleep 1234", 2).unwrap();
    assert_eq!(stuck.0, Ending::TimedOut(Duration::from_secs(2)));
    assert_eq!(run(&mut host, "pgrep -c sleep", 60).unwrap(), (Ending::Exited(1), "0\n".into()));

    let to = work.path().join("collected");
    run(&mut host, "mkdir $ECR_COLLECT/d; head -c 700000 /dev/zero > $ECR_COLLECT/d/zeros", 60)
        .unwrap();
    host.collect(&to).unwrap();
    assert_eq!(std::fs::read(to.join("d/zeros")).unwrap(), vec![0; 700_000]);
}

#[test]
#[ignore = "boots the emulated host"]
fn a_host_that_panics_is_noticed_at_once_and_booted_again() {
    let mut host = host(Arch::X86_64, &[]);
    assert_eq!(run(&mut host, "true", 60).unwrap().0, Ending::Exited(0));
    let started = Instant::now();
    let error = run(&mut host, "echo c > /proc/sysrq-trigger; sleep 600", 600).unwrap_err();
    assert!(started.elapsed() < Duration::from_secs(120), "noticed only by a time limit");
    assert!(error.to_string().contains("sysrq triggered crash"), "{error}");
    assert_eq!(run(&mut host, "true", 60).unwrap().0, Ending::Exited(0));
}

/// With Debian's QEMU as the VMM and the host's own kernel as the guest's: where that works, a failure of ours is
/// ours. A kernel without a root file system says so and panics, after all of its drivers have started.
fn kvm_runs_a_stock_kernel(arch: Arch, machine: &str) {
    let mut host = host(arch, &[]);
    let script = format!(
        "timeout 120 {} -machine {machine},accel=kvm -cpu host -m 512 -nodefaults -no-user-config \
         -display none -no-reboot -serial stdio -kernel /boot/vmlinuz-* -append 'console={} quiet panic=-1'",
        arch.emulator().0,
        arch.console()
    );
    let (ending, said) = run(&mut host, &script, 150).unwrap();
    assert_eq!(ending, Ending::Exited(0), "{said}");
    assert!(said.contains("Unable to mount root fs"), "{said}");
}

#[test]
#[ignore = "boots the emulated host"]
fn kvm_runs_a_stock_kernel_on_x86_64() {
    kvm_runs_a_stock_kernel(Arch::X86_64, "q35");
}

#[test]
#[ignore = "boots the emulated host, whose image takes a minute to build"]
fn kvm_runs_a_stock_kernel_on_aarch64() {
    kvm_runs_a_stock_kernel(Arch::Aarch64, "virt,gic-version=3");
}
