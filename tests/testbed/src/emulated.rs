// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! A host played by QEMU, booted when the first command needs it and again after it was lost.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Component, Path};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use rustix::event::{PollFd, PollFlags};
use rustix::termios::{OptionalActions, tcgetattr, tcgetwinsize, tcsetattr};
use tempfile::TempDir;

use crate::arch::{Arch, Gic};
use crate::exec::{CommandSpec, Ending};
use crate::files::{
    self, COLLECT_DIRECTORY, COLLECT_VARIABLE, FILES_DIRECTORY, FILES_VARIABLE, GivenFile,
};
use crate::host::{Host, Output};
use crate::image::Image;
use crate::init_program::write_initramfs;
use crate::interrupt::{Guard, Undo};
use crate::protocol::{FileHead, FromInit, ToInit};
use crate::qemu::{Machine, Qemu};

/// For the boot, on a machine that has much else to do.
const BOOT_LIMIT: Duration = Duration::from_secs(180);
/// What the host may take beyond a command's own limit, which it enforces itself, before it counts as hung.
const GRACE: Duration = Duration::from_secs(60);

/// The size and manner of the emulated host.
#[derive(Debug, Clone)]
pub struct Options {
    /// Which architecture to play.
    pub arch: Arch,
    /// Its interrupt controller on aarch64.
    pub gic: Gic,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Processors.
    pub cpus: u32,
    /// Print the host's console as it comes.
    pub show_console: bool,
}

/// An emulated host.
#[derive(Debug)]
pub struct Emulated {
    options: Options,
    given: Vec<GivenFile>,
    environment: Vec<(String, String)>,
    booted: Option<Booted>,
}

#[derive(Debug)]
struct Booted {
    qemu: Qemu,
    channel: UnixStream,
}

impl Emulated {
    /// A host that has not been booted yet.
    #[must_use]
    pub fn new(options: Options, given: &[GivenFile], environment: &[(String, String)]) -> Self {
        let mut environment = environment.to_vec();
        environment.push((FILES_VARIABLE.into(), FILES_DIRECTORY.into()));
        environment.push((COLLECT_VARIABLE.into(), COLLECT_DIRECTORY.into()));
        Self { options, given: given.to_vec(), environment, booted: None }
    }

    /// Boots the host if it is not up.
    fn up(&mut self) -> Result<&mut Booted> {
        if self.booted.is_none() {
            let booted = Booted::boot(&self.options, &self.given)?;
            self.booted = Some(booted);
        }
        self.booted.as_mut().context("the host has just been booted")
    }

    fn complete(&self, spec: &CommandSpec) -> CommandSpec {
        let mut spec = spec.clone();
        spec.env = self.environment.iter().cloned().chain(spec.env).collect();
        spec
    }

    /// Does `work` on a host that is up. When that fails for the channel's sake the host is lost: it is ended, and
    /// the error says what its console said last.
    fn with<T>(&mut self, work: impl FnOnce(&mut Booted) -> Result<T>) -> Result<T> {
        let result = work(self.up()?);
        match result {
            Err(error) if error.root_cause().is::<io::Error>() => {
                let last = self.booted.take().map(|mut booted| booted.qemu.end());
                Err(lost(&error, &last.unwrap_or_default()))
            }
            other => other,
        }
    }
}

fn lost(error: &anyhow::Error, console: &str) -> anyhow::Error {
    anyhow!("the emulated host was lost ({error:#}); its console ended with:\n{console}")
}

impl Host for Emulated {
    fn run(&mut self, spec: &CommandSpec, output: Output<'_>) -> Result<Ending> {
        let spec = self.complete(spec);
        self.with(|booted| {
            ToInit::Run(spec.clone()).send(&mut booted.channel)?;
            let deadline = spec.time_limit.map(|limit| Instant::now() + limit + GRACE);
            loop {
                match booted.receive(deadline)? {
                    FromInit::Output(stream, bytes) => output(stream, &bytes),
                    FromInit::Ended(ending) => return Ok(ending),
                    other => return unexpected(&other),
                }
            }
        })
    }

    fn run_on_terminal(&mut self, spec: &CommandSpec) -> Result<Ending> {
        let stdin = rustix::stdio::stdin();
        let size = tcgetwinsize(stdin).context("a shell needs a terminal on standard input")?;
        let mut spec = self.complete(spec);
        spec.terminal = Some((size.ws_row, size.ws_col));
        self.with(|booted| {
            ToInit::Run(spec).send(&mut booted.channel)?;
            let settings = tcgetattr(stdin)?;
            let _restored = Guard::new(Undo::Terminal(Box::new(settings.clone())));
            let mut raw = settings;
            raw.make_raw();
            tcsetattr(stdin, OptionalActions::Now, &raw)?;
            booted.converse()
        })
    }

    fn path_of(&self, file: &GivenFile) -> String {
        format!("{FILES_DIRECTORY}/{}", file.name)
    }

    fn collect(&mut self, to: &Path) -> Result<()> {
        if self.booted.is_none() {
            return Ok(()); // Nothing ran, or what ran was lost with its host.
        }
        self.with(|booted| booted.collect(to))
    }
}

impl Drop for Emulated {
    fn drop(&mut self) {
        // Nothing of its disk is kept, so there is nothing to shut down: QEMU's end comes with `Qemu`'s drop.
        self.booted = None;
    }
}

impl Booted {
    fn boot(options: &Options, given: &[GivenFile]) -> Result<Self> {
        let image = Image::get(options.arch)?;
        let scratch = tempfile::Builder::new().prefix("ecr-testbed-").tempdir()?;
        let _cleanup = Guard::new(Undo::Directory(scratch.path().to_owned()));
        let mut booted = Self::start(options, &image, given, &scratch)?;
        let started = Instant::now();
        let ready = match booted.receive(Some(started + BOOT_LIMIT)) {
            Ok(FromInit::Ready(report)) => report,
            Ok(other) => return unexpected(&other),
            Err(error) => return Err(lost(&error, &booted.qemu.end())),
        };
        eprintln!(
            "testbed: {} host with Linux {} is up after {:.1} s",
            options.arch,
            ready.kernel,
            started.elapsed().as_secs_f64()
        );
        for trouble in &ready.troubles {
            eprintln!("testbed: in the host, {trouble}");
        }
        // QEMU has every file open now, so `scratch` may go.
        Ok(booted)
    }

    fn start(
        options: &Options,
        image: &Image,
        given: &[GivenFile],
        scratch: &TempDir,
    ) -> Result<Self> {
        let (tree, disk) = (scratch.path().join("files"), scratch.path().join("files.ext4"));
        let initramfs = scratch.path().join("initramfs");
        fs::create_dir(&tree)?;
        files::make_disk(given, &tree, &disk)?;
        write_initramfs(options.arch, image, &initramfs)?;
        let (qemu, channel) = Qemu::start(&Machine {
            arch: options.arch,
            gic: options.gic,
            kernel: &image.kernel(),
            initramfs: &initramfs,
            root: &image.disk(),
            files: &disk,
            memory_mib: options.memory_mib,
            cpus: options.cpus,
            show_console: options.show_console,
            scratch: scratch.path(),
        })?;
        Ok(Self { qemu, channel })
    }

    /// The next message. A refused request is an error, but not of the channel.
    fn receive(&mut self, deadline: Option<Instant>) -> Result<FromInit> {
        let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
        if left == Some(Duration::ZERO) {
            return Err(io::Error::from(io::ErrorKind::TimedOut)).context("the host hangs");
        }
        self.channel.set_read_timeout(left)?;
        match FromInit::receive(&mut self.channel) {
            Ok(FromInit::Refused(why)) => bail!("{why}"),
            Ok(message) => Ok(message),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Err(e).context("the host hangs"),
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Err(e).context("QEMU ended"),
            Err(e) => Err(e.into()),
        }
    }

    /// Types what comes on standard input and prints what comes back until the command ends.
    fn converse(&mut self) -> Result<Ending> {
        let stdin = rustix::stdio::stdin();
        let mut open = true;
        loop {
            let mut polled = vec![PollFd::new(&self.channel, PollFlags::IN)];
            if open {
                polled.push(PollFd::new(&stdin, PollFlags::IN));
            }
            rustix::event::poll(&mut polled, None)?;
            let ready: Vec<bool> = polled.iter().map(|fd| !fd.revents().is_empty()).collect();
            if ready.get(1) == Some(&true) {
                let mut buffer = [0; 4096];
                let length = rustix::io::read(stdin, &mut buffer)?;
                open = length > 0;
                ToInit::Input(buffer[..length].to_vec()).send(&mut self.channel)?;
            }
            if ready.first() == Some(&true) {
                match self.receive(None)? {
                    FromInit::Output(_, bytes) => {
                        io::stdout().write_all(&bytes)?;
                        io::stdout().flush()?;
                    }
                    FromInit::Ended(ending) => return Ok(ending),
                    other => return unexpected(&other),
                }
            }
        }
    }

    fn collect(&mut self, to: &Path) -> Result<()> {
        fs::create_dir_all(to).with_context(|| format!("making {}", to.display()))?;
        ToInit::Collect(COLLECT_DIRECTORY.into()).send(&mut self.channel)?;
        let mut file = None;
        loop {
            match self.receive(Some(Instant::now() + GRACE))? {
                FromInit::FileStart(head) => file = Some(create(to, &head)?),
                FromInit::FileData(bytes) => {
                    file.as_mut()
                        .context("file contents before a file's name")?
                        .write_all(&bytes)?;
                }
                FromInit::Collected => return Ok(()),
                other => return unexpected(&other),
            }
        }
    }
}

/// Creates a collected file; its name comes from the other side and must stay below `to`.
fn create(to: &Path, head: &FileHead) -> Result<File> {
    let plain = head.path.components().all(|part| matches!(part, Component::Normal(_)));
    ensure!(plain, "the host sent a file named {}", head.path.display());
    let path = to.join(&head.path);
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    let file = File::create(&path).with_context(|| format!("creating {}", path.display()))?;
    file.set_permissions(fs::Permissions::from_mode(head.mode))?;
    Ok(file)
}

fn unexpected<T>(message: &FromInit) -> Result<T> {
    let error = io::Error::new(io::ErrorKind::InvalidData, format!("unexpected {message:?}"));
    Err(error.into())
}
