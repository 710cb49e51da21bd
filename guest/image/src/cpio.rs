// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The cpio archive in its "newc" form, as the kernel unpacks it (Documentation/driver-api/early-userspace/
//! buffer-format.rst): per entry a header of hexadecimal digits, the name and the data, each padded to 4 bytes.

use std::fs;
use std::io::Write;

use anyhow::{Context, Result};

use crate::manifest::{Entry, Kind, Manifest, OWNER, TIME};

const MAGIC: &str = "070701";
const TRAILER: &str = "TRAILER!!!";

/// File types of stat(2).
const S_IFDIR: u32 = 0o040000;
const S_IFREG: u32 = 0o100000;
const S_IFLNK: u32 = 0o120000;
const S_IFCHR: u32 = 0o020000;

struct Header<'a> {
    inode: u32,
    mode: u32,
    links: u32,
    time: u32,
    device: (u32, u32),
    name: &'a str,
}

/// Write `manifest` as an archive.
pub fn write(manifest: &Manifest, output: &mut impl Write) -> Result<()> {
    for (entry, inode) in manifest.entries.iter().zip(1..) {
        let (data, kind, device) = match &entry.kind {
            Kind::Directory => (Vec::new(), S_IFDIR, (0, 0)),
            Kind::File { source } => {
                let data =
                    fs::read(source).with_context(|| format!("read {}", source.display()))?;
                (data, S_IFREG, (0, 0))
            }
            Kind::Link { target } => (target.clone().into_bytes(), S_IFLNK, (0, 0)),
            Kind::CharacterDevice { major, minor } => (Vec::new(), S_IFCHR, (*major, *minor)),
        };
        let header = Header {
            inode,
            mode: kind | entry.mode,
            links: if entry.kind == Kind::Directory { 2 } else { 1 },
            time: TIME,
            device,
            name: relative(entry),
        };
        write_entry(&header, &data, output)?;
    }
    let end = Header { inode: 0, mode: 0, links: 1, time: 0, device: (0, 0), name: TRAILER };
    write_entry(&end, &[], output)
}

fn relative(entry: &Entry) -> &str {
    entry.path.trim_start_matches('/')
}

fn write_entry(header: &Header<'_>, data: &[u8], output: &mut impl Write) -> Result<()> {
    let size = u32::try_from(data.len()).with_context(|| format!("{}: over 4 GiB", header.name))?;
    let name_size = header.name.len() as u32 + 1;
    let fields = [
        header.inode,
        header.mode,
        OWNER,
        OWNER,
        header.links,
        header.time,
        size,
        0, // The file system's device number.
        0,
        header.device.0,
        header.device.1,
        name_size,
        0, // A checksum only in the "crc" form.
    ];
    let mut text = String::from(MAGIC);
    for field in fields {
        text.push_str(&format!("{field:08X}"));
    }
    text.push_str(header.name);
    text.push('\0');
    write_padded(text.as_bytes(), output)?;
    write_padded(data, output)
}

fn write_padded(bytes: &[u8], output: &mut impl Write) -> Result<()> {
    let padding = bytes.len().next_multiple_of(4) - bytes.len();
    output.write_all(bytes)?;
    Ok(output.write_all(&[0; 4][..padding])?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    fn archive(dir: &std::path::Path) -> Vec<u8> {
        let source = dir.join("source");
        fs::write(&source, "hello").unwrap();
        let list = dir.join("list");
        let text = format!(
            "dir /d 0750\nfile /d/f 0644 {}\nlink /d/l f\nnode /n 0600 c 5 1\n",
            source.display()
        );
        fs::write(&list, text).unwrap();
        let mut bytes = Vec::new();
        write(&Manifest::read(&list).unwrap(), &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn the_first_header() {
        let dir = tempfile::tempdir().unwrap();
        let expected = "070701\
            00000001000041E8000000000000000000000002\
            5E0BE10000000000\
            00000000000000000000000000000000\
            0000000200000000d\0";
        assert!(archive(dir.path()).starts_with(expected.as_bytes()));
    }

    /// GNU cpio, where it is installed, reads the same from it.
    #[test]
    fn gnu_cpio_understands_it() {
        let dir = tempfile::tempdir().unwrap();
        let bytes = archive(dir.path());
        let cpio = Command::new("cpio")
            .args(["--list", "--verbose", "--numeric-uid-gid", "--quiet"])
            .env("TZ", "UTC")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        let Ok(mut cpio) = cpio else {
            eprintln!("SKIPPED: no cpio program");
            return;
        };
        cpio.stdin.take().unwrap().write_all(&bytes).unwrap();
        let output = cpio.wait_with_output().unwrap();
        assert!(output.status.success());
        let listing = String::from_utf8(output.stdout).unwrap();
        let starts: Vec<_> =
            listing.lines().map(|line| line.split_whitespace().next().unwrap()).collect();
        assert_eq!(starts, ["drwxr-x---", "-rw-r--r--", "lrwxrwxrwx", "crw-------"], "{listing}");
        assert!(listing.contains("d/l -> f"), "{listing}");
        assert!(listing.contains("5,   1"), "{listing}");
    }
}
