// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! A directory of the host in the guest, through virtiofsd.

use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ecr_tests::guest::Boot;
use ecr_tests::place::KERNEL;
use ecr_tests::qmp::Qmp;
use ecr_tests::skip::{same_everywhere, skip};

use crate::{ends_well, place, powers_off, value};

/// Where virtiofsd is, on Debian and elsewhere.
const VIRTIOFSD: [&str; 3] =
    ["/usr/libexec/virtiofsd", "/usr/lib/virtiofsd", "/usr/local/bin/virtiofsd"];

/// A daemon that serves a directory, as long as it lives.
struct Virtiofsd(Child);

impl Virtiofsd {
    fn start(directory: &Path, socket: &Path) -> Result<Self> {
        let Some(program) = VIRTIOFSD.into_iter().find(|path| Path::new(path).exists()) else {
            skip("this host has no virtiofsd");
        };
        let daemon = Command::new(program)
            .arg(format!("--socket-path={}", socket.display()))
            .arg(format!("--shared-dir={}", directory.display()))
            .args(["--sandbox=none", "--seccomp=none"])
            .spawn()
            .context(program)?;
        let daemon = Self(daemon);
        // It takes one connection only, so nobody may try whether it listens.
        let until = Instant::now() + Duration::from_secs(180);
        while !socket.exists() {
            ensure!(Instant::now() < until, "virtiofsd does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(daemon)
    }
}

impl Drop for Virtiofsd {
    fn drop(&mut self) {
        // It ends by itself when the VMM has gone.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
#[ignore = "boots a guest"]
fn a_directory_is_shared_both_ways() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let (shared, socket) = (scratch.path().join("shared"), scratch.path().join("fs.sock"));
    std::fs::create_dir(&shared)?;
    std::fs::write(shared.join("from-host"), "x".repeat(3 << 20))?;
    let _daemon = Virtiofsd::start(&shared, &socket)?;
    let boot = Boot::kernel(&place(), KERNEL)
        .image(&place(), "pmem")
        .with(&["--memory", "256M,shared", "--cpus", "2"])
        .with(&["--fs", &format!("socket={},tag=data,queues=4", socket.display())])
        .script(
            "mount -t virtiofs data /mnt && echo SIZE=$(tr -d y < /mnt/from-host | wc -c); \
             dd if=/dev/zero bs=1M count=8 2>/dev/null | tr \\\\000 z > /mnt/from-guest; umount /mnt",
        );
    let said = powers_off(boot)?;
    ensure!(value(&said, "SIZE")? == "3145728", "{said}");
    let written = std::fs::read(shared.join("from-guest"))?;
    ensure!(written.len() == 8 << 20 && written.iter().all(|byte| *byte == b'z'), "{said}");
    Ok(())
}

#[test]
#[ignore = "boots a guest"]
fn a_guest_outlives_the_daemon_of_its_directory() -> Result<()> {
    same_everywhere();
    let scratch = tempfile::tempdir()?;
    let (socket, control) = (scratch.path().join("fs.sock"), scratch.path().join("qmp.sock"));
    let daemon = Virtiofsd::start(scratch.path(), &socket)?;
    let mut guest = Boot::kernel(&place(), KERNEL)
        .initrd(&place(), "initrd.img")
        .with(&["--memory", "256M,shared"])
        .qmp(&control)
        .with(&["--fs", &format!("socket={},tag=data", socket.display())])
        .start()?;
    guest.wait_ready()?;
    let mut qmp = Qmp::connect(&control)?;
    drop(daemon);
    let lost = qmp.wait_event("__io.containerd.ecr_BACKEND_LOST")?;
    ensure!(lost["data"]["device"] == "fs0", "{lost}");
    ensure!(qmp.execute("query-status")?["running"] == true);
    qmp.execute("system_powerdown")?;
    ends_well(guest).map(drop)
}
