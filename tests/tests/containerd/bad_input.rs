// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What cannot work says why, in time, and leaves nothing behind.

use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ecr_tests::containerd::command::{Finished, start};
use ecr_tests::containerd::config::{self, DIAL_TIMEOUT};
use ecr_tests::containerd::cri::{ContainerSpec, PodSpec};
use ecr_tests::containerd::{Containerd, LIMIT, Runtime, only_ecr};
use ecr_tests::skip::Skipped;

tests_on! {
    v1_6: V1_6, [a_missing_kernel_is_named, a_guest_that_panics_says_so];
    v1_7: V1_7, [
        a_broken_configuration_is_shown, a_missing_kernel_is_named, annotations_need_permission,
        the_hosts_network_is_refused, a_network_namespace_must_be_there, interfaces_may_be_none_or_many,
        a_root_must_be_a_directory, three_hundred_mounts, what_is_over_is_over,
        an_agent_that_never_answers, an_agent_that_answers_nonsense, a_guest_that_panics_says_so,
        a_guest_may_panic_later,
    ];
    v2: V2, [a_missing_kernel_is_named, a_guest_that_panics_says_so];
}

/// Runs a container with our configuration changed by `lines`.
fn run_with(containerd: &Containerd, lines: &[&str], script: &str) -> Result<Finished> {
    run_with_text(containerd, &config::ecr(containerd.place(), lines), script)
}

fn run_with_text(containerd: &Containerd, text: &str, script: &str) -> Result<Finished> {
    let path = containerd.scratch().join("other.toml");
    fs::write(&path, text)?;
    let path = path.display().to_string();
    containerd.run(Runtime::Ecr, &["--runtime-config-path", &path], "t1", script)
}

fn refused(run: &Finished, words: &[&str]) -> Result<()> {
    ensure!(run.code != 0, "it should not have worked: {run}");
    let said = run.errors();
    for word in words {
        ensure!(said.contains(word), "{word:?} is not in: {said}");
    }
    println!("as it should be: {}", said.trim());
    Ok(())
}

fn a_broken_configuration_is_shown(containerd: &mut Containerd) -> Result<()> {
    only_ecr()?;
    let run = run_with_text(containerd, "[hypervisor.ecr]\nkernel = = 1\n", "true")?;
    refused(&run, &["other.toml", "2"])?;
    refused(&run_with(containerd, &["default_memory = \"much\""], "true")?, &["default_memory"])?;
    let missing = ["--runtime-config-path", "/no/such/file.toml"];
    let run = containerd.run(Runtime::Ecr, &missing, "t1", "true")?;
    refused(&run, &["/no/such/file.toml"])
}

fn a_missing_kernel_is_named(containerd: &mut Containerd) -> Result<()> {
    only_ecr()?;
    for line in [
        "kernel = \"/no/such/kernel\"",
        "image = \"/no/such/image\"",
        "virtio_fs_daemon = \"/no/such/virtiofsd\"",
    ] {
        let path = line.split('"').nth(1).unwrap();
        refused(&run_with(containerd, &[line], "true")?, &[path])?;
    }
    // A file that is no kernel.
    refused(&run_with(containerd, &["kernel = \"/etc/passwd\""], "true")?, &["/etc/passwd"])
}

fn annotations_need_permission(containerd: &mut Containerd) -> Result<()> {
    only_ecr()?;
    let cri = containerd.cri(Runtime::Ecr);
    let key = |name: &str| format!("io.katacontainers.config.hypervisor.{name}");
    let spec =
        PodSpec::new("refused", containerd.scratch()).annotation(&key("kernel"), "/etc/passwd");
    let error = cri.run_pod(&spec).err().context("the annotation was obeyed")?.to_string();
    ensure!(error.contains("is not enabled") && error.contains("kernel"), "{error}");
    let spec =
        PodSpec::new("wrong", containerd.scratch()).annotation(&key("default_memory"), "lots");
    let error = cri.run_pod(&spec).err().context("no number, but obeyed")?.to_string();
    ensure!(error.contains("default_memory"), "{error}");
    // And with permission it counts.
    let spec = PodSpec::new("more", containerd.scratch()).annotation(&key("default_memory"), "400");
    let pod = cri.run_pod(&spec)?;
    let look = "grep MemTotal /proc/meminfo; sleep 1000";
    let container = cri.run(&pod, &spec, &ContainerSpec::script("c", look))?;
    let said = cri.exec_ok(&container, "grep MemTotal /proc/meminfo")?;
    let digits: String = said.chars().filter(char::is_ascii_digit).collect();
    ensure!(digits.parse::<u64>()? > 300 * 1024, "{said}");
    cri.remove_pod(&pod)
}

fn the_hosts_network_is_refused(containerd: &mut Containerd) -> Result<()> {
    only_ecr()?;
    let cri = containerd.cri(Runtime::Ecr);
    let spec = PodSpec::new("host", containerd.scratch()).host_network();
    let error = cri.run_pod(&spec).err().context("it runs")?.to_string();
    ensure!(error.contains("Host networking requested, not supported by runtime"), "{error}");
    Ok(())
}

/// Runs ip(8), which must succeed.
fn ip(words: &str) -> Result<()> {
    let mut command = Command::new("/usr/sbin/ip");
    command.args(words.split_whitespace());
    start(command, None)?.finish(LIMIT)?.expect(0).map(drop)
}

/// A network namespace that is gone with this.
struct Netns(&'static str);

impl Netns {
    fn add(name: &'static str) -> Result<Self> {
        ip(&format!("netns add {name}"))?;
        Ok(Self(name))
    }

    fn option(&self) -> String {
        format!("network:/run/netns/{}", self.0)
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        // What is left of it is the leak check's business.
        let _ = ip(&format!("netns del {}", self.0));
    }
}

fn a_network_namespace_must_be_there(containerd: &mut Containerd) -> Result<()> {
    let options = ["--with-ns", "network:/run/netns/no-such"];
    let run = containerd.run(Runtime::wanted(), &options, "t1", "true")?;
    refused(&run, &["/run/netns/no-such"])
}

fn interfaces_may_be_none_or_many(containerd: &mut Containerd) -> Result<()> {
    let netns = Netns::add("ecr-test")?;
    let option = netns.option();
    let options = ["--with-ns", option.as_str()];
    let count = "ls /sys/class/net | grep -vc -e '^lo$' -e '^sit' -e '^tunl' || true";
    let said = containerd.run(Runtime::wanted(), &options, "t1", count)?.expect(0)?.text();
    ensure!(said.trim() == "0", "{said}");
    // One, by hand.
    ip("link add ecr-out type veth peer name eth0 netns ecr-test")?;
    ip("-n ecr-test addr add 198.18.99.2/24 dev eth0")?;
    ip("-n ecr-test link set eth0 up")?;
    let look = "ip -4 -o addr show | grep -c 198.18.99.2";
    let said = containerd.run(Runtime::wanted(), &options, "t2", look)?.expect(0)?.text();
    ensure!(said.trim() == "1", "{said}");
    // More than a machine has room for: either it works, or it says so.
    // Those without an address would not count.
    let (mut outside, mut inside) = (String::new(), String::new());
    for n in 1..64 {
        outside
            .push_str(&format!("link add ecr-out{n} type veth peer name eth{n} netns ecr-test\n"));
        inside.push_str(&format!(
            "addr add 198.18.{}.2/24 dev eth{n}\nlink set eth{n} up\n",
            100 + n
        ));
    }
    let batch = containerd.scratch().join("batch");
    for (options, lines) in [("", outside), ("-n ecr-test ", inside)] {
        fs::write(&batch, lines)?;
        ip(&format!("{options}-batch {}", batch.display()))?;
    }
    let run = containerd.run(Runtime::wanted(), &options, "t3", count)?;
    if run.code == 0 {
        ensure!(run.text().trim() == "64", "{run}");
    } else {
        refused(&run, &["network"])?;
    }
    drop(netns);
    // The other ends go with their peers, a moment later.
    Ok(())
}

fn a_root_must_be_a_directory(containerd: &mut Containerd) -> Result<()> {
    let file = containerd.scratch().join("no-directory");
    fs::write(&file, "x")?;
    let (file, config) = (file.display().to_string(), containerd.paths().ecr.display().to_string());
    let mut words = vec!["run", "--rm", "--runtime", Runtime::wanted().kind()];
    if Runtime::wanted() == Runtime::Ecr {
        words.extend(["--runtime-config-path", &config]);
    }
    words.extend(["--rootfs", &file, "t1", "/bin/true"]);
    let run = containerd.ctr(&words)?;
    ensure!(run.code != 0 && !run.errors().is_empty(), "{run}");
    println!("as it should be: {}", run.errors().trim());
    Ok(())
}

fn three_hundred_mounts(containerd: &mut Containerd) -> Result<()> {
    let files = containerd.scratch().join("mounts");
    let mut options = Vec::new();
    for n in 0..300 {
        let directory = files.join(n.to_string());
        fs::create_dir_all(&directory)?;
        fs::write(directory.join("n"), format!("{n}\n"))?;
        options.push("--mount".to_owned());
        options.push(format!("type=bind,src={},dst=/m/{n},options=rbind:ro", directory.display()));
    }
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let script = "cat /m/*/n | wc -l; cat /m/299/n";
    let said = containerd.run(Runtime::wanted(), &options, "t1", script)?.expect(0)?.text();
    ensure!(said == "300\n299\n", "{said}");
    Ok(())
}

fn what_is_over_is_over(containerd: &mut Containerd) -> Result<()> {
    let runtime = Runtime::wanted();
    containerd.run_detached(runtime, &[], "t1", "sleep 1000")?;
    let again = containerd.ctr(&["tasks", "start", "t1"])?;
    ensure!(again.code != 0, "started twice: {again}");
    let second =
        start(containerd.run_command(runtime, &["-d"], "t1", "true"), None)?.finish(LIMIT)?;
    refused(&second, &["already exists"])?;
    let running = containerd.ctr(&["tasks", "rm", "t1"])?;
    ensure!(running.code != 0, "a running task was removed: {running}");
    containerd.ctr(&["tasks", "kill", "-s", "SIGKILL", "t1"])?.expect(0)?;
    containerd.wait_for_state("t1", Some("STOPPED"))?;
    let exec = containerd.exec("t1", "true")?;
    ensure!(exec.code != 0 && !exec.errors().is_empty(), "exec in a stopped container: {exec}");
    ensure!(containerd.remove_task("t1")? == 137);
    let gone = containerd.ctr(&["tasks", "rm", "t1"])?;
    ensure!(gone.errors().contains("not found"), "{gone}");
    containerd.ctr(&["containers", "rm", "t1"])?.expect(0)?;
    let id = containerd.run(runtime, &[], "no/such/../id", "true")?;
    ensure!(id.code != 0 && !id.errors().is_empty(), "{id}");
    Ok(())
}

/// A container whose guest has these kernel parameters is refused for its agent's sake, soon after the deadline.
fn refused_for_the_agent(containerd: &Containerd, kernel_params: &str, why: &str) -> Result<()> {
    let line = format!("kernel_params = \"{kernel_params}\"");
    let text = config::ecr(containerd.place(), &[&line])
        .replace(&format!("dial_timeout = {DIAL_TIMEOUT}"), "dial_timeout = 12");
    let run = run_with_text(containerd, &text, "true")?;
    refused(&run, &["boot the guest", "after 12 s", why])?;
    ensure!(run.wall < Duration::from_secs(60), "it took {:?}", run.wall);
    Ok(())
}

fn an_agent_that_never_answers(containerd: &mut Containerd) -> Result<()> {
    only_ecr()?;
    // A shell that waits for input is up, but no agent.
    refused_for_the_agent(containerd, "init=/bin/sh", "Connection reset")
}

fn an_agent_that_answers_nonsense(containerd: &mut Containerd) -> Result<()> {
    only_ecr()?;
    // A shell answers where the agent should.
    let shell = "agent.server_addr=vsock://-1:2000 agent.debug_console_vport=1024";
    refused_for_the_agent(containerd, shell, "connected, but nobody answers as an agent does")
}

fn a_guest_that_panics_says_so(containerd: &mut Containerd) -> Result<()> {
    only_ecr()?;
    for parameters in ["root=/dev/nothing", "init=/no/such/init"] {
        let line = format!("kernel_params = \"{parameters}\"");
        refused(&run_with(containerd, &[&line], "true")?, &["panic"])?;
    }
    Ok(())
}

fn a_guest_may_panic_later(containerd: &mut Containerd) -> Result<()> {
    only_ecr()?;
    let script = "test -w /proc/sysrq-trigger || exit 5; echo c > /proc/sysrq-trigger; sleep 1000";
    let run = containerd.run(Runtime::Ecr, &["--privileged"], "t1", script)?;
    ensure!(run.code != 0, "{run}");
    if run.code == 5 {
        return Err(Skipped("the guest's kernel has no SysRq").into());
    }
    ensure!(containerd.whole_log().contains("panic"), "the log does not say why: {run}");
    Ok(())
}
