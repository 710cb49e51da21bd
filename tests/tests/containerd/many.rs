// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Many sandboxes: at once, and one after the other.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

use anyhow::{Result, ensure};
use ecr_tests::containerd::{Containerd, Runtime};
use ecr_tests::place::enough;

tests_on! {
    v1_7: V1_7, [sandboxes_run_at_once, many_come_and_go];
}

/// How many, on hardware and in an emulated host, whose one processor boots ten guests in minutes. What is left behind or
/// mixed up shows with fewer as well.
const AT_ONCE: (usize, usize) = (20, 10);
const CYCLES: (usize, usize) = (100, 14);
/// Of those cycles, at one time: as many as keep two processors busy.
const LANES: usize = 2;

fn sandboxes_run_at_once(containerd: &mut Containerd) -> Result<()> {
    let (containerd, at_once) = (&*containerd, enough(AT_ONCE.0, AT_ONCE.1));
    let each = |work: &(dyn Fn(String) -> Result<()> + Sync)| {
        thread::scope(|scope| {
            let runs: Vec<_> =
                (0..at_once).map(|n| scope.spawn(move || work(format!("t{n}")))).collect();
            runs.into_iter().try_for_each(|run| run.join().unwrap())
        })
    };
    each(&|id| {
        let script = format!("echo {id} > /tmp/me; while :; do sleep 1; done");
        containerd.run_detached(Runtime::wanted(), &[], &id, &script)
    })?;
    let list = containerd.ctr(&["tasks", "ls"])?.expect(0)?.text();
    ensure!(list.matches("RUNNING").count() == at_once, "{list}");
    each(&|id| {
        let said = containerd.exec(&id, "cat /tmp/me")?.expect(0)?.text();
        ensure!(said.trim() == id, "{said}");
        containerd.remove(&id)
    })
}

fn many_come_and_go(containerd: &mut Containerd) -> Result<()> {
    let (containerd, cycles) = (&*containerd, enough(CYCLES.0, CYCLES.1));
    let next = AtomicUsize::new(0);
    let started = Instant::now();
    let lane = || -> Result<()> {
        loop {
            let n = next.fetch_add(1, Ordering::Relaxed);
            if n >= cycles {
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
    println!("{cycles} in {:.1} s", started.elapsed().as_secs_f64());
    Ok(())
}
