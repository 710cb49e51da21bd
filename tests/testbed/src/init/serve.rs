// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Serves the control channel: one command after the other, and the files that they leave.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::exec::{self, Attendant, CommandSpec, Order, Stream};
use crate::protocol::{FileHead, FromInit, HostReport, PORT_NAME, ToInit};

const CGROUPS: &str = "/sys/fs/cgroup";

/// Serves until the channel ends or asks to power off.
pub(super) fn serve(troubles: Vec<String>) -> Result<()> {
    let mut channel = Channel(open_port()?);
    channel.send(&FromInit::Ready(report(troubles)?))?;
    loop {
        match ToInit::receive(&mut channel.0)? {
            ToInit::Run(spec) => {
                let reply = run(&spec, &mut channel);
                channel.send(&reply)?;
            }
            ToInit::Collect(directory) => {
                let reply = match collect(&directory, &directory, &mut channel) {
                    Ok(()) => FromInit::Collected,
                    Err(error) => FromInit::Refused(format!("{error:#}")),
                };
                channel.send(&reply)?;
            }
            ToInit::PowerOff => return Ok(()),
            // Meant for a command that has just ended.
            ToInit::Input(_) | ToInit::Kill => {}
        }
    }
}

fn open_port() -> Result<File> {
    for entry in fs::read_dir("/sys/class/virtio-ports").context("looking for virtio ports")? {
        let entry = entry?;
        if fs::read_to_string(entry.path().join("name")).is_ok_and(|n| n.trim() == PORT_NAME) {
            let device = Path::new("/dev").join(entry.file_name());
            return File::options()
                .read(true)
                .write(true)
                .open(&device)
                .with_context(|| format!("opening {}", device.display()));
        }
    }
    anyhow::bail!("there is no virtio port `{PORT_NAME}`")
}

fn report(troubles: Vec<String>) -> Result<HostReport> {
    let uptime = fs::read_to_string("/proc/uptime")?;
    Ok(HostReport {
        kernel: fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned(),
        uptime: uptime.split_whitespace().next().and_then(|s| s.parse().ok()).unwrap_or_default(),
        troubles,
    })
}

fn run(spec: &CommandSpec, channel: &mut Channel) -> FromInit {
    match exec::run(spec, Some(Path::new(CGROUPS)), channel) {
        Ok(ending) => FromInit::Ended(ending),
        Err(error) => FromInit::Refused(error.to_string()),
    }
}

/// Sends the regular files below `directory` with names relative to `top`; links and devices stay.
fn collect(directory: &Path, top: &Path, channel: &mut Channel) -> Result<()> {
    let entries = match fs::read_dir(directory) {
        Err(e) if e.kind() == io::ErrorKind::NotFound && directory == top => return Ok(()),
        entries => entries.with_context(|| format!("reading {}", directory.display()))?,
    };
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    for path in paths {
        let metadata = fs::symlink_metadata(&path)?;
        if metadata.is_dir() {
            collect(&path, top, channel)?;
        } else if metadata.is_file() {
            let relative = path.strip_prefix(top)?.to_owned();
            let mode = metadata.permissions().mode() & 0o7777;
            channel.send(&FromInit::FileStart(FileHead { path: relative, mode }))?;
            send_contents(&path, channel)?;
        }
    }
    Ok(())
}

fn send_contents(path: &Path, channel: &mut Channel) -> Result<()> {
    let mut file = File::open(path)?;
    let mut buffer = vec![0; 256 << 10];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(()),
            length => channel.send(&FromInit::FileData(buffer[..length].to_vec()))?,
        }
    }
}

/// The control channel while a command runs: its output goes out, orders come in.
struct Channel(File);

impl Channel {
    fn send(&mut self, message: &FromInit) -> io::Result<()> {
        message.send(&mut self.0)
    }
}

impl Attendant for Channel {
    fn output(&mut self, stream: Stream, bytes: Vec<u8>) -> io::Result<()> {
        self.send(&FromInit::Output(stream, bytes))
    }

    fn inbox(&self) -> Option<BorrowedFd<'_>> {
        Some(self.0.as_fd())
    }

    fn order(&mut self) -> io::Result<Order> {
        match ToInit::receive(&mut self.0)? {
            ToInit::Input(bytes) => Ok(Order::Input(bytes)),
            ToInit::Kill => Ok(Order::Kill),
            other => Err(io::Error::other(format!("{other:?} while a command runs"))),
        }
    }
}
