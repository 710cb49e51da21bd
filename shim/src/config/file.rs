// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Read a configuration file and the drop-in files beside it.
//!
//! Drop-in files are all files of the directory `config.d` beside the configuration file, symbolic links resolved, in
//! the order of their names. A key in one replaces what came before it; lists are replaced whole, too. A key that nobody
//! knows is passed over in the configuration file, as newer files shall work; in a drop-in file it is an error in the
//! hypervisor's and the agent's table, and a warning elsewhere.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use toml::Value;
use toml::de::{DeTable, DeValue};

use super::{Config, Origin, Table};
use crate::error::{Error, Kind, Result};

/// More is no configuration file.
const MAX_SIZE: u64 = 1 << 20;
/// The hypervisor's table has one of these names; the later ones go before the earlier ones.
const HYPERVISORS: [&str; 2] = ["qemu", "ecr"];

/// A file, read.
struct Document<'a> {
    path: &'a Path,
    text: &'a str,
    drop_in: bool,
}

impl Config {
    /// Read the file at `self.path`, and what lies beside it.
    pub(super) fn read_files(&mut self) -> Result<()> {
        let main = self.path.clone();
        self.read_file(&main, false)?;
        for path in drop_ins(&main)? {
            self.read_file(&path, true)?;
        }
        Ok(())
    }

    fn read_file(&mut self, path: &Path, drop_in: bool) -> Result<()> {
        let text = read_text(path).map_err(|error| {
            Error::new(Kind::FailedPrecondition, format!("read {}: {error}", path.display()))
        })?;
        self.merge(&Document { path, text: &text, drop_in })
    }

    fn merge(&mut self, document: &Document<'_>) -> Result<()> {
        let syntax = |error: toml::de::Error| {
            document.error(error.span().map_or(0, |span| span.start), error.message())
        };
        // Once for the values, and once for the lines that they are on.
        let values: toml::Table = toml::from_str(document.text).map_err(syntax)?;
        let places = DeTable::parse(document.text).map_err(syntax)?;
        let places = places.get_ref();
        for (name, value) in &values {
            let place = places.get(name.as_str()).map(|place| place.get_ref());
            match name.as_str() {
                "hypervisor" => self.merge_hypervisors(document, value, place)?,
                "agent" => {
                    for (kind, value, place) in tables_of(document, name, value, place)? {
                        self.merge_table(
                            document,
                            Table::Agent,
                            &format!("agent.{kind}"),
                            value,
                            place,
                        )?;
                    }
                }
                "runtime" => self.merge_table(document, Table::Runtime, name, value, place)?,
                "factory" => self.merge_table(document, Table::Factory, name, value, place)?,
                "image" => self.merge_table(document, Table::Image, name, value, place)?,
                _ => document.unknown(name),
            }
        }
        Ok(())
    }

    fn merge_hypervisors(
        &mut self,
        document: &Document<'_>,
        value: &Value,
        place: Option<&DeValue<'_>>,
    ) -> Result<()> {
        let tables = tables_of(document, "hypervisor", value, place)?;
        for (kind, ..) in tables.iter().filter(|(kind, ..)| !HYPERVISORS.contains(kind)) {
            log::warn!(
                "{}: [hypervisor.{kind}] is passed over: ecr reads [hypervisor.ecr] and [hypervisor.qemu]",
                document.path.display()
            );
        }
        for wanted in HYPERVISORS {
            for &(kind, value, place) in tables.iter().filter(|(kind, ..)| *kind == wanted) {
                let name = format!("hypervisor.{kind}");
                self.merge_table(document, Table::Hypervisor, &name, value, place)?;
            }
        }
        Ok(())
    }

    fn merge_table(
        &mut self,
        document: &Document<'_>,
        table: Table,
        header: &str,
        value: &Value,
        place: Option<&DeValue<'_>>,
    ) -> Result<()> {
        let strict = document.drop_in && matches!(table, Table::Hypervisor | Table::Agent);
        for (name, value, start) in entries(document, header, value, place)? {
            let Some(key) = table.key(name) else {
                if strict {
                    return Err(document.error(start, &format!("{header}: key {name:?} not found")));
                }
                document.unknown(&format!("{header}.{name}"));
                continue;
            };
            let origin = Origin::File { path: document.path.into(), line: document.line(start) };
            self.set(key, value, origin)
                .map_err(|wrong| document.error(start, &format!("{header}.{name}: {wrong}")))?;
        }
        Ok(())
    }
}

impl Document<'_> {
    /// The line of a byte, counted from 1.
    fn line(&self, offset: usize) -> usize {
        1 + self.text.bytes().take(offset).filter(|&byte| byte == b'\n').count()
    }

    fn error(&self, offset: usize, what: &str) -> Error {
        let (path, line) = (self.path.display(), self.line(offset));
        Error::new(Kind::InvalidArgument, format!("{path}:{line}: {what}"))
    }

    fn unknown(&self, name: &str) {
        let level = if self.drop_in { log::Level::Warn } else { log::Level::Debug };
        log::log!(level, "{}: {name} is not known and has no effect", self.path.display());
    }
}

type Entry<'a> = (&'a str, &'a Value, usize);

/// What a table has: name, value, and where it is.
fn entries<'a>(
    document: &Document<'_>,
    header: &str,
    value: &'a Value,
    place: Option<&DeValue<'_>>,
) -> Result<Vec<Entry<'a>>> {
    let place = place.and_then(DeValue::as_table);
    let Some(table) = value.as_table() else {
        let what = format!("{header}: expected a table, found {}", value.type_str());
        return Err(document.error(0, &what));
    };
    let start = |name: &str| {
        let entry = place.and_then(|table| table.get_key_value(name));
        entry.map_or(0, |(key, _)| key.span().start)
    };
    Ok(table.iter().map(|(name, value)| (name.as_str(), value, start(name))).collect())
}

type SubTable<'a, 'p> = (&'a str, &'a Value, Option<&'p DeValue<'p>>);

/// The tables in a table: name, value, and place.
fn tables_of<'a, 'p>(
    document: &Document<'_>,
    header: &str,
    value: &'a Value,
    place: Option<&'p DeValue<'p>>,
) -> Result<Vec<SubTable<'a, 'p>>> {
    let places = place.and_then(DeValue::as_table);
    let entries = entries(document, header, value, place)?;
    let place = |name: &str| places.and_then(|t| t.get(name)).map(|place| place.get_ref());
    Ok(entries.into_iter().map(|(name, value, _)| (name, value, place(name))).collect())
}

fn read_text(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    let size = File::open(path)?.take(MAX_SIZE + 1).read_to_string(&mut text)? as u64;
    if size > MAX_SIZE {
        return Err(io::Error::other(format!("it is larger than {MAX_SIZE} bytes")));
    }
    Ok(text)
}

/// The drop-in files beside the configuration file, in the order of their names.
fn drop_ins(main: &Path) -> Result<Vec<PathBuf>> {
    let directory = main.with_file_name("config.d");
    let attempt = || -> io::Result<Vec<PathBuf>> {
        let mut paths = Vec::new();
        for entry in std::fs::read_dir(&directory)? {
            let path = entry?.path();
            if path.is_file() {
                paths.push(path);
            }
        }
        paths.sort();
        Ok(paths)
    };
    match attempt() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => Ok(Vec::new()),
        other => other.map_err(|error| {
            let text = format!("read the directory {}: {error}", directory.display());
            Error::new(Kind::FailedPrecondition, text)
        }),
    }
}
