// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What the kernel command line asks of the agent.
//!
//! | option | meaning |
//! |---|---|
//! | `agent.log=LEVEL` | `off`, `error`, `warn`, `info`, `debug`, `trace`; `critical` and `warning` are understood too |
//! | `agent.server_addr=ADDR` | where to serve instead of vsock port 1024: `vsock://CID:PORT`, `unix://PATH` |
//! | `agent.debug_console` | a shell on the console, or, with the next option, on vsock |
//! | `agent.debug_console_vport=PORT` | every vsock connection to this port gets a shell; implies the option before |
//! | `agent.log_vport=PORT` | every vsock connection to this port gets the agent's log |
//! | `agent.hotplug_timeout=SECONDS` | how long a device may take to show up; 3 |
//! | `agent.container_pipe_size=BYTES` | room of the pipes of containers; the kernel's own otherwise |
//! | `agent.unified_cgroup_hierarchy=BOOL` | only cgroup v2 is there, so `false` cannot be honoured |
//! | `agent.devmode`, `agent.trace` | understood, without effect |
//! | `ecr.exec="PROGRAM ARGS"` | run this on the console once the guest is ready, print how it ended, power off. Words are separated by blanks; single quotes keep blanks |
//! | `root= rootfstype= rootflags= ro rw init=` | as the kernel understands them; for the agent on the initial RAM disk |
//!
//! `KATA_AGENT_LOG_LEVEL` and `KATA_AGENT_SERVER_ADDR` in the environment of an agent that is not init say the same as
//! the first two.
//!
//! Other options belong to others and are passed over; those of the protocol that this agent does not have are named
//! once in the log.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use log::LevelFilter;

use crate::sandbox::HOTPLUG_LIMIT;

const COMMAND_LINE: &str = "/proc/cmdline";
/// Longer than any device takes: the runtime has given up by then.
const LONGEST_HOTPLUG: u64 = 600;
/// Options of the protocol that have no effect here, by how they begin.
const WITHOUT_EFFECT: [&str; 11] = [
    "agent.cdh_api_timeout",
    "agent.cdi_timeout",
    "agent.config_file",
    "agent.enable_signature_verification",
    "agent.guest_components",
    "agent.https_proxy",
    "agent.image_",
    "agent.launch_process_timeout",
    "agent.no_proxy",
    "agent.passfd_listener_port",
    "agent.secure_storage_integrity",
];

#[derive(Debug, PartialEq, Eq)]
pub struct Options {
    pub log: LevelFilter,
    pub server_addr: Option<String>,
    pub debug_console: bool,
    pub debug_console_port: Option<u32>,
    pub log_port: Option<u32>,
    pub hotplug_limit: Duration,
    pub container_pipe_size: Option<u32>,
    pub exec: Option<Vec<String>>,
    pub root: Option<Root>,
    /// What was asked for in vain, as it was written.
    pub ignored: Vec<String>,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            log: LevelFilter::Info,
            server_addr: None,
            debug_console: false,
            debug_console_port: None,
            log_port: None,
            hotplug_limit: HOTPLUG_LIMIT,
            container_pipe_size: None,
            exec: None,
            root: None,
            ignored: Vec::new(),
        }
    }
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

    /// Say once what was asked for in vain.
    pub fn report(&self) {
        if !self.ignored.is_empty() {
            log::warn!("without effect: {}", self.ignored.join(" "));
        }
    }

    /// A value that makes no sense is reported and passed over: a guest that boots can be looked at.
    fn parse(line: &str) -> Self {
        let mut options = Options::default();
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
                _ => {
                    if let Err(complaint) = options.set(key, value) {
                        log::warn!("{key}={value}: {complaint}");
                    }
                }
            }
        }
        options.root = device.map(|device| Root { device, ..root });
        options
    }

    /// One of the protocol's own.
    fn set(&mut self, key: &str, value: &str) -> Result<(), &'static str> {
        match key {
            "agent.log" => self.log = level(value).ok_or("no such level")?,
            "agent.server_addr" => self.server_addr = Some(value.into()),
            "agent.debug_console" => self.debug_console = flag(value)?,
            "agent.debug_console_vport" => {
                self.debug_console_port = Some(port(value)?);
                self.debug_console = true;
            }
            "agent.log_vport" => self.log_port = Some(port(value)?),
            "agent.hotplug_timeout" => {
                let seconds = value.parse().ok().filter(|seconds| *seconds <= LONGEST_HOTPLUG);
                self.hotplug_limit =
                    Duration::from_secs(seconds.ok_or("not a number of seconds up to 600")?);
            }
            "agent.container_pipe_size" => {
                let bytes = value.parse().map_err(|_| "not a number of bytes")?;
                self.container_pipe_size = Some(bytes).filter(|bytes| *bytes > 0);
            }
            // Nothing of what the agent does depends on it.
            "agent.devmode" => {}
            "agent.trace" if flag(value)? => self.ignored.push(format!("{key}={value}")),
            "agent.unified_cgroup_hierarchy" | "systemd.unified_cgroup_hierarchy"
                if !flag(value)? =>
            {
                self.ignored.push(format!("{key}={value}"));
            }
            _ if WITHOUT_EFFECT.iter().any(|without| key.starts_with(without)) => {
                self.ignored.push(format!("{key}={value}"));
            }
            _ => {}
        }
        Ok(())
    }
}

/// A flag stands alone, or has a value that says yes or no.
fn flag(value: &str) -> Result<bool, &'static str> {
    match value {
        "" | "1" | "true" | "yes" | "on" => Ok(true),
        "0" | "false" | "no" | "off" => Ok(false),
        _ => Err("neither true nor false"),
    }
}

fn port(value: &str) -> Result<u32, &'static str> {
    value.parse().ok().filter(|port| *port > 0).ok_or("not a vsock port")
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
        assert_eq!(options, Options::default());
    }

    #[test]
    fn the_last_one_wins_and_nonsense_is_passed_over() {
        assert_eq!(Options::parse("agent.log=debug agent.log=error").log, LevelFilter::Error);
        assert_eq!(Options::parse("agent.log=trace agent.log=loud").log, LevelFilter::Trace);
        assert_eq!(Options::parse("agent.log=critical").log, LevelFilter::Error);
        assert_eq!(Options::parse("agent.log=warning").log, LevelFilter::Warn);
    }

    #[test]
    fn the_protocols_own() {
        let options = Options::parse(
            "agent.debug_console agent.debug_console_vport=1026 agent.log_vport=1025 \
             agent.hotplug_timeout=10 agent.container_pipe_size=2097152",
        );
        assert!(options.debug_console);
        assert_eq!((options.debug_console_port, options.log_port), (Some(1026), Some(1025)));
        assert_eq!(options.hotplug_limit, Duration::from_secs(10));
        assert_eq!(options.container_pipe_size, Some(2 << 20));
        assert!(Options::parse("agent.debug_console_vport=1026").debug_console);
        assert!(!Options::parse("agent.debug_console=false").debug_console);
        let nonsense = "agent.debug_console=maybe agent.debug_console_vport=0 agent.log_vport=-1 \
            agent.hotplug_timeout=1e9 agent.container_pipe_size=2M";
        assert_eq!(Options::parse(nonsense), Options::default());
        assert_eq!(Options::parse("agent.container_pipe_size=0"), Options::default());
    }

    #[test]
    fn what_is_asked_in_vain_is_remembered() {
        let options = Options::parse(
            "agent.trace agent.unified_cgroup_hierarchy=0 agent.config_file=/x agent.devmode",
        );
        assert_eq!(
            options.ignored,
            ["agent.trace=", "agent.unified_cgroup_hierarchy=0", "agent.config_file=/x"]
        );
        let honoured = "agent.trace=false agent.unified_cgroup_hierarchy=true agent.other=1";
        assert!(Options::parse(honoured).ignored.is_empty());
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
