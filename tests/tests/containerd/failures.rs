// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What happens when a part of it dies.

use anyhow::{Context, Result, ensure};
use ecr_tests::containerd::{Containerd, HostProcess, Runtime, only_ecr};

tests_on! {
    v1_6: V1_6, [a_killed_shim_leaves_nothing, a_container_outlives_containerd];
    v1_7: V1_7, [
        a_killed_shim_leaves_nothing, a_container_outlives_containerd, without_virtiofsd_the_sandbox_ends,
    ];
    v2: V2, [
        a_killed_shim_leaves_nothing, a_container_outlives_containerd, without_virtiofsd_the_sandbox_ends,
    ];
}

const SLEEP: &str = "echo here > /tmp/file; while :; do sleep 0.1; done";

fn find<'a>(processes: &'a [HostProcess], program: &str) -> Result<&'a HostProcess> {
    let found = processes.iter().find(|process| process.program.contains(program));
    found.with_context(|| format!("no {program} among {processes:#?}"))
}

/// The shim is gone: containerd lets it clean up after itself, and forgets the task.
fn a_killed_shim_leaves_nothing(containerd: &mut Containerd) -> Result<()> {
    // ctr removes its pipes with the task, but here it is containerd that removes the task.
    let pipes = containerd.scratch().join("pipes").display().to_string();
    containerd.run_detached(Runtime::wanted(), &["--fifo-dir", &pipes], "t1", SLEEP)?;
    find(&containerd.processes_of("t1"), "containerd-shim")?.kill()?;
    containerd.wait_for_state("t1", None)?;
    containerd.ctr(&["containers", "rm", "t1"])?.expect(0)?;
    // The name can be had again at once.
    containerd.run(Runtime::wanted(), &[], "t1", "true")?.expect(0)?;
    Ok(())
}

fn a_container_outlives_containerd(containerd: &mut Containerd) -> Result<()> {
    containerd.run_detached(Runtime::wanted(), &[], "t1", SLEEP)?;
    let before = containerd.processes_of("t1");
    containerd.restart()?;
    ensure!(containerd.task_state("t1")?.as_deref() == Some("RUNNING"));
    let said = containerd.exec("t1", "cat /tmp/file")?.expect(0)?.text();
    ensure!(said == "here\n", "{said}");
    let shim = |of: &[HostProcess]| find(of, "containerd-shim").map(|process| process.pid);
    ensure!(shim(&before)? == shim(&containerd.processes_of("t1"))?, "it is another shim");
    containerd.remove("t1")
}

fn without_virtiofsd_the_sandbox_ends(containerd: &mut Containerd) -> Result<()> {
    only_ecr()?;
    containerd.run_detached(Runtime::wanted(), &[], "t1", SLEEP)?;
    find(&containerd.processes_of("t1"), "virtiofsd")?.kill()?;
    containerd.wait_for_state("t1", Some("STOPPED"))?;
    ensure!(containerd.whole_log().contains("virtiofsd"), "the log does not say why");
    ensure!(containerd.remove_task("t1")? == 255);
    containerd.ctr(&["containers", "rm", "t1"])?.expect(0)?;
    Ok(())
}
