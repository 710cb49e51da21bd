// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! `ecr-runtime` as an operator runs it.

#![allow(clippy::unwrap_used)] // Helpers too: a failed step is a failed test.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::thread;

use ecr_agent_protocol::client::AgentClient;
use ecr_shim::host::management::{self, ManagementState};
use tempfile::TempDir;

fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ecr-runtime"));
    command.env_remove("KATA_CONF_FILE").stdin(Stdio::null());
    command
}

fn run(arguments: &[&str]) -> Output {
    program().args(arguments).output().unwrap()
}

#[track_caller]
fn succeeds(arguments: &[&str]) -> String {
    let output = run(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[track_caller]
fn fails(arguments: &[&str]) -> String {
    let output = run(arguments);
    assert_eq!(output.status.code(), Some(1), "{arguments:?}");
    String::from_utf8(output.stderr).unwrap()
}

/// A configuration with the files that it names.
struct Site(TempDir);

impl Site {
    fn new(more: &str) -> Self {
        let site = Self(tempfile::tempdir().unwrap());
        for name in ["kernel", "image"] {
            fs::write(site.0.path().join(name), "content").unwrap();
        }
        let path = site.0.path().display();
        let text = format!(
            "[hypervisor.qemu]\nkernel = '{path}/kernel'\nimage = '{path}/image'\nvirtio_fs_daemon = '/bin/sh'\n{more}"
        );
        fs::write(site.0.path().join("configuration.toml"), text).unwrap();
        site
    }

    fn config(&self) -> String {
        self.0.path().join("configuration.toml").display().to_string()
    }
}

#[test]
fn the_version_has_three_lines() {
    let text = succeeds(&["version"]);
    assert_eq!(text, succeeds(&["--version"]));
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines[0], concat!("ecr-runtime  : ", env!("CARGO_PKG_VERSION")));
    assert!(lines[1].starts_with("   commit   : ") && lines[2].starts_with("   OCI specs: 1."));
}

#[test]
fn without_a_command_usage_is_shown() {
    let text = succeeds(&[]);
    for word in ["Usage:", "version", "check", "env", "config", "exec", "metrics"] {
        assert!(text.contains(word), "{word}: {text}");
    }
    assert_eq!(run(&["no-such-command"]).status.code(), Some(2));
}

#[test]
fn paths_of_configuration_files_are_shown() {
    let text = succeeds(&["--show-default-config-paths"]);
    assert_eq!(text, "/etc/ecr/configuration.toml\n/usr/share/defaults/ecr/configuration.toml\n");
}

#[test]
fn the_effective_configuration_is_shown_with_origins() {
    let site = Site::new("default_vcpus = 0\nrootless = true\n");
    let config = fs::canonicalize(site.config()).unwrap();
    let output = run(&["config", "--config", &site.config()]);
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains(&format!("default_vcpus = 1 # {}:5; asked for: 0\n", config.display())));
    assert!(text.contains("memory_slots = 10 # default\n"), "{text}");
    let warning = String::from_utf8(output.stderr).unwrap();
    assert!(warning.contains("rootless = true is not honoured yet"), "{warning}");
    assert!(
        !succeeds(&["--kata-config", &site.config(), "config", "--changed"])
            .contains("memory_slots")
    );

    let output = program().arg("config").env("KATA_CONF_FILE", site.config()).output().unwrap();
    assert!(output.status.success());
}

#[test]
fn an_unusable_configuration_is_an_error() {
    let site = Site::new("default_vcpus = 'two'\n");
    let error = fails(&["config", "--config", &site.config()]);
    assert!(error.starts_with("ERROR: "), "{error}");
    assert!(
        error.contains("configuration.toml:5: hypervisor.qemu.default_vcpus: expected"),
        "{error}"
    );
    let error = fails(&["env", "--config", "/no/such/file"]);
    assert_eq!(error, "ERROR: file /no/such/file does not exist\n");

    // What is in effect is shown even where a file is missing.
    let site = Site::new("");
    fs::remove_file(site.0.path().join("kernel")).unwrap();
    let output = run(&["config", "--config", &site.config()]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8(output.stdout).unwrap().contains("kernel = "));
    assert!(String::from_utf8(output.stderr).unwrap().contains("does not exist"));
}

#[test]
fn the_environment_is_a_document() {
    let site = Site::new("default_maxvcpus = 1\nenable_debug = true\n");
    let text = succeeds(&["env", "--json", "--config", &site.config()]);
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(json["Meta"]["Version"], "1.0.26");
    assert_eq!(json["Runtime"]["Version"]["Version"]["Semver"], env!("CARGO_PKG_VERSION"));
    assert_eq!(json["Hypervisor"]["SharedFS"], "virtio-fs");
    assert_eq!(json["Hypervisor"]["Debug"], true);
    assert!(json["Kernel"]["Parameters"].as_str().unwrap().contains("nr_cpus=1"), "{json}");
    assert!(json["Host"]["Memory"]["Total"].as_u64().unwrap() > 0);

    let text = succeeds(&["kata-env", "--config", &site.config()]);
    let toml: toml::Table = toml::from_str(&text).unwrap();
    assert_eq!(serde_json::to_value(&toml).unwrap()["Image"], json["Image"]);
    assert!(text.starts_with("[Meta]\n"), "{text}");
}

/// Whichever way it ends, it says so, and why.
#[test]
fn a_check_comes_to_a_conclusion() {
    let site = Site::new("");
    let output = run(&["check", "--verbose", "-n", "--config", &site.config()]);
    let stdout = String::from_utf8(output.stdout).unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(stdout.contains(&format!(
        "ok: configuration: {}",
        fs::canonicalize(site.config()).unwrap().display()
    )));
    assert!(stdout.contains("ok: virtiofsd: /bin/sh"), "{stdout}");
    if output.status.success() {
        assert!(stdout.contains("System is capable of running Kata Containers\n"), "{stdout}");
        assert!(stdout.contains("System can currently create Kata Containers\n"), "{stdout}");
    } else {
        assert_eq!(output.status.code(), Some(1));
        assert!(stderr.lines().filter(|line| line.starts_with("ERROR: ")).count() >= 2, "{stderr}");
    }
    let error = fails(&["kata-check", "--config", "/no/such/file"]);
    assert!(error.contains("ERROR: configuration: file /no/such/file does not exist"), "{error}");
    assert!(
        error.ends_with("ERROR: System is not capable of running Kata Containers\n"),
        "{error}"
    );
    assert!(fails(&["check", "--check-version-only"]).contains("no list of releases"));
}

struct FakeSandbox(String);

impl ManagementState for FakeSandbox {
    fn agent_url(&self) -> String {
        self.0.clone()
    }
    fn agent(&self) -> Option<AgentClient> {
        None
    }
    fn virtiofsd(&self) -> Option<u32> {
        None
    }
    fn netns(&self) -> Option<PathBuf> {
        None
    }
}

/// A sandbox `s1` whose agent is at a multiplexer played by the test.
struct Sandbox {
    root: TempDir,
    console: UnixListener,
    _runtime: tokio::runtime::Runtime,
}

impl Sandbox {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("s1")).unwrap();
        let console = UnixListener::bind(root.path().join("hv.sock")).unwrap();
        let url = format!("hvsock://{}:1024", root.path().join("hv.sock").display());
        let socket = management::socket_path(root.path(), "s1").unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let listener = runtime.block_on(async { tokio::net::UnixListener::bind(socket).unwrap() });
        runtime.spawn(management::serve(listener, Arc::new(FakeSandbox(url))));
        Self { root, console, _runtime: runtime }
    }

    fn root(&self) -> &str {
        self.root.path().to_str().unwrap()
    }
}

#[test]
fn metrics_are_those_of_the_shim() {
    let sandbox = Sandbox::new();
    let text = succeeds(&["metrics", "s1", "--root", sandbox.root()]);
    assert!(text.lines().any(|line| line.starts_with("kata_shim_threads ")), "{text}");
    let error = fails(&["metrics", "s2", "--root", sandbox.root()]);
    assert!(error.contains("ask the shim of sandbox s2 for /metrics"), "{error}");
    assert!(error.contains("is the sandbox running?"), "{error}");
    assert!(
        fails(&["metrics", "../s1", "--root", sandbox.root()]).contains("is no name of a sandbox")
    );
}

#[test]
fn a_console_copies_both_ways_to_the_end_of_each() {
    let sandbox = Sandbox::new();
    let guest = sandbox.console.try_clone().unwrap();
    let guest = thread::spawn(move || {
        let mut stream = BufReader::new(guest.accept().unwrap().0);
        let mut greeting = String::new();
        stream.read_line(&mut greeting).unwrap();
        stream.get_mut().write_all(b"OK 1\nready\n").unwrap();
        // Only the end of the operator's input ends this.
        let mut said = String::new();
        stream.read_to_string(&mut said).unwrap();
        stream.get_mut().write_all(format!("you said {said}").as_bytes()).unwrap();
        greeting
    });
    let mut child = program()
        .args(["--root", sandbox.root(), "exec", "--kata-debug-port", "77", "s1"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"hello").unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "ready\nyou said hello");
    assert_eq!(guest.join().unwrap(), "CONNECT 77\n");
}

#[test]
fn a_console_that_is_not_there_names_the_key() {
    let sandbox = Sandbox::new();
    let guest = sandbox.console.try_clone().unwrap();
    // The guest's kernel refuses the port.
    let guest = thread::spawn(move || drop(guest.accept().unwrap()));
    let error = fails(&["exec", "s1", "--root", sandbox.root()]);
    assert!(error.contains("is debug_console_enabled set"), "{error}");
    guest.join().unwrap();
}

#[test]
fn a_terminal_is_raw_while_the_console_is_open_and_then_as_before() {
    use nix::sys::termios::{LocalFlags, tcgetattr};
    let pty = nix::pty::openpty(None, None).unwrap();
    let slave: OwnedFd = pty.slave;
    let before = tcgetattr(&slave).unwrap();
    assert!(before.local_flags.contains(LocalFlags::ICANON));

    let sandbox = Sandbox::new();
    let mut child = program()
        .args(["exec", "s1", "--root", sandbox.root()])
        .stdin(slave.try_clone().unwrap())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut stream = BufReader::new(sandbox.console.accept().unwrap().0);
    let mut greeting = String::new();
    stream.read_line(&mut greeting).unwrap();
    stream.get_mut().write_all(b"OK 1\n").unwrap();
    // Once a key arrives, unfinished line and all, the terminal is raw.
    let mut keyboard = fs::File::from(pty.master);
    let mut key = [0];
    while tcgetattr(&slave).unwrap().local_flags.contains(LocalFlags::ICANON) {
        thread::yield_now();
    }
    keyboard.write_all(&[3]).unwrap();
    stream.read_exact(&mut key).unwrap();
    assert_eq!(key, [3], "control-C is the guest's");
    drop(stream);
    assert!(child.wait().unwrap().success());
    assert_eq!(tcgetattr(slave.as_fd()).unwrap().local_flags, before.local_flags);
}

#[test]
fn messages_go_to_the_log() {
    let site = Site::new("[hypervisor.clh]\nx = 1\n");
    let log = site.0.path().join("log");
    let path = log.to_str().unwrap();
    succeeds(&["config", "--config", &site.config(), "--log", path]);
    succeeds(&["config", "--config", &site.config(), "--log", path, "--log-format", "json"]);
    let text = fs::read_to_string(&log).unwrap();
    assert!(text.contains("level=warn msg="), "{text}");
    assert!(text.contains("[hypervisor.clh] is passed over"), "{text}");
    let last: serde_json::Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    assert_eq!(last["level"], "warn");
}
