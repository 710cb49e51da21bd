// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Many sandboxes: at once, and one after the other.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

use anyhow::{Result, ensure};
use ecr_tests::containerd::{Containerd, Runtime};

tests_on! {
    v1_7: V1_7, [twenty_sandboxes_run_at_once, a_hundred_come_and_go];
}

const AT_ONCE: usize = 20;
const CYCLES: usize = 100;
/// Of the hundred, at one time: as many as keep two processors busy.
const LANES: usize = 2;

fn twenty_sandboxes_run_at_once(containerd: &mut Containerd) -> Result<()> {
    let containerd = &*containerd;
    let each = |work: &(dyn Fn(String) -> Result<()> + Sync)| {
        thread::scope(|scope| {
            let runs: Vec<_> =
                (0..AT_ONCE).map(|n| scope.spawn(move || work(format!("t{n}")))).collect();
            runs.into_iter().try_for_each(|run| run.join().unwrap())
        })
    };
    each(&|id| {
        let script = format!("echo {id} > /tmp/me; while :; do sleep 1; done");
        containerd.run_detached(Runtime::wanted(), &[], &id, &script)
    })?;
    let list = containerd.ctr(&["tasks", "ls"])?.expect(0)?.text();
    ensure!(list.matches("RUNNING").count() == AT_ONCE, "{list}");
    each(&|id| {
        let said = containerd.exec(&id, "cat /tmp/me")?.expect(0)?.text();
        ensure!(said.trim() == id, "{said}");
        containerd.remove(&id)
    })
}

fn a_hundred_come_and_go(containerd: &mut Containerd) -> Result<()> {
    let containerd = &*containerd;
    let next = AtomicUsize::new(0);
    let started = Instant::now();
    let lane = || -> Result<()> {
        loop {
            let n = next.fetch_add(1, Ordering::Relaxed);
            if n >= CYCLES {
                return Ok(());
            }
            let code = i32::try_from(n % 7)?;
            let script = format!("exit {code}");
            containerd.run(Runtime::wanted(), &[], &format!("t{n}"), &script)?.expect(code)?;
        }
    };
    thread::scope(|scope| {
        let lanes: Vec<_> = (0..LANES).map(|_| scope.spawn(lane)).collect();
        lanes.into_iter().try_for_each(|lane| lane.join().unwrap())
    })?;
    println!("{CYCLES} in {:.1} s", started.elapsed().as_secs_f64());
    Ok(())
}
