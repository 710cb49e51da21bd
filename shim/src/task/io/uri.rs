// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What containerd names as a stream: the path of a FIFO, or a URI with scheme `fifo`, `file` or `binary`.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use crate::error::{Error, Kind, Result};

/// Where a stream comes from or goes to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// A FIFO; anything else that can be opened is taken, too.
    Fifo(PathBuf),
    /// A file, which grows.
    File(PathBuf),
    /// A program that logs.
    Program {
        /// The program.
        path: PathBuf,
        /// Its arguments: the keys and values of the query, in their order.
        args: Vec<OsString>,
    },
}

impl Place {
    /// Read the name of `stream`; an empty one is no stream.
    pub fn parse(stream: &str, name: &str) -> Result<Option<Self>> {
        if name.is_empty() {
            return Ok(None);
        }
        let invalid = |what: &str| {
            Error::new(
                Kind::InvalidArgument,
                format!(
                    "{stream} {name:?}: {what}; it takes an absolute path, fifo://, file:// or binary://"
                ),
            )
        };
        if name.starts_with('/') {
            return Ok(Some(Place::Fifo(PathBuf::from(name))));
        }
        let (scheme, rest) =
            name.split_once("://").ok_or_else(|| invalid("it is neither path nor URI"))?;
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let path = PathBuf::from(decode(path));
        if !path.is_absolute() {
            return Err(invalid("the path is not absolute"));
        }
        match scheme {
            "fifo" => Ok(Some(Place::Fifo(path))),
            "file" => Ok(Some(Place::File(path))),
            "binary" => Ok(Some(Place::Program { path, args: arguments(query) })),
            _ => Err(invalid("unknown scheme")),
        }
    }
}

/// `key=value&flag` are the arguments `key`, `value`, `flag`.
fn arguments(query: &str) -> Vec<OsString> {
    query
        .split('&')
        .flat_map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            [key, value]
        })
        .filter(|word| !word.is_empty())
        .map(|word| decode(&word.replace('+', " ")))
        .collect()
}

/// Undo percent-encoding (RFC 3986 section 2.1); what is not valid stands for itself.
fn decode(text: &str) -> OsString {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let code = match tail {
            [high, low, ..] if first == b'%' => hex(*high).zip(hex(*low)),
            _ => None,
        };
        if let Some((high, low)) = code {
            bytes.push(high << 4 | low);
            rest = tail.get(2..).unwrap_or_default();
        } else {
            bytes.push(first);
            rest = tail;
        }
    }
    OsString::from_vec(bytes)
}

fn hex(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).and_then(|value| u8::try_from(value).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(name: &str) -> Result<Option<Place>> {
        Place::parse("stdout", name)
    }

    #[test]
    fn every_way_to_name_a_stream() {
        assert_eq!(parse("").unwrap(), None);
        assert_eq!(parse("/run/f").unwrap(), Some(Place::Fifo("/run/f".into())));
        assert_eq!(parse("fifo:///run/f").unwrap(), Some(Place::Fifo("/run/f".into())));
        assert_eq!(parse("file:///a%20b").unwrap(), Some(Place::File("/a b".into())));
        let program = Place::Program {
            path: "/bin/log".into(),
            args: ["id", "a b", "-v", "100%", "x"].map(OsString::from).into(),
        };
        assert_eq!(parse("binary:///bin/log?id=a%20b&-v&100%=x").unwrap(), Some(program));
    }

    #[test]
    fn other_names_are_refused() {
        for name in ["out", "http://host/x", "file://x", "fifo:", "binary://"] {
            let error = parse(name).unwrap_err();
            assert_eq!(error.kind(), Kind::InvalidArgument, "{name}");
            assert!(error.to_string().contains(&format!("{name:?}")), "{error}");
        }
    }
}
