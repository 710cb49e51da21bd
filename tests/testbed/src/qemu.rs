// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! One QEMU process that plays a host: software emulation with virtualisation inside.
//!
//! Its end of the control channel is one of a socket pair, its serial console a pipe that a thread reads. The root
//! disk is shared by all runs: writes go to a temporary file that QEMU deletes at once (`snapshot=on`).
//!
//! The process dies with us, and its end, a kernel panic in it included (`panic=-1`, `-no-reboot`), closes the
//! control channel.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::thread::JoinHandle;

use anyhow::{Context, Result};
use parking_lot::Mutex;
use rustix::process::Signal;

use crate::arch::{Arch, Gic};
use crate::emulator::Emulator;
use crate::protocol::PORT_NAME;

/// Serial number of the disk with the root file system.
pub const ROOT_SERIAL: &str = "ecr-root";
/// Serial number of the disk with the given files.
pub const FILES_SERIAL: &str = "ecr-files";

/// Lines of the console that are kept for an error's text.
const CONSOLE_LINES: usize = 40;

/// What to boot.
#[derive(Debug)]
pub struct Machine<'a> {
    /// Which architecture.
    pub arch: Arch,
    /// Its interrupt controller on aarch64.
    pub gic: Gic,
    /// The kernel.
    pub kernel: &'a Path,
    /// Its initramfs.
    pub initramfs: &'a Path,
    /// The root file system; not written.
    pub root: &'a Path,
    /// The given files; not written.
    pub files: &'a Path,
    /// Memory in MiB. What the host does not touch costs nothing.
    pub memory_mib: u32,
    /// Processors.
    pub cpus: u32,
    /// Print the console as it comes.
    pub show_console: bool,
    /// Where QEMU puts its temporary file.
    pub scratch: &'a Path,
}

/// A running QEMU; killed when dropped.
#[derive(Debug)]
pub struct Qemu {
    child: Child,
    console: Arc<Mutex<VecDeque<String>>>,
    reader: Option<JoinHandle<()>>,
}

impl Qemu {
    /// Starts QEMU; returns our end of the control channel too.
    ///
    /// # Errors
    /// QEMU cannot be had or cannot be started.
    pub fn start(machine: &Machine<'_>) -> Result<(Self, UnixStream)> {
        let (ours, theirs) = UnixStream::pair().context("making the control channel")?;
        let mut command = Emulator::get(machine.arch)?.command();
        command
            .args(arguments(machine, theirs.as_raw_fd()))
            .env("TMPDIR", machine.scratch)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            // An interrupt at the terminal is ours to handle.
            .process_group(0);
        let channel = theirs.as_fd().as_raw_fd();
        // SAFETY: between fork and exec only system calls are made; `channel` is open, since `theirs` lives until
        // after the spawn, and keeping it open across exec is what QEMU needs.
        unsafe {
            command.pre_exec(move || {
                let channel = BorrowedFd::borrow_raw(channel);
                rustix::io::fcntl_setfd(channel, rustix::io::FdFlags::empty())?;
                rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
                Ok(())
            });
        }
        let mut child = command.spawn().with_context(|| format!("running {command:?}"))?;
        let console = Arc::new(Mutex::new(VecDeque::new()));
        let reader = child.stdout.take().map(|pipe| {
            let (console, show) = (Arc::clone(&console), machine.show_console);
            std::thread::spawn(move || read_console(pipe, &console, show))
        });
        Ok((Self { child, console, reader }, ours))
    }

    /// Kills QEMU and returns the last lines of its console.
    pub fn end(&mut self) -> String {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
        Vec::from_iter(self.console.lock().iter().map(String::as_str)).join("\n")
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        self.end();
    }
}

fn arguments(machine: &Machine<'_>, channel: i32) -> Vec<String> {
    let path = |path: &Path| path.display().to_string();
    // A comma in a file name is doubled.
    let drive = |path: &Path| path.display().to_string().replace(',', ",,");
    let console = machine.arch.console();
    let mut arguments: Vec<String> =
        machine.arch.machine(machine.gic).into_iter().map(ToOwned::to_owned).collect();
    let mut add = |option: &str, value: String| arguments.extend([option.to_owned(), value]);
    add("-accel", "tcg,thread=multi,tb-size=512".into());
    add("-m", format!("{}M", machine.memory_mib));
    add("-smp", machine.cpus.to_string());
    add("-display", "none".into());
    add("-serial", "stdio".into());
    add("-kernel", path(machine.kernel));
    add("-initrd", path(machine.initramfs));
    add(
        "-append",
        format!(
            "console={console} quiet loglevel=4 panic=-1 mitigations=off nokaslr random.trust_cpu=on"
        ),
    );
    for (serial, image, writes) in
        [(ROOT_SERIAL, machine.root, "snapshot=on"), (FILES_SERIAL, machine.files, "readonly=on")]
    {
        let file = drive(image);
        add(
            "-drive",
            format!("if=none,id={serial},file={file},format=raw,file.locking=off,{writes}"),
        );
        add("-device", format!("virtio-blk-pci,drive={serial},serial={serial}"));
    }
    add("-device", "virtio-serial-pci".into());
    add("-chardev", format!("socket,id=control,fd={channel}"));
    add("-device", format!("virtserialport,chardev=control,name={PORT_NAME}"));
    arguments.extend(["-nodefaults", "-no-user-config", "-no-reboot"].map(ToOwned::to_owned));
    arguments
}

fn read_console(pipe: impl Read, console: &Mutex<VecDeque<String>>, show: bool) {
    let mut pipe = BufReader::new(pipe);
    let mut line = Vec::new();
    while matches!(pipe.read_until(b'\n', &mut line), Ok(1..)) {
        let text = String::from_utf8_lossy(&line).trim_end().to_owned();
        line.clear();
        if show {
            eprintln!("console| {text}");
        }
        let mut lines = console.lock();
        if lines.len() == CONSOLE_LINES {
            lines.pop_front();
        }
        lines.push_back(text);
    }
}
