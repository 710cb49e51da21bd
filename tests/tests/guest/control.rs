// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Whoever controls a guest: by QMP, and at its console.

use anyhow::{Result, ensure};
use ecr_tests::guest::Boot;
use ecr_tests::place::KERNEL;
use ecr_tests::qmp::Qmp;
use ecr_tests::skip::same_everywhere;

use crate::{ends_well, place};

#[test]
#[ignore = "boots a guest"]
fn qmp_stops_and_continues_a_guest() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let socket = scratch.path().join("qmp.sock");
    let mut guest = Boot::kernel(&place(), KERNEL)
        .initrd(&place(), "initrd.img")
        .with(&["--cpus", "2"])
        .qmp(&socket)
        .start()?;
    guest.wait_ready()?;
    let mut qmp = Qmp::connect(&socket)?;
    for _ in 0..20 {
        qmp.execute("stop")?;
        qmp.wait_event("STOP")?;
        ensure!(qmp.execute("query-status")?["status"] == "paused");
        qmp.execute("cont")?;
        qmp.wait_event("RESUME")?;
        ensure!(qmp.execute("query-status")?["running"] == true);
    }
    ensure!(qmp.execute("query-cpus-fast")?.as_array().map(Vec::len) == Some(2));
    qmp.execute("system_reset")?;
    qmp.wait_event("RESET")?;
    guest.wait_ready()?;
    qmp.execute("quit")?;
    let shutdown = qmp.wait_event("SHUTDOWN")?;
    ensure!(shutdown["data"]["guest"] == false, "{shutdown}");
    guest.wait_end()?;
    Ok(())
}

#[test]
#[ignore = "boots a guest"]
fn a_console_socket_that_nobody_reads_does_not_stop_the_guest() -> Result<()> {
    same_everywhere();
    let scratch = tempfile::tempdir()?;
    let socket = scratch.path().join("console.sock");
    let boot = Boot::kernel(&place(), KERNEL)
        .image(&place(), "pmem")
        .with(&["--console", &format!("unix:{}", socket.display())])
        .script("dd if=/dev/zero bs=1024 count=1024 2>/dev/null | tr x y");
    let guest = boot.start()?;
    let stuck = ecr_tests::guest::wait_for_socket(&socket)?;
    ends_well(guest)?;
    drop(stuck);
    Ok(())
}
