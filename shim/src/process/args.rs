// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The command line, as containerd writes it: flags with one dash (two are as good), then the action. Without an
//! action the process is the shim itself, started by `start`.

use std::ffi::OsString;

use crate::error::{Error, Kind, Result};

/// What the process is asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Start a shim, print its address, end.
    Start,
    /// Clean up after a shim that is gone, print how its container ended, end.
    Delete,
    /// Be the shim.
    Serve,
    /// Print the version.
    Version,
}

/// The command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Args {
    /// containerd's namespace.
    pub namespace: String,
    /// The container.
    pub id: String,
    /// containerd's socket.
    pub address: String,
    /// A program that publishes events; events go over ttrpc, so it is only handed on.
    pub publish_binary: String,
    /// The container's bundle; only `delete` is told, the others find it in the current directory.
    pub bundle: String,
    /// Serve on this socket instead of on file descriptor 3.
    pub socket: String,
    /// Log more.
    pub debug: bool,
    /// What to do.
    pub action: Action,
}

impl Args {
    /// Read a command line, without the program's name.
    pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Self> {
        let mut parsed = Self {
            namespace: String::new(),
            id: String::new(),
            address: String::new(),
            publish_binary: "containerd".to_owned(),
            bundle: String::new(),
            socket: String::new(),
            debug: false,
            action: Action::Serve,
        };
        let mut args = args.into_iter().map(text);
        while let Some(arg) = args.next() {
            let arg = arg?;
            let Some(flag) = arg.strip_prefix('-').filter(|flag| !flag.is_empty()) else {
                parsed.action = action(&arg)?;
                return match args.next() {
                    None => Ok(parsed),
                    Some(more) => {
                        Err(invalid(format!("argument {:?} after action {arg:?}", more?)))
                    }
                };
            };
            let flag = flag.strip_prefix('-').unwrap_or(flag);
            let (name, value) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (flag, None),
            };
            match name {
                "debug" => parsed.debug = boolean(name, value.as_deref())?,
                "v" | "version" => {
                    if boolean(name, value.as_deref())? {
                        parsed.action = Action::Version;
                        return Ok(parsed);
                    }
                }
                _ => {
                    let field = parsed.field(name)?;
                    *field = match value {
                        Some(value) => value,
                        None => args
                            .next()
                            .ok_or_else(|| invalid(format!("flag -{name} needs a value")))??,
                    };
                }
            }
        }
        Ok(parsed)
    }

    fn field(&mut self, name: &str) -> Result<&mut String> {
        match name {
            "namespace" => Ok(&mut self.namespace),
            "id" => Ok(&mut self.id),
            "address" => Ok(&mut self.address),
            "publish-binary" => Ok(&mut self.publish_binary),
            "bundle" => Ok(&mut self.bundle),
            "socket" => Ok(&mut self.socket),
            _ => Err(invalid(format!(
                "unknown flag -{name}; known are -namespace, -id, -address, -publish-binary, -bundle, -socket, \
                 -debug, -v"
            ))),
        }
    }
}

fn action(name: &str) -> Result<Action> {
    match name {
        "start" => Ok(Action::Start),
        "delete" => Ok(Action::Delete),
        _ => Err(invalid(format!("unknown action {name:?}; known are start and delete"))),
    }
}

fn boolean(name: &str, value: Option<&str>) -> Result<bool> {
    match value {
        None | Some("1" | "t" | "true") => Ok(true),
        Some("0" | "f" | "false") => Ok(false),
        Some(value) => Err(invalid(format!("flag -{name}: {value:?} is neither true nor false"))),
    }
}

fn text(arg: OsString) -> Result<String> {
    arg.into_string().map_err(|arg| invalid(format!("argument {arg:?} is not UTF-8")))
}

fn invalid(text: String) -> Error {
    Error::new(Kind::InvalidArgument, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Args> {
        Args::parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn containerd_s_own_command_lines() {
        let start = parse(
            "-namespace default -address /run/containerd/containerd.sock -publish-binary /usr/bin/containerd \
             -id c1 -debug start",
        )
        .unwrap();
        assert_eq!(start.action, Action::Start);
        assert_eq!((start.namespace.as_str(), start.id.as_str()), ("default", "c1"));
        assert_eq!(start.address, "/run/containerd/containerd.sock");
        assert!(start.debug);

        let delete =
            parse("-namespace k8s.io -address /s -publish-binary /b -id c1 -bundle /bundle delete")
                .unwrap();
        assert_eq!(delete.action, Action::Delete);
        assert_eq!(delete.bundle, "/bundle");

        assert_eq!(parse("-namespace n -id c1").unwrap().action, Action::Serve);
    }

    #[test]
    fn the_other_ways_to_write_a_flag() {
        let args = parse("--namespace=n --id=c1 -debug=false start").unwrap();
        assert_eq!((args.namespace.as_str(), args.id.as_str(), args.debug), ("n", "c1", false));
        for version in ["-v", "--version", "-version"] {
            assert_eq!(parse(version).unwrap().action, Action::Version);
        }
    }

    #[test]
    fn mistakes_are_named() {
        for (line, part) in [
            ("-nonsense start", "-nonsense"),
            ("-id", "-id needs a value"),
            ("-id c1 restart", "restart"),
            ("-debug=maybe start", "maybe"),
            ("start now", "now"),
        ] {
            let error = parse(line).unwrap_err().to_string();
            assert!(error.contains(part), "{line}: {error}");
        }
    }
}
