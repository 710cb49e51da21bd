// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Compressed kernels, as distributions ship them: a compressed `Image` alone, or inside of an EFI program that unpacks
//! it (Linux `drivers/firmware/efi/libstub/zboot-header.S`). Without firmware there is nobody who would run that
//! program, so it is unpacked here. Methods are those of RFC 1952 (gzip) and RFC 8878 (zstd); others are refused by
//! their names.

use std::io::{self, Read};

use super::super::{BootError, ReadAt, file_size, le32, read};

/// Offsets in the header of an EFI program that unpacks itself.
mod zboot {
    pub(super) const MAGIC: &[u8] = b"zimg";
    pub(super) const MAGIC_OFFSET: usize = 4;
    pub(super) const PAYLOAD_OFFSET: usize = 8;
    pub(super) const PAYLOAD_SIZE: usize = 12;
    pub(super) const METHOD: std::ops::Range<usize> = 24..56;
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Method {
    Gzip,
    Zstd,
}

impl Method {
    const fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
        }
    }
}

/// The bytes of a compressed kernel, at most `limit`; `None` if it is not compressed.
///
/// # Errors
/// It is damaged, too large, or compressed in another way.
pub(super) fn unpack(kernel: &dyn ReadAt, limit: u64) -> Result<Option<Vec<u8>>, BootError> {
    let size = file_size(kernel)?;
    let mut head = [0; 64];
    let known = usize::try_from(size).map_or(head.len(), |size| size.min(head.len()));
    read(kernel, "the first bytes", 0, &mut head[..known])?;
    let (method, offset, packed) = match head {
        [0x1f, 0x8b, ..] => (Method::Gzip, 0, size),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => (Method::Zstd, 0, size),
        _ if head.starts_with(b"MZ") && head[zboot::MAGIC_OFFSET..].starts_with(zboot::MAGIC) => {
            let offset = le32(&head, zboot::PAYLOAD_OFFSET).into();
            (zboot_method(&head)?, offset, le32(&head, zboot::PAYLOAD_SIZE).into())
        }
        _ => return Ok(None),
    };
    let packed = Part { kernel, at: offset, end: offset.saturating_add(packed).min(size) };
    let mut image = Vec::new();
    let outcome = match method {
        Method::Gzip => read_up_to(limit, flate2::read::GzDecoder::new(packed), &mut image),
        Method::Zstd => ruzstd::decoding::StreamingDecoder::new(packed)
            .map_err(io::Error::other)
            .and_then(|decoder| read_up_to(limit, decoder, &mut image)),
    };
    let method = method.name();
    outcome.map_err(|source| BootError::Unpack { method, source })?;
    if image.len() as u64 > limit {
        return Err(BootError::UnpackedTooLarge { method, limit });
    }
    Ok(Some(image))
}

/// One byte more than `limit` shows that there is more.
fn read_up_to(limit: u64, from: impl Read, image: &mut Vec<u8>) -> io::Result<()> {
    from.take(limit.saturating_add(1)).read_to_end(image).map(drop)
}

fn zboot_method(head: &[u8; 64]) -> Result<Method, BootError> {
    let name = head[zboot::METHOD].split(|&byte| byte == 0).next().unwrap_or_default();
    match name {
        b"gzip" => Ok(Method::Gzip),
        // The kernel's build also says with which window: zstd22.
        _ if name.starts_with(b"zstd") => Ok(Method::Zstd),
        other => {
            let method = String::from_utf8_lossy(other);
            Err(BootError::NotAKernel(format!(
                "it is an EFI program that holds a kernel compressed by {method:?}: use one compressed by gzip or zstd, or \
                 an Image"
            )))
        }
    }
}

/// A part of the kernel file.
struct Part<'a> {
    kernel: &'a dyn ReadAt,
    at: u64,
    end: u64,
}

impl Read for Part<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.end.saturating_sub(self.at)).unwrap_or(usize::MAX);
        let count = left.min(buf.len());
        self.kernel.read_exact_at(&mut buf[..count], self.at)?;
        self.at += count as u64;
        Ok(count)
    }
}
