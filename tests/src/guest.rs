// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! A guest in an `ecr-vmm` process of its own, and what its console says.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::place::Place;

/// Longer than anything takes in an emulated host, and shorter than a test's time limit.
pub const PATIENCE: Duration = Duration::from_secs(400);

/// What is to be booted.
#[derive(Debug)]
pub struct Boot {
    command: Command,
    cmdline: String,
}

impl Boot {
    /// `kernel` of the built guest, with a quiet command line.
    #[must_use]
    pub fn kernel(place: &Place, kernel: &str) -> Self {
        let mut command = Command::new(place.vmm());
        command.arg("--kernel").arg(place.guest(kernel));
        Self { command, cmdline: "quiet panic=-1".into() }
    }

    /// With the initial RAM disk `name` of the built guest.
    #[must_use]
    pub fn initrd(mut self, place: &Place, name: &str) -> Self {
        self.command.arg("--initrd").arg(place.guest(name));
        self
    }

    /// With the root image on persistent memory, or on a disk.
    #[must_use]
    pub fn image(mut self, place: &Place, kind: &str) -> Self {
        let path = place.guest("rootfs.img").display().to_string();
        self.command.arg("--image").arg(format!("{path},as={kind}"));
        self
    }

    /// With more arguments of `ecr-vmm`.
    #[must_use]
    pub fn with(mut self, arguments: &[&str]) -> Self {
        self.command.args(arguments);
        self
    }

    /// With a QMP server on the unix socket `path`.
    #[must_use]
    pub fn qmp(mut self, path: &Path) -> Self {
        self.command.arg("--qmp").arg(format!("unix:{}", path.display()));
        self
    }

    /// With more kernel arguments.
    #[must_use]
    pub fn cmdline(mut self, arguments: &str) -> Self {
        self.cmdline.push(' ');
        self.cmdline.push_str(arguments);
        self
    }

    /// The guest runs this shell script when it is up, and powers off. Neither kind of quotes may be in it.
    #[must_use]
    pub fn script(self, script: &str) -> Self {
        assert!(!script.contains(['\'', '"']), "no quotes in a script for the command line");
        self.cmdline(&format!("ecr.exec=\"/bin/sh -c '{script}'\""))
    }

    /// Start it.
    ///
    /// # Errors
    /// The process cannot be started.
    pub fn start(mut self) -> Result<Guest> {
        self.command.arg("--cmdline").arg(&self.cmdline);
        self.command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child =
            self.command.spawn().with_context(|| format!("start {:?}", self.command))?;
        let (sender, lines) = mpsc::channel();
        forward(child.stdout.take().context("no standard output")?, sender.clone());
        forward(child.stderr.take().context("no standard error")?, sender);
        Ok(Guest { child, lines, seen: String::new() })
    }
}

fn forward(stream: impl Read + Send + 'static, sender: mpsc::Sender<String>) {
    thread::spawn(move || {
        for line in BufReader::new(stream).split(b'\n') {
            let Ok(line) = line else { return };
            if sender.send(String::from_utf8_lossy(&line).trim_end().to_owned()).is_err() {
                return;
            }
        }
    });
}

/// A guest and its VMM. Dropping it kills both.
#[derive(Debug)]
pub struct Guest {
    child: Child,
    lines: Receiver<String>,
    seen: String,
}

impl Guest {
    /// Wait until the console, or the VMM, says a line that contains `text`.
    ///
    /// # Errors
    /// It has not come in time, or the VMM has ended without it. The error shows all that was said.
    pub fn wait_for(&mut self, text: &str) -> Result<String> {
        let until = Instant::now() + PATIENCE;
        loop {
            match self.lines.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(line) => {
                    println!("{line}");
                    self.seen.push_str(&line);
                    self.seen.push('\n');
                    if line.contains(text) {
                        return Ok(line);
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    bail!("{text:?} did not come in {PATIENCE:?}; seen:\n{}", self.seen)
                }
                Err(RecvTimeoutError::Disconnected) => {
                    bail!("ecr-vmm ended without {text:?}; seen:\n{}", self.seen)
                }
            }
        }
    }

    /// Wait until the agent is up.
    ///
    /// # Errors
    /// As [`Self::wait_for`].
    pub fn wait_ready(&mut self) -> Result<String> {
        self.wait_for(" ready in ")
    }

    /// Wait for the end; returns the exit status and all that was said.
    ///
    /// # Errors
    /// It has not ended in time.
    pub fn wait_end(mut self) -> Result<(i32, String)> {
        let until = Instant::now() + PATIENCE;
        while let Ok(line) =
            self.lines.recv_timeout(until.saturating_duration_since(Instant::now()))
        {
            println!("{line}");
            self.seen.push_str(&line);
            self.seen.push('\n');
        }
        if Instant::now() >= until {
            bail!("ecr-vmm did not end in {PATIENCE:?}; seen:\n{}", self.seen);
        }
        let status = self.child.wait()?;
        let code = status.code().with_context(|| format!("ecr-vmm: {status}"))?;
        Ok((code, std::mem::take(&mut self.seen)))
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Wait until somebody listens on the unix socket `path`.
///
/// # Errors
/// Nobody does, in time.
pub fn wait_for_socket(path: &Path) -> Result<std::os::unix::net::UnixStream> {
    let until = Instant::now() + PATIENCE;
    loop {
        match std::os::unix::net::UnixStream::connect(path) {
            Ok(stream) => return Ok(stream),
            Err(error) if Instant::now() > until => {
                return Err(error).with_context(|| format!("connect to {}", path.display()));
            }
            Err(_) => thread::sleep(Duration::from_millis(10)),
        }
    }
}
