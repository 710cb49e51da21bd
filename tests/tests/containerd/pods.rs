// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Pods by CRI, as a kubelet makes them.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use ecr_tests::containerd::cri::cri::LinuxContainerResources;
use ecr_tests::containerd::cri::{ContainerSpec, Cri, PodSpec};
use ecr_tests::containerd::{Containerd, LIMIT, Runtime, only_ecr};

tests_on! {
    v1_6: V1_6, [
        two_containers_share_the_network, pods_and_host_reach_each_other, limits_can_be_changed,
    ];
    v1_7: V1_7, [
        two_containers_share_the_network, pods_and_host_reach_each_other, limits_can_be_changed,
        five_containers_come_and_go, files_and_names_are_the_pods, statistics_are_told,
        too_much_memory_ends_a_container, a_pods_processes_are_shim_and_virtiofsd,
    ];
    v2: V2, [
        two_containers_share_the_network, pods_and_host_reach_each_other, limits_can_be_changed,
        five_containers_come_and_go,
    ];
}

const SLEEP: &str = "trap 'exit 0' TERM; while :; do sleep 0.1; done";
const MIB: i64 = 1 << 20;

/// A pod named `name` that runs.
struct Pod {
    cri: Cri,
    spec: PodSpec,
    id: String,
}

impl Pod {
    fn run(containerd: &Containerd, name: &str) -> Result<Self> {
        let cri = containerd.cri(Runtime::wanted());
        let spec = PodSpec::new(name, containerd.scratch());
        let id = cri.run_pod(&spec)?;
        Ok(Self { cri, spec, id })
    }

    fn start(&self, container: &ContainerSpec) -> Result<String> {
        self.cri.run(&self.id, &self.spec, container)
    }

    fn remove(self) -> Result<()> {
        self.cri.remove_pod(&self.id)
    }
}

/// Runs `script` in the container again and again until it succeeds.
fn until_ok(cri: &Cri, container: &str, script: &str) -> Result<String> {
    let until = Instant::now() + LIMIT;
    loop {
        match cri.exec_ok(container, script) {
            Ok(said) => return Ok(said),
            Err(error) if Instant::now() > until => return Err(error),
            Err(_) => thread::sleep(Duration::from_millis(200)),
        }
    }
}

fn two_containers_share_the_network(containerd: &mut Containerd) -> Result<()> {
    let pod = Pod::run(containerd, "pair")?;
    let serve = "mkdir -p /var/www; echo it is $(hostname) > /var/www/index.html; \
                 exec httpd -f -p 8080 -h /var/www";
    let server = pod.start(&ContainerSpec::script("server", serve))?;
    let client = pod.start(&ContainerSpec::script("client", SLEEP))?;
    let said = until_ok(&pod.cri, &client, "wget -q -O - http://127.0.0.1:8080/index.html")?;
    ensure!(said == "it is pair\n", "{said}");
    // Each has a root file system of its own.
    let found = pod.cri.exec(&client, "test -e /var/www")?;
    ensure!(found.exit_code == 1, "the client sees the server's files");
    pod.cri.stop(&server, Duration::from_secs(1))?;
    pod.cri.remove(&server)?;
    ensure!(pod.cri.exec_ok(&client, "echo alive")? == "alive\n");
    pod.remove()
}

fn five_containers_come_and_go(containerd: &mut Containerd) -> Result<()> {
    let pod = Pod::run(containerd, "five")?;
    let containers = (0..5)
        .map(|n| {
            pod.start(&ContainerSpec::script(
                &format!("c{n}"),
                &format!("echo {n} > /tmp/n; {SLEEP}"),
            ))
        })
        .collect::<Result<Vec<String>>>()?;
    for (n, container) in containers.iter().enumerate() {
        ensure!(until_ok(&pod.cri, container, "cat /tmp/n")?.trim() == n.to_string());
    }
    for container in &containers[..2] {
        pod.cri.stop(container, Duration::from_secs(10))?;
        ensure!(pod.cri.wait(container)? == 0);
        pod.cri.remove(container)?;
    }
    let again = pod.start(&ContainerSpec::script("again", "exit 9"))?;
    ensure!(pod.cri.wait(&again)? == 9);
    ensure!(pod.cri.exec_ok(&containers[4], "cat /tmp/n")? == "4\n");
    pod.remove()
}

/// Answers one connection with what came, and closes.
fn echo_once(listener: &TcpListener) -> Result<()> {
    let (mut stream, _) = listener.accept()?;
    let mut bytes = [0; 64];
    let length = stream.read(&mut bytes)?;
    Ok(stream.write_all(&bytes[..length])?)
}

fn pods_and_host_reach_each_other(containerd: &mut Containerd) -> Result<()> {
    let (one, two) = (Pod::run(containerd, "one")?, Pod::run(containerd, "two")?);
    let listen = "exec nc -ll -p 7777 -e cat";
    let _server = one.start(&ContainerSpec::script("listen", listen))?;
    let client = two.start(&ContainerSpec::script("client", SLEEP))?;
    let (address, other) = (one.cri.pod_ip(&one.id)?, two.cri.pod_ip(&two.id)?);
    ensure!(address != other && !address.is_empty(), "{address}, {other}");

    // From pod to pod.
    let talk =
        |host: &str, port: u16| format!("echo hello | nc -w 5 {host} {port} | grep -x hello");
    until_ok(&two.cri, &client, &talk(&address, 7777))?;
    // From the host to a pod.
    let mut stream = TcpStream::connect((address.as_str(), 7777))?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.write_all(b"hi pod\n")?;
    let mut answer = [0; 7];
    stream.read_exact(&mut answer)?;
    ensure!(&answer == b"hi pod\n");
    // From a pod to the host, which is its gateway.
    let listener = TcpListener::bind((containerd.gateway(), 0))?;
    let port = listener.local_addr()?.port();
    let server = thread::spawn(move || echo_once(&listener));
    two.cri.exec_ok(&client, &talk(containerd.gateway(), port))?;
    server.join().unwrap()?;
    // A megabyte, so that the ring of the network device goes round.
    let count = format!("head -c 1000000 /dev/zero | nc -w 5 {address} 7777 | wc -c");
    let said = two.cri.exec_ok(&client, &count)?;
    ensure!(said.trim() == "1000000", "{said}");
    one.remove()?;
    two.remove()
}

fn limits_can_be_changed(containerd: &mut Containerd) -> Result<()> {
    let pod = Pod::run(containerd, "limits")?;
    let limits = |memory: i64, quota: i64| LinuxContainerResources {
        memory_limit_in_bytes: memory * MIB,
        cpu_period: 100_000,
        cpu_quota: quota,
        ..Default::default()
    };
    let spec = ContainerSpec::script("c", SLEEP).resources(limits(64, 50_000));
    let container = pod.start(&spec)?;
    // Of cgroup v2, or of v1.
    let look = "cd /sys/fs/cgroup; cat memory.max cpu.max 2>/dev/null || \
                cat memory/memory.limit_in_bytes cpu/cpu.cfs_quota_us";
    let before = pod.cri.exec_ok(&container, look)?;
    ensure!(before.contains(&(64 * MIB).to_string()) && before.contains("50000"), "{before}");
    pod.cri.update(&container, limits(96, 70_000))?;
    let after = pod.cri.exec_ok(&container, look)?;
    ensure!(after.contains(&(96 * MIB).to_string()) && after.contains("70000"), "{after}");
    pod.remove()
}

fn statistics_are_told(containerd: &mut Containerd) -> Result<()> {
    let pod = Pod::run(containerd, "stats")?;
    let container = pod.start(&ContainerSpec::script("busy", "while :; do :; done"))?;
    let until = Instant::now() + LIMIT;
    loop {
        let stats = pod.cri.stats(&container)?;
        let cpu = stats.cpu.usage_core_nano_seconds.value;
        let memory = stats.memory.working_set_bytes.value;
        if cpu > 100_000_000 && memory > 0 {
            break;
        }
        ensure!(Instant::now() < until, "CPU {cpu} ns, memory {memory} bytes of a busy container");
    }
    pod.remove()
}

fn too_much_memory_ends_a_container(containerd: &mut Containerd) -> Result<()> {
    let pod = Pod::run(containerd, "oom")?;
    let limits = LinuxContainerResources { memory_limit_in_bytes: 24 * MIB, ..Default::default() };
    // tail keeps a line that never ends.
    let spec = ContainerSpec::script("eater", "exec tail /dev/zero").resources(limits);
    let container = pod.start(&spec)?;
    ensure!(pod.cri.wait(&container)? == 137);
    let status = pod.cri.status(&container)?;
    ensure!(status.reason == "OOMKilled", "reason {:?}: {}", status.reason, status.message);
    pod.remove()
}

fn files_and_names_are_the_pods(containerd: &mut Containerd) -> Result<()> {
    let pod = Pod::run(containerd, "names")?;
    let files = containerd.scratch().join("files");
    fs::create_dir_all(files.join("deep"))?;
    fs::write(files.join("deep/file"), "from the host\n")?;
    fs::write(files.join("single"), "one file\n")?;
    let spec = ContainerSpec::script("c", SLEEP)
        .mount(&files, "/ro", true)
        .mount(&files, "/rw", false)
        .mount(&files.join("single"), "/etc/single", true);
    let (one, two) = (pod.start(&spec)?, pod.start(&ContainerSpec::script("d", SLEEP))?);
    let run = |script: &str| pod.cri.exec_ok(&one, script);
    ensure!(run("cat /ro/deep/file /etc/single")? == "from the host\none file\n");
    ensure!(run("touch /ro/new 2>&1 || true")?.contains("Read-only file system"));
    run("echo from inside > /rw/new")?;
    ensure!(fs::read_to_string(files.join("new"))? == "from inside\n");
    ensure!(run("hostname")? == "names\n");
    ensure!(run("cat /etc/hostname")? == "names\n");
    ensure!(run("cat /etc/resolv.conf")?.contains("192.0.2.53"));
    ensure!(run("cat /etc/hosts")?.contains("localhost"));
    // Shared memory is the pod's.
    run("echo shared > /dev/shm/note; stat -f -c %T /dev/shm | grep -x tmpfs")?;
    ensure!(pod.cri.exec_ok(&two, "cat /dev/shm/note")? == "shared\n");
    pod.remove()
}

fn a_pods_processes_are_shim_and_virtiofsd(containerd: &mut Containerd) -> Result<()> {
    only_ecr()?;
    let pod = Pod::run(containerd, "two-processes")?;
    pod.start(&ContainerSpec::script("one", SLEEP))?;
    pod.start(&ContainerSpec::script("two", SLEEP))?;
    let processes = containerd.processes_of(&pod.id);
    let mut programs: Vec<&str> = processes.iter().map(|p| p.program.as_str()).collect();
    programs.sort_unstable();
    programs.dedup();
    println!("{processes:#?}");
    ensure!(programs.len() == 2, "{programs:?}");
    ensure!(programs[1] == "virtiofsd", "{programs:?}");
    let (_, info) = pod.cri.pod_status(&pod.id)?;
    let info = info.get("info").context("no verbose status")?;
    let info: serde_json::Value = serde_json::from_str(info)?;
    let Some(pid) = info["pid"].as_u64() else { bail!("no pid in {info}") };
    let shim = processes.iter().find(|process| u64::from(process.pid) == pid);
    ensure!(
        shim.is_some_and(|shim| shim.program != "virtiofsd"),
        "the task's process {pid} is not the shim"
    );
    pod.remove()
}
