// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The emulated host itself. Each test boots it, so they are marked as ignored.

use std::time::{Duration, Instant};

use anyhow::Result;
use ecr_testbed::arch::Arch;
use ecr_testbed::emulated::{Emulated, Options};
use ecr_testbed::exec::{CommandSpec, Ending, Stream};
use ecr_testbed::files::GivenFile;
use ecr_testbed::host::Host;

fn host(given: &[GivenFile]) -> Emulated {
    let options = Options { arch: Arch::X86_64, memory_mib: 2048, cpus: 2, show_console: false };
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
fn commands_find_kvm_and_their_files_and_leave_nothing_behind() {
    let work = tempfile::tempdir().unwrap();
    std::fs::write(work.path().join("file"), "content").unwrap();
    let given = GivenFile::new("tree", work.path()).unwrap();
    let mut host = host(&[given]);

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
    let mut host = host(&[]);
    assert_eq!(run(&mut host, "true", 60).unwrap().0, Ending::Exited(0));
    let started = Instant::now();
    let error = run(&mut host, "echo c > /proc/sysrq-trigger; sleep 600", 600).unwrap_err();
    assert!(started.elapsed() < Duration::from_secs(120), "noticed only by a time limit");
    assert!(error.to_string().contains("sysrq triggered crash"), "{error}");
    assert_eq!(run(&mut host, "true", 60).unwrap().0, Ending::Exited(0));
}
