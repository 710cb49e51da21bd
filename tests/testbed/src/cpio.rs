// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Writes an initramfs: cpio archives of format "newc" (Documentation/driver-api/early-userspace/buffer-format.rst).
//!
//! Directories and regular files owned by root are all that is needed here.

use std::io::{self, Write};

/// A cpio archive that is being written.
#[derive(Debug)]
pub struct Archive<W: Write> {
    to: W,
    entries: u32,
}

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;

impl<W: Write> Archive<W> {
    /// An empty archive.
    pub fn new(to: W) -> Self {
        Self { to, entries: 0 }
    }

    /// Adds a directory; its parent comes first.
    ///
    /// # Errors
    /// Those of the writer.
    pub fn directory(&mut self, name: &str) -> io::Result<()> {
        self.entry(name, DIRECTORY | 0o755, &[])
    }

    /// Adds a file.
    ///
    /// # Errors
    /// Those of the writer, or the content is longer than the format can say.
    pub fn file(&mut self, name: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        self.entry(name, REGULAR | mode, content)
    }

    /// Writes the archive's end.
    ///
    /// # Errors
    /// Those of the writer.
    pub fn finish(mut self) -> io::Result<()> {
        self.entry("TRAILER!!!", 0, &[])?;
        self.to.flush()
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        self.entries += 1;
        let size = u32::try_from(content.len()).map_err(|_| {
            io::Error::new(io::ErrorKind::InvalidInput, format!("{name} is too large for cpio"))
        })?;
        // ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
        let name_size = name.len() as u32 + 1;
        let fields = [self.entries, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0];
        let mut head = String::from("070701");
        head.extend(fields.iter().map(|field| format!("{field:08X}")));
        head.push_str(name);
        head.push('\0');
        self.padded(head.as_bytes())?;
        self.padded(content)
    }

    /// Header with name, and content, each end at a multiple of four.
    fn padded(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.to.write_all(bytes)?;
        self.to.write_all(&[0; 3][..bytes.len().wrapping_neg() % 4])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_is_laid_out_as_specified() {
        let mut bytes = Vec::new();
        let mut archive = Archive::new(&mut bytes);
        archive.directory("d").unwrap();
        archive.file("d/f", 0o755, b"hello").unwrap();
        archive.finish().unwrap();

        assert_eq!(bytes.len() % 4, 0);
        // The directory: a header of 110 bytes, "d\0".
        assert_eq!(&bytes[..6], b"070701");
        assert_eq!(&bytes[14..22], b"000041ED");
        // The file: 112 bytes further, "d/f\0" ends at 114 of 116, content padded to eight.
        let file = &bytes[112..];
        assert_eq!(&file[14..22], b"000081ED");
        assert_eq!(&file[54..62], b"00000005");
        assert_eq!(&file[110..114], b"d/f\0");
        assert_eq!(&file[116..124], b"hello\0\0\0");
        assert_eq!(&file[124..130], b"070701");
        assert!(bytes.windows(11).any(|w| w == b"TRAILER!!!\0"));
    }
}
