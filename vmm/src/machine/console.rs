// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The machine's character backends: from configuration to what a device is given.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};

use ecr_devices::backend::chardev::{CharPort, Chardev, ChardevSpec};
use ecr_devices::io_thread::IoHandle;

use crate::config::{ChardevConfig, VmConfig};
use crate::control::ChardevInfo;
use crate::vm::StartError;

/// Lines of console output that a failure report shows.
const REPORTED_LINES: usize = 20;

/// Console and serial line.
#[derive(Debug)]
pub(super) struct Consoles {
    console: Option<Chardev>,
    serial: Option<Chardev>,
}

impl Consoles {
    /// Open what `config` asks for, served on `io`.
    pub(super) fn open(config: &VmConfig, io: &IoHandle) -> Result<Self, StartError> {
        let open = |config: &ChardevConfig, what: &str| {
            let spec = spec(config).map_err(|e| {
                StartError::Machine(format!("use the descriptors of the {what}: {e}"))
            })?;
            spec.map(|spec| Chardev::open(spec, io))
                .transpose()
                .map_err(|e| StartError::Machine(format!("open the {what}: {e}")))
        };
        Ok(Self {
            console: open(&config.console, "console")?,
            serial: open(&config.serial, "serial line")?,
        })
    }

    pub(super) fn console(&self) -> Option<CharPort> {
        self.console.as_ref().map(Chardev::port)
    }

    pub(super) fn serial(&self) -> Option<CharPort> {
        self.serial.as_ref().map(Chardev::port)
    }

    pub(super) fn infos(&self) -> Vec<ChardevInfo> {
        let info = |label: &str, chardev: &Chardev| ChardevInfo {
            label: label.into(),
            filename: chardev.filename(),
            open: chardev.is_open(),
        };
        let console = self.console.iter().map(|chardev| info("console0", chardev));
        console.chain(self.serial.iter().map(|chardev| info("serial0", chardev))).collect()
    }

    /// The last lines that the guest wrote.
    pub(super) fn last_output(&self) -> String {
        let mut tails = Vec::new();
        for chardev in self.console.iter().chain(&self.serial) {
            let text = String::from_utf8_lossy(&chardev.tail()).into_owned();
            let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
            tails.extend(
                lines[lines.len().saturating_sub(REPORTED_LINES)..]
                    .iter()
                    .map(|line| line.trim_end().to_owned()),
            );
        }
        tails.join("\n")
    }
}

/// `None` where the device is not to be there.
fn spec(config: &ChardevConfig) -> io::Result<Option<ChardevSpec>> {
    Ok(Some(match config {
        ChardevConfig::Off => return Ok(None),
        ChardevConfig::Null => ChardevSpec::Null,
        ChardevConfig::Fds { input, output } => ChardevSpec::Fds {
            input: input.map(duplicate).transpose()?,
            output: duplicate(*output)?,
        },
        ChardevConfig::File { path } => ChardevSpec::File { path: path.clone() },
        ChardevConfig::Unix { path } => ChardevSpec::Unix { path: path.clone() },
    }))
}

/// The embedding process keeps its own descriptor.
pub(super) fn duplicate(fd: RawFd) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: the number is not -1, and the configuration's author keeps it open while the VM is built; if
    // it is closed nevertheless, duplicating it fails and nothing else happens.
    unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned()
}
