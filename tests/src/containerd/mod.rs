// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! A containerd of its own for a test: with its own root, state, socket and network, both runtimes (`runc` and ours),
//! and the images that are made on the spot.
//!
//! The testbed hands in the programs: `containerd-1.6`, `containerd-1.7` and `containerd-2` are Debian packages
//! unpacked, `containerd-shim-ecr-v2` is our shim. `ECR_TEST_RUNTIME=runc` runs the same tests with runc: then they are
//! tests of the tests.

pub mod command;
pub mod config;
pub mod cri;
mod ctr;
pub mod grpc;
pub mod image;
pub mod leaks;
mod process;

use std::env;
use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

use crate::place::Place;
use crate::skip::{Skipped, skip};
use config::Paths;
use cri::Cri;
use leaks::Holdings;
pub use process::HostProcess;

/// For one command of `ctr`, in an emulated host.
pub const LIMIT: Duration = Duration::from_secs(600);
/// For containerd to come up.
const START_LIMIT: Duration = Duration::from_secs(60);
/// Our shim, by the name that containerd looks for, and that it starts itself again with.
const SHIM: &str = "containerd-shim-ecr-v2";
/// Lines of the log that a failure shows.
const LOG_LINES: usize = 150;

/// Which containerd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// Debian 12's.
    V1_6,
    /// Debian 13's.
    V1_7,
    /// The newest that Debian has.
    V2,
}

impl Version {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::V1_6, Self::V1_7, Self::V2];

    /// The name under which the testbed hands it in.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::V1_6 => "containerd-1.6",
            Self::V1_7 => "containerd-1.7",
            Self::V2 => "containerd-2",
        }
    }
}

/// Which runtime.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Runtime {
    /// The host's runc.
    Runc,
    /// Ours.
    Ecr,
}

impl Runtime {
    /// The one that tests are to run with.
    #[must_use]
    pub fn wanted() -> Self {
        match env::var("ECR_TEST_RUNTIME") {
            Ok(name) if name == "runc" => Self::Runc,
            _ => Self::Ecr,
        }
    }

    /// The runtime's type, for `ctr`.
    #[must_use]
    pub fn kind(self) -> &'static str {
        match self {
            Self::Runc => "io.containerd.runc.v2",
            Self::Ecr => "io.containerd.ecr.v2",
        }
    }

    /// The runtime's handler, for CRI.
    #[must_use]
    pub fn handler(self) -> &'static str {
        match self {
            Self::Runc => "runc",
            Self::Ecr => "ecr",
        }
    }
}

/// A running containerd. Dropping it ends it and removes all that is its own.
#[derive(Debug)]
pub struct Containerd {
    version: Version,
    place: Place,
    paths: Paths,
    bridge: String,
    process: Child,
    /// Held for its files.
    _directory: TempDir,
}

impl Containerd {
    /// Starts one and imports the images. `None`: this version was not handed in.
    ///
    /// # Errors
    /// A program is missing, or containerd does not come up; the error shows its log.
    pub fn start(version: Version) -> Result<Option<Self>> {
        let place = Place::from_environment()?;
        if !place.file(version.name()).exists() {
            return Ok(None);
        }
        // Not on a tmpfs: overlay's upper directory and what containerd keeps belong on a disk.
        let directory = tempfile::Builder::new().prefix("ecr-ctr-").tempdir_in("/var/tmp")?;
        let paths = Paths::below(directory.path());
        let bridge = format!("ecr-{}", std::process::id());
        prepare(version, &place, &paths, &bridge)?;
        let process = spawn(version, &place, &paths)?;
        let containerd = Self { version, place, paths, bridge, process, _directory: directory };
        containerd.wait_until_up()?;
        let archive = containerd.paths.directory.join("images.tar");
        image::write_archive(&archive)?;
        for namespace in ["default", "k8s.io"] {
            let archive = archive.display().to_string();
            let import = ["-n", namespace, "images", "import", &archive];
            containerd.ctr(&import)?.expect(0)?;
        }
        fs::remove_file(archive)?;
        Ok(Some(containerd))
    }

    fn wait_until_up(&self) -> Result<()> {
        let until = Instant::now() + START_LIMIT;
        let cri = self.cri(Runtime::Runc);
        loop {
            // Before the socket is there, that is the answer; CRI comes up last of all.
            match cri.not_ready() {
                Ok(bad) if bad.is_empty() => return Ok(()),
                answer if Instant::now() > until => {
                    bail!("containerd is not up after {START_LIMIT:?}: {answer:?}\n{}", self.log())
                }
                _ => std::thread::sleep(Duration::from_millis(50)),
            }
        }
    }

    /// Which one it is.
    #[must_use]
    pub fn version(&self) -> Version {
        self.version
    }

    /// Where everything is.
    #[must_use]
    pub fn paths(&self) -> &Paths {
        &self.paths
    }

    /// Where programs and guest files are.
    #[must_use]
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// A directory for a test's files.
    #[must_use]
    pub fn scratch(&self) -> &Path {
        &self.paths.directory
    }

    /// The host's address in the pods' network.
    #[must_use]
    pub fn gateway(&self) -> &'static str {
        "198.18.77.1"
    }

    /// containerd's own process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// A client of its CRI service, for pods of this runtime.
    #[must_use]
    pub fn cri(&self, runtime: Runtime) -> Cri {
        Cri::new(&self.paths.socket, runtime.handler())
    }

    /// The host's processes of the sandbox or container `id`: its shim, and what that has started.
    #[must_use]
    pub fn processes_of(&self, id: &str) -> Vec<HostProcess> {
        let all = HostProcess::all();
        let is_shim =
            |p: &&HostProcess| p.words.contains("containerd-shim") && p.words.contains(id);
        let mut found: Vec<HostProcess> = all.iter().filter(is_shim).cloned().collect();
        let mut at = 0;
        while at < found.len() {
            let parent = found[at].pid;
            found.extend(all.iter().filter(|process| process.parent == parent).cloned());
            at += 1;
        }
        found
    }

    /// What it may be blamed for now.
    ///
    /// # Errors
    /// The system does not say.
    pub fn holdings(&self) -> Result<Holdings> {
        let mut network = Command::new("/usr/sbin/ip");
        // The plugin makes the bridge when the first pod comes, and leaves it.
        network.args(["link", "add", &self.bridge, "type", "bridge"]).stderr(Stdio::null());
        network.status().context("run ip (Debian: iproute2)")?;
        // It has a qdisc only while it is up.
        Command::new("/usr/sbin/ip").args(["link", "set", &self.bridge, "up"]).status()?;
        Holdings::now(&self.paths, self.pid())
    }

    /// Waits until all is gone that was not there `before`.
    ///
    /// # Errors
    /// Something stays; the error lists it.
    pub fn leaves_nothing(&self, before: &Holdings) -> Result<()> {
        before.wait_for_no_more(&self.paths, self.pid())
    }

    /// Ends containerd, leaving shims and containers alone, and starts it again.
    ///
    /// # Errors
    /// It does not come up again.
    pub fn restart(&mut self) -> Result<()> {
        self.terminate();
        self.process = spawn(self.version, &self.place, &self.paths)?;
        self.wait_until_up()
    }

    fn terminate(&mut self) {
        if let Some(pid) = rustix::process::Pid::from_raw(self.process.id().cast_signed()) {
            // It may have ended already.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        let until = Instant::now() + Duration::from_secs(10);
        while matches!(self.process.try_wait(), Ok(None)) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
    }

    /// The end of containerd's log, in which shims' logs are too.
    #[must_use]
    pub fn log(&self) -> String {
        let text = self.whole_log();
        let lines: Vec<&str> = text.lines().collect();
        let end = lines[lines.len().saturating_sub(LOG_LINES)..].join("\n");
        format!("---- end of containerd's log ----\n{end}\n----")
    }

    /// All of containerd's log.
    #[must_use]
    pub fn whole_log(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.paths.directory.join("log")).unwrap_or_default())
            .into_owned()
    }

    /// Removes what a failed test has left.
    fn clean_up(&self) {
        let cri = self.cri(Runtime::wanted());
        for pod in cri.pods().unwrap_or_default() {
            let _ = cri.remove_pod(&pod);
        }
        let tasks = self.ctr(&["tasks", "ls", "-q"]).map(|list| list.text()).unwrap_or_default();
        for id in tasks.lines() {
            let _ = self.ctr(&["tasks", "rm", "-f", id]);
        }
        for namespace in ["default", "k8s.io"] {
            let of = |what: &str| self.ctr(&["-n", namespace, what, "ls", "-q"]);
            for id in of("containers").map(|list| list.text()).unwrap_or_default().lines() {
                let _ = self.ctr(&["-n", namespace, "containers", "rm", id]);
            }
        }
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        self.clean_up();
        self.terminate();
        let delete = ["link", "del", &self.bridge];
        // It is there only if something needed it.
        let _ = Command::new("/usr/sbin/ip").args(delete).stderr(Stdio::null()).status();
    }
}

fn prepare(version: Version, place: &Place, paths: &Paths, bridge: &str) -> Result<()> {
    for directory in [&paths.root, &paths.state, &paths.cni, &paths.directory.join("bin")] {
        fs::create_dir_all(directory)?;
    }
    fs::write(paths.cni.join("10-ecr-tests.conflist"), config::network(bridge, paths))?;
    fs::write(paths.directory.join("config.toml"), config::containerd(version, paths))?;
    fs::write(&paths.ecr, config::ecr(place, &[]))?;
    let shim = place.file(SHIM);
    if shim.exists() {
        symlink(shim, paths.directory.join("bin").join(SHIM))?;
    }
    if version != Version::V1_6 {
        make_scratch(&paths.empty_ext4)?;
    }
    Ok(())
}

/// The blockfile snapshotter copies this file for each snapshot; without a journal, which would fill it.
fn make_scratch(path: &Path) -> Result<()> {
    File::create(path)?.set_len(32 << 20)?;
    let mut command = Command::new("/usr/sbin/mkfs.ext4");
    command.args(["-q", "-F", "-O", "^has_journal"]).arg(path);
    command::start(command, None)?.finish(LIMIT)?.expect(0)?;
    Ok(())
}

fn spawn(version: Version, place: &Place, paths: &Paths) -> Result<Child> {
    let programs: PathBuf = place.file(version.name()).join("usr/bin");
    let ours = paths.directory.join("bin");
    let log = File::options().create(true).append(true).open(paths.directory.join("log"))?;
    let path = format!(
        "{}:{}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        ours.display(),
        programs.display()
    );
    let mut command = Command::new(programs.join("containerd"));
    command
        .arg("--config")
        .arg(paths.directory.join("config.toml"))
        .env_clear()
        .env("PATH", path)
        .env("HOME", "/root")
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .process_group(0);
    if let Ok(debug) = env::var("ECR_TEST_LOG") {
        command.args(["--log-level", &debug]);
    }
    command.spawn().with_context(|| format!("start {}", version.name()))
}

/// Runs `body` with a containerd of its own and checks that nothing stays behind. Where this version was not handed in,
/// the test says so and counts as skipped.
///
/// # Errors
/// `body` failed, or something stays; the error shows containerd's log.
pub fn with_containerd(
    version: Version,
    body: impl FnOnce(&mut Containerd) -> Result<()>,
) -> Result<()> {
    let Some(mut containerd) = Containerd::start(version)? else {
        skip("this containerd cannot be had here");
    };
    let before = containerd.holdings()?;
    let result = body(&mut containerd).and_then(|()| containerd.leaves_nothing(&before));
    match result {
        Err(error) if error.is::<Skipped>() => {
            drop(containerd);
            skip(error);
        }
        result => result.with_context(|| containerd.log()),
    }
}

/// Fails as a skipped test where tests run with runc.
///
/// # Errors
/// They do.
pub fn only_ecr() -> Result<()> {
    match Runtime::wanted() {
        Runtime::Ecr => Ok(()),
        Runtime::Runc => Err(Skipped("runc has no virtual machine").into()),
    }
}
