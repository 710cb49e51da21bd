// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The list of what goes into an image. One entry per line; `#` begins a comment:
//!
//! ```text
//! dir  /dev 0755
//! file /sbin/init 0755 target/agent
//! link /bin/sh busybox
//! node /dev/console 0600 c 5 1
//! ```
//!
//! Parents come before their children. Paths inside are plain: no blanks, quotes or `..`. A source path outside is
//! relative to the current directory, and is all that comes from the build machine.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

/// The one owner of everything (root), and the one time: 2020-01-01 00:00:00 UTC.
pub const OWNER: u32 = 0;
pub const TIME: u32 = 1_577_836_800;

#[derive(Debug, PartialEq, Eq)]
pub struct Entry {
    /// Absolute, normal.
    pub path: String,
    /// Permission bits.
    pub mode: u32,
    pub kind: Kind,
}

#[derive(Debug, PartialEq, Eq)]
pub enum Kind {
    Directory,
    File { source: PathBuf },
    Link { target: String },
    CharacterDevice { major: u32, minor: u32 },
}

#[derive(Debug, PartialEq, Eq)]
pub struct Manifest {
    pub entries: Vec<Entry>,
}

impl Manifest {
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
        Self::parse(&text).with_context(|| format!("understand {}", path.display()))
    }

    fn parse(text: &str) -> Result<Self> {
        let mut entries = Vec::new();
        let mut directories = HashSet::from([String::new()]);
        let mut paths = HashSet::new();
        for (number, line) in text.lines().enumerate() {
            let words: Vec<&str> =
                line.split('#').next().unwrap_or_default().split_ascii_whitespace().collect();
            if words.is_empty() {
                continue;
            }
            let entry = Entry::parse(&words)
                .and_then(|entry| {
                    let parent = entry.path.rsplit_once('/').map_or("", |(parent, _)| parent);
                    ensure!(
                        directories.contains(parent),
                        "the directory {parent} is not listed before"
                    );
                    ensure!(paths.insert(entry.path.clone()), "{} is listed already", entry.path);
                    Ok(entry)
                })
                .with_context(|| format!("line {}: {line}", number + 1))?;
            if entry.kind == Kind::Directory {
                directories.insert(entry.path.clone());
            }
            entries.push(entry);
        }
        Ok(Manifest { entries })
    }

    /// Bytes in all the files.
    pub fn content_size(&self) -> Result<u64> {
        self.entries
            .iter()
            .filter_map(|entry| match &entry.kind {
                Kind::File { source } => Some(source),
                _ => None,
            })
            .map(|source| {
                let data =
                    fs::metadata(source).with_context(|| format!("read {}", source.display()))?;
                Ok(data.len())
            })
            .sum()
    }
}

impl Entry {
    fn parse(words: &[&str]) -> Result<Self> {
        let (path, mode, kind) = match *words {
            ["dir", path, mode] => (path, octal(mode)?, Kind::Directory),
            ["file", path, mode, source] => {
                (path, octal(mode)?, Kind::File { source: source.into() })
            }
            ["link", path, target] => (path, 0o777, Kind::Link { target: target.into() }),
            ["node", path, mode, "c", major, minor] => {
                let kind = Kind::CharacterDevice { major: major.parse()?, minor: minor.parse()? };
                (path, octal(mode)?, kind)
            }
            _ => bail!(
                "not an entry: dir PATH MODE, file PATH MODE SOURCE, link PATH TARGET, node PATH MODE c MAJOR MINOR"
            ),
        };
        let normal = path.strip_prefix('/').is_some_and(|relative| {
            relative.split('/').all(|part| !matches!(part, "" | "." | ".."))
        });
        ensure!(normal, "{path} is not an absolute, normal path");
        let plain = |text: &str| !text.contains(['"', '\'', '\\']);
        let plain_target = matches!(&kind, Kind::Link { target } if !plain(target));
        ensure!(plain(path) && !plain_target, "no quotes and backslashes in names");
        Ok(Entry { path: path.into(), mode, kind })
    }
}

fn octal(mode: &str) -> Result<u32> {
    let bits =
        u32::from_str_radix(mode, 8).with_context(|| format!("{mode} is not an octal mode"))?;
    ensure!(bits <= 0o7777, "{mode} has more than permission bits");
    Ok(bits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_of_each_kind() {
        let text = "# what\ndir /dev 0755\nfile /init 0755 ../agent # first\n\nlink /sh init\nnode /dev/console 0600 c 5 1\n";
        let manifest = Manifest::parse(text).unwrap();
        let kinds: Vec<_> = manifest.entries.into_iter().map(|entry| entry.kind).collect();
        assert_eq!(
            kinds,
            [
                Kind::Directory,
                Kind::File { source: "../agent".into() },
                Kind::Link { target: "init".into() },
                Kind::CharacterDevice { major: 5, minor: 1 },
            ]
        );
    }

    #[test]
    fn mistakes_are_named() {
        for (text, reason) in [
            ("dir dev 0755", "absolute"),
            ("dir /a/../b 0755", "absolute"),
            ("dir /a/ 0755", "absolute"),
            ("file /a/b 0644 c", "not listed before"),
            ("dir /a 0755\ndir /a 0755", "already"),
            ("dir /a 0800", "octal"),
            ("dir /a 10755", "permission"),
            ("link /a \"b\"", "quotes"),
            ("socket /a", "not an entry"),
        ] {
            let error = format!("{:#}", Manifest::parse(text).unwrap_err());
            assert!(error.contains(reason) && error.contains("line "), "{text}: {error}");
        }
    }
}
