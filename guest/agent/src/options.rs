// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What the kernel command line asks of the agent.
//!
//! | option | meaning |
//! |---|---|
//! | `agent.log=LEVEL` | `off`, `error`, `warn`, `info`, `debug`, `trace`; `critical` and `warning` are understood too |
//! | `agent.server_addr=ADDR` | where to serve instead of vsock port 1024: `vsock://CID:PORT`, `unix://PATH` |
//! | `ecr.exec="PROGRAM ARGS"` | run this on the console once the guest is ready, print how it ended, power off. Words are separated by blanks; single quotes keep blanks |
//! | `root= rootfstype= rootflags= ro rw init=` | as the kernel understands them; for the agent on the initial RAM disk |
//!
//! `KATA_AGENT_LOG_LEVEL` and `KATA_AGENT_SERVER_ADDR` in the environment of an agent that is not init say the same as
//! the first two.
//!
//! Other options belong to others and are passed over. The protocol's options for debug console, log port and hotplug
//! time-out come with the calls that need them.

use std::fs;

use anyhow::{Context, Result, bail};
use log::LevelFilter;

const COMMAND_LINE: &str = "/proc/cmdline";

#[derive(Debug, PartialEq, Eq)]
pub struct Options {
    pub log: LevelFilter,
    pub server_addr: Option<String>,
    pub exec: Option<Vec<String>>,
    pub root: Option<Root>,
}

/// The root file system that the initial RAM disk has to find.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Root {
    pub device: String,
    pub fstype: String,
    pub flags: String,
    pub read_only: bool,
    pub init: String,
}

impl Options {
    pub fn from_kernel_command_line() -> Result<Self> {
        let line =
            fs::read_to_string(COMMAND_LINE).with_context(|| format!("read {COMMAND_LINE}"))?;
        Ok(Self::parse(&line))
    }

    /// Started by another init, the agent is told more in its environment, which goes before the kernel command line.
    pub fn with_environment(mut self) -> Self {
        if let Ok(address) = std::env::var("KATA_AGENT_SERVER_ADDR") {
            self.server_addr = Some(address);
        }
        if let Ok(name) = std::env::var("KATA_AGENT_LOG_LEVEL") {
            match level(&name) {
                Some(level) => self.log = level,
                None => log::warn!("KATA_AGENT_LOG_LEVEL={name}: no such level"),
            }
        }
        self
    }

    /// A value that makes no sense is reported and passed over: a guest that boots can be looked at.
    fn parse(line: &str) -> Self {
        let mut options =
            Options { log: LevelFilter::Info, server_addr: None, exec: None, root: None };
        let mut device = None;
        let mut root = Root {
            device: String::new(),
            fstype: "ext4".into(),
            flags: String::new(),
            read_only: true,
            init: "/sbin/init".into(),
        };
        for (key, value) in arguments(line) {
            match key {
                "agent.log" => match level(value) {
                    Some(level) => options.log = level,
                    None => log::warn!("agent.log={value}: no such level"),
                },
                "agent.server_addr" => options.server_addr = Some(value.into()),
                "ecr.exec" => match words(value) {
                    Ok(words) => options.exec = Some(words),
                    Err(error) => log::warn!("ecr.exec={value}: {error:#}"),
                },
                "root" => device = Some(value.to_string()),
                "rootfstype" => root.fstype = value.into(),
                "rootflags" => root.flags = value.into(),
                "ro" => root.read_only = true,
                "rw" => root.read_only = false,
                "init" => root.init = value.into(),
                _ => {}
            }
        }
        options.root = device.map(|device| Root { device, ..root });
        options
    }
}

/// Split a kernel command line as the kernel does: blanks separate arguments except between double quotes, the first
/// `=` separates key from value, and quotes around the argument or the value are taken off. What follows `--` is not
/// the kernel's.
fn arguments(line: &str) -> impl Iterator<Item = (&str, &str)> {
    let mut quoted = false;
    line.trim_end()
        .split(move |character: char| {
            quoted ^= character == '"';
            !quoted && character.is_ascii_whitespace()
        })
        .filter(|argument| !argument.is_empty())
        .take_while(|&argument| argument != "--")
        .map(|argument| {
            let argument = unquote(argument);
            argument.split_once('=').map_or((argument, ""), |(key, value)| (key, unquote(value)))
        })
}

fn unquote(text: &str) -> &str {
    text.strip_prefix('"').map_or(text, |inner| inner.strip_suffix('"').unwrap_or(inner))
}

fn level(name: &str) -> Option<LevelFilter> {
    match name {
        "critical" => Some(LevelFilter::Error),
        "warning" => Some(LevelFilter::Warn),
        _ => name.parse().ok(),
    }
}

/// Split a command into words at blanks; single quotes keep blanks, and have no escape inside, as in a shell.
fn words(command: &str) -> Result<Vec<String>> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quoted = false;
    for character in command.chars() {
        match character {
            '\'' => {
                quoted = !quoted;
                word.get_or_insert_default();
            }
            _ if character.is_ascii_whitespace() && !quoted => words.extend(word.take()),
            _ => word.get_or_insert_default().push(character),
        }
    }
    words.extend(word);
    if quoted {
        bail!("a single quote is not closed");
    }
    if words.is_empty() {
        bail!("no program is named");
    }
    Ok(words)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_asked() {
        let options = Options::parse("console=hvc0 quiet agent.unknown=1 panic=1\n");
        assert_eq!(
            options,
            Options { log: LevelFilter::Info, server_addr: None, exec: None, root: None }
        );
    }

    #[test]
    fn the_last_one_wins_and_nonsense_is_passed_over() {
        assert_eq!(Options::parse("agent.log=debug agent.log=error").log, LevelFilter::Error);
        assert_eq!(Options::parse("agent.log=trace agent.log=loud").log, LevelFilter::Trace);
        assert_eq!(Options::parse("agent.log=critical").log, LevelFilter::Error);
        assert_eq!(Options::parse("agent.log=warning").log, LevelFilter::Warn);
    }

    #[test]
    fn arguments_are_split_as_the_kernel_splits_them() {
        let line = "a=1  b=\"x y\" \"c=x y\"\tflag d=\"=\" e=a=b -- f=1\n";
        let expected =
            [("a", "1"), ("b", "x y"), ("c", "x y"), ("flag", ""), ("d", "="), ("e", "a=b")];
        assert_eq!(arguments(line).collect::<Vec<_>>(), expected);
    }

    #[test]
    fn a_program_with_a_script() {
        let options = Options::parse(r#"quiet ecr.exec="/bin/sh -c 'echo  $HOSTNAME; exit 3' ''""#);
        assert_eq!(options.exec.unwrap(), ["/bin/sh", "-c", "echo  $HOSTNAME; exit 3", ""]);
        assert_eq!(Options::parse("ecr.exec=/bin/sh").exec.unwrap(), ["/bin/sh"]);
        assert_eq!(Options::parse("ecr.exec=").exec, None);
        assert_eq!(Options::parse(r#"ecr.exec="a 'b""#).exec, None);
    }

    #[test]
    fn a_root_for_the_initial_ram_disk() {
        let line =
            "root=/dev/pmem0p1 rootflags=dax,data=ordered,errors=remount-ro ro rootfstype=ext4";
        let root = Options::parse(line).root.unwrap();
        assert_eq!(root.device, "/dev/pmem0p1");
        assert_eq!(root.flags, "dax,data=ordered,errors=remount-ro");
        assert!(root.read_only);
        assert_eq!(root.init, "/sbin/init");
        let root = Options::parse("rw init=/bin/sh root=/dev/vda1 rootfstype=xfs").root.unwrap();
        assert_eq!(
            (root.fstype.as_str(), root.read_only, root.init.as_str()),
            ("xfs", false, "/bin/sh")
        );
        assert_eq!(Options::parse("ro rootfstype=ext4").root, None);
    }
}
