// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Where tests run: on this machine or in the emulated host.
//!
//! A `/dev/kvm` that opens proves nothing: some create VMs and then cannot emulate an instruction that a stock
//! kernel needs. So a probe decides, a command that boots such a kernel on this machine's KVM. Its verdict is kept
//! until the machine is rebooted or a file on the command's line changes. Whatever is chosen comes with its reason.

use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::ValueEnum;

use crate::arch::Arch;
use crate::cache;
use crate::exec::{self, Attendant, CommandSpec, Ending, Stream};

/// A stock kernel boots in two seconds where KVM works.
const PROBE_LIMIT: Duration = Duration::from_secs(20);
/// How much of a failed probe's output is its reason.
const REASON_LENGTH: usize = 300;

/// What was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Wish {
    /// This machine.
    Native,
    /// The emulated host.
    Testbed,
    /// This machine if the probe succeeds, else the emulated host.
    Auto,
}

/// Which host it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// This machine.
    Native,
    /// The emulated host.
    Testbed,
}

/// A decision with its reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// Where to run.
    pub place: Place,
    /// Why there.
    pub reason: String,
}

impl Choice {
    fn new(place: Place, reason: impl Into<String>) -> Self {
        Self { place, reason: reason.into() }
    }
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = match self.place {
            Place::Native => "on this machine",
            Place::Testbed => "in the emulated host",
        };
        write!(f, "running {place}: {}", self.reason)
    }
}

/// Decides for `arch`. `probe` is a shell command that succeeds when this machine can run the tests.
///
/// # Errors
/// The probe's verdict cannot be read or kept.
pub fn choose(wish: Wish, arch: Arch, probe: Option<&str>) -> Result<Choice> {
    match wish {
        Wish::Native => return Ok(Choice::new(Place::Native, "asked for (ECR_TEST_HOST, --host)")),
        Wish::Testbed => {
            return Ok(Choice::new(Place::Testbed, "asked for (ECR_TEST_HOST, --host)"));
        }
        Wish::Auto => {}
    }
    if Arch::native() != Some(arch) {
        return Ok(Choice::new(Place::Testbed, format!("this machine is not {arch}")));
    }
    if let Err(e) = fs::File::options().read(true).write(true).open("/dev/kvm") {
        return Ok(Choice::new(Place::Testbed, format!("/dev/kvm cannot be opened here: {e}")));
    }
    let Some(probe) = probe else {
        let reason =
            "whether this machine's KVM can run a stock kernel is unknown, no probe was given";
        return Ok(Choice::new(Place::Testbed, reason));
    };
    Ok(match verdict(probe)? {
        None => Choice::new(Place::Native, "the probe succeeded on this machine's KVM"),
        Some(why) => {
            Choice::new(Place::Testbed, format!("the probe failed on this machine's KVM: {why}"))
        }
    })
}

/// Why the probe fails here, if it does; from the cache where that is possible.
fn verdict(probe: &str) -> Result<Option<String>> {
    let boot =
        fs::read_to_string("/proc/sys/kernel/random/boot_id").context("identifying this boot")?;
    let key = cache::key(&format!("{boot}{probe}{}", stamps(probe)));
    let directory = cache::root()?.join("probes");
    let path = directory.join(key);
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(_) => {
            let text = run(probe).unwrap_or_default();
            fs::create_dir_all(&directory)?;
            // Renamed into place: a reader must not take a half-written verdict, an empty file, for success.
            let new = tempfile::NamedTempFile::new_in(&directory)?;
            fs::write(new.path(), &text)?;
            new.persist(&path).with_context(|| format!("keeping {}", path.display()))?;
            text
        }
    };
    Ok((!text.is_empty()).then_some(text))
}

/// Size and time of the files that the probe's words name: a new build is a new probe.
fn stamps(probe: &str) -> String {
    probe
        .split_whitespace()
        .filter_map(|word| fs::metadata(Path::new(word)).ok())
        .map(|m| format!("\n{} {} {}", m.size(), m.mtime(), m.mtime_nsec()))
        .collect()
}

/// Runs the probe; says why it failed.
fn run(probe: &str) -> Option<String> {
    struct Last(Vec<u8>);
    impl Attendant for Last {
        fn output(&mut self, _: Stream, bytes: Vec<u8>) -> io::Result<()> {
            self.0.extend(bytes);
            let excess = self.0.len().saturating_sub(REASON_LENGTH);
            self.0.drain(..excess);
            Ok(())
        }
    }
    eprintln!("testbed: trying this machine's KVM: {probe}");
    let spec = CommandSpec {
        argv: vec!["sh".into(), "-c".into(), probe.into()],
        time_limit: Some(PROBE_LIMIT),
        ..CommandSpec::default()
    };
    let mut last = Last(Vec::new());
    match exec::run(&spec, None, &mut last) {
        Ok(Ending::Exited(0)) => None,
        Ok(ending) => {
            let text = String::from_utf8_lossy(&last.0).into_owned();
            let line = text.lines().rev().find(|l| !l.trim().is_empty()).unwrap_or("no output");
            Some(format!("{ending}: {}", line.trim()))
        }
        Err(error) => Some(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wish_is_obeyed() {
        let place = |wish| choose(wish, Arch::Aarch64, Some("false")).unwrap().place;
        assert_eq!(place(Wish::Native), Place::Native);
        assert_eq!(place(Wish::Testbed), Place::Testbed);
    }

    #[test]
    fn a_failed_probe_says_why() {
        assert_eq!(run("true"), None);
        assert_eq!(
            run("echo first >&2; echo KVM is lame >&2; exit 4").unwrap(),
            "exit status 4: KVM is lame"
        );
    }

    #[test]
    fn a_new_file_is_a_new_probe() {
        let work = tempfile::tempdir().unwrap();
        let file = work.path().join("vmm");
        let probe = format!("{} --kernel /no/such", file.display());
        let before = stamps(&probe);
        fs::write(&file, "1").unwrap();
        assert_ne!(stamps(&probe), before);
    }
}
