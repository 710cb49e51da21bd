// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! `/proc/thread-self/mountinfo` (proc_pid_mountinfo(5)).

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt as _;
use std::path::PathBuf;

use anyhow::{Context as _, Result};

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// What of the file system is mounted here: `/` unless it is a bind of a part.
    pub root: PathBuf,
    /// Where.
    pub point: PathBuf,
    /// File system type.
    pub kind: String,
    /// What is mounted, as the file system names it.
    pub source: PathBuf,
    /// The file system's own options.
    pub options: String,
}

/// The mounts of the calling thread's mount namespace, each after the one that it lies on.
pub fn read() -> Result<Vec<Entry>> {
    // Not `self`: a thread may be in a mount namespace of its own.
    const PATH: &str = "/proc/thread-self/mountinfo";
    let text = fs::read(PATH).with_context(|| format!("read {PATH}"))?;
    Ok(parse(&text))
}

/// Lines that are not as the manual says are skipped.
fn parse(text: &[u8]) -> Vec<Entry> {
    text.split(|&byte| byte == b'\n').filter_map(parse_line).collect()
}

/// `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue`
fn parse_line(line: &[u8]) -> Option<Entry> {
    let mut fields = line.split(|&byte| byte == b' ');
    let root = unescape(fields.nth(3)?);
    let point = unescape(fields.next()?);
    let mut rest = fields.skip_while(|field| *field != b"-").skip(1);
    let kind = String::from_utf8_lossy(rest.next()?).into_owned();
    let source = unescape(rest.next()?);
    let options = String::from_utf8_lossy(rest.next().unwrap_or_default()).into_owned();
    Some(Entry { root, point, kind, source, options })
}

/// Space, tab, newline and backslash are written as three octal digits behind a backslash.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        if first == b'\\'
            && let [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', tail @ ..] = tail
        {
            bytes.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
            rest = tail;
        } else {
            bytes.push(first);
            rest = tail;
        }
    }
    PathBuf::from(OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_with_optional_fields_and_escapes() {
        let text = b"36 35 98:0 /mnt1 /mnt\\0402 rw,noatime master:1 shared:2 - ext3 /dev/root rw,errors=continue\n\
            short line\n\
            31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755";
        let entries = parse(text);
        assert_eq!(entries.len(), 2);
        assert_eq!(entries[0].root, PathBuf::from("/mnt1"));
        assert_eq!(entries[0].point, PathBuf::from("/mnt 2"));
        assert_eq!(entries[0].kind, "ext3");
        assert_eq!(entries[0].source, PathBuf::from("/dev/root"));
        assert_eq!(entries[0].options, "rw,errors=continue");
        assert_eq!(entries[1].kind, "tmpfs");
    }

    #[test]
    fn a_backslash_that_escapes_nothing_stays() {
        assert_eq!(unescape(b"a\\9b\\134\\04"), PathBuf::from("a\\9b\\\\04"));
    }

    #[test]
    fn this_process_has_mounts() {
        assert!(read().unwrap().iter().any(|entry| entry.point.ends_with("proc")));
    }
}
