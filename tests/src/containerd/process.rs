// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Processes of the host, from `/proc`.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

/// A process of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostProcess {
    /// Its id.
    pub pid: u32,
    /// Its parent's id.
    pub parent: u32,
    /// The file name of its program.
    pub program: String,
    /// Its command line.
    pub words: String,
}

impl HostProcess {
    /// All that there are, those of the kernel left out.
    #[must_use]
    pub fn all() -> Vec<Self> {
        fs::read_dir("/proc")
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|e| Self::read(&e.path()))
            .collect()
    }

    fn read(directory: &Path) -> Option<Self> {
        let pid = directory.file_name()?.to_str()?.parse().ok()?;
        let program = fs::read_link(directory.join("exe")).ok()?;
        let words = fs::read(directory.join("cmdline")).ok()?;
        let stat = fs::read_to_string(directory.join("stat")).ok()?;
        // The name in parentheses may contain anything; the parent is the second field behind it.
        let parent = stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()?;
        Some(Self {
            pid,
            parent,
            program: program.file_name()?.to_string_lossy().into_owned(),
            words: String::from_utf8_lossy(&words).replace('\0', " "),
        })
    }

    /// Sends it SIGKILL.
    ///
    /// # Errors
    /// It is not there any more.
    pub fn kill(&self) -> Result<()> {
        let pid = rustix::process::Pid::from_raw(self.pid.cast_signed()).context("pid 0")?;
        rustix::process::kill_process(pid, rustix::process::Signal::KILL)
            .with_context(|| format!("kill {} ({})", self.pid, self.words))
    }
}
