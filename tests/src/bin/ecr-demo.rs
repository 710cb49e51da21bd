// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Containers in virtual machines, through a real containerd: one by `ctr`, then a pod of two by CRI.
//!
//! Started by `tools/dev demo`, which hands the files in. containerd, its images and its network are made for the
//! occasion and gone at the end.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ecr_tests::containerd::cri::{ContainerSpec, PodSpec};
use ecr_tests::containerd::{Containerd, Runtime, Version};

const PATIENCE: Duration = Duration::from_secs(60);

fn main() -> Result<()> {
    let containerd = Containerd::start(Version::V1_7)?
        .context("containerd was not handed in: start this through tools/dev demo")?;
    one_container(&containerd)
        .and_then(|()| pod_of_two(&containerd))
        .with_context(|| containerd.log())
}

fn say(text: &str) {
    println!("\n== {text}");
}

fn one_container(containerd: &Containerd) -> Result<()> {
    let host = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    say("one container, by ctr");
    println!("host's kernel:      {}", host.trim());
    println!(
        "$ ctr run --rm --runtime {} localhost/busybox:dev hello uname -a",
        Runtime::Ecr.kind()
    );
    let run = containerd.run(Runtime::Ecr, &[], "hello", "uname -a")?.expect(0)?;
    print!("{}", run.text());
    let text = run.text();
    let kernel = text.split_whitespace().nth(2).unwrap_or_default();
    ensure!(kernel != host.trim(), "the container runs on the host's kernel");
    println!(
        "container's kernel: {kernel}: the guest's own, not the host's ({:.1} s)",
        run.wall.as_secs_f64()
    );
    Ok(())
}

fn pod_of_two(containerd: &Containerd) -> Result<()> {
    say("a pod of two containers that share its network, by CRI");
    let cri = containerd.cri(Runtime::Ecr);
    let spec = PodSpec::new("demo", containerd.scratch());
    let started = Instant::now();
    let pod = cri.run_pod(&spec)?;
    println!(
        "pod {} runs at {} ({:.1} s)",
        &pod[..12],
        cri.pod_ip(&pod)?,
        started.elapsed().as_secs_f64()
    );

    let serve = "mkdir -p /www; echo \"hello from $(hostname), Linux $(uname -r)\" > /www/index.html; \
                 exec httpd -f -p 8080 -h /www";
    cri.run(&pod, &spec, &ContainerSpec::script("server", serve))?;
    println!("container server: httpd on port 8080");
    let client = cri.run(&pod, &spec, &ContainerSpec::script("client", "sleep 1000"))?;
    println!("container client: wget http://127.0.0.1:8080/");
    let fetch = "wget -q -O - http://127.0.0.1:8080/index.html";
    let said = loop {
        match cri.exec_ok(&client, fetch) {
            Ok(said) => break said,
            Err(error) if started.elapsed() > PATIENCE => return Err(error),
            Err(_) => std::thread::sleep(Duration::from_millis(100)),
        }
    };
    print!("{said}");
    println!("on the host, all of the pod is:");
    for process in containerd.processes_of(&pod) {
        println!("  {:>6} {}", process.pid, process.program);
    }
    cri.remove_pod(&pod)?;
    println!("pod removed ({:.1} s in all)", started.elapsed().as_secs_f64());
    Ok(())
}
