// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! A raw file or block device of the host: opening, size, block sizes, and operations as system calls.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{Operation, Transfer};

/// Unit of sizes and offsets of virtio block devices.
const SECTOR_SIZE: u32 = 512;

/// Alignment that direct I/O is given where the host does not say what it needs.
const DIRECT_ALIGNMENT: u32 = 4096;

/// Why a file cannot back a block device.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The host refused an operation on it.
    #[error("{attempted} {}: {source}{hint}", path.display())]
    Host {
        /// What was attempted.
        attempted: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
        /// What to do about it.
        hint: &'static str,
    },
    /// It is a directory, a pipe, a terminal...
    #[error("{} is {kind}; a disk is a raw image file or a block device", path.display())]
    Kind {
        /// The file.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// It has no sectors, or part of one.
    #[error(
        "{} has {size} bytes, which is not a positive multiple of 512; is it a raw image? \
         `truncate -s %512` extends it",
        path.display()
    )]
    Size {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
}

/// An open raw file or block device. Clones share the descriptors.
#[derive(Debug, Clone)]
pub struct BlockFile(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    readonly: bool,
    device: bool,
    size: u64,
    logical_block_size: u32,
    physical_block_size: u32,
    file: File,
    direct: Option<Direct>,
}

/// What there is beside `file` when that bypasses the page cache.
#[derive(Debug)]
struct Direct {
    /// The same file through the page cache, for transfers that direct I/O cannot express. The kernel
    /// keeps both views of a file coherent.
    cached: File,
    /// Alignment of buffers in memory.
    memory: u32,
    /// Alignment of offsets and lengths.
    offset: u32,
}

impl BlockFile {
    /// Open `path`; `direct` bypasses the host's page cache.
    ///
    /// # Errors
    /// Any [`OpenError`].
    pub fn open(path: &Path, direct: bool, readonly: bool) -> Result<Self, OpenError> {
        let host = |attempted, hint| {
            let path = path.to_owned();
            move |source| OpenError::Host { attempted, path, source, hint }
        };
        // Looked at before it is opened: opening a pipe waits for its other end.
        let metadata = std::fs::metadata(path).map_err(host("looking for disk", ""))?;
        if let Some(kind) = unusable_kind(metadata.file_type()) {
            return Err(OpenError::Kind { path: path.to_owned(), kind });
        }
        let open = |path: &Path, flags| {
            OpenOptions::new().read(true).write(!readonly).custom_flags(flags).open(path)
        };
        let hint = match (direct, readonly) {
            (true, _) => " (direct I/O; does its file system allow it?)",
            (false, false) => " (for writing; a readonly disk needs less)",
            (false, true) => "",
        };
        let flags = if direct { libc::O_DIRECT } else { 0 };
        let file = open(path, flags).map_err(host("opening disk", hint))?;
        let metadata = file.metadata().map_err(host("looking at disk", ""))?;
        let device = metadata.file_type().is_block_device();

        let size = (&file).seek(SeekFrom::End(0)).map_err(host("finding the size of disk", ""))?;
        if size == 0 || !size.is_multiple_of(u64::from(SECTOR_SIZE)) {
            return Err(OpenError::Size { path: path.to_owned(), size });
        }
        let (logical_block_size, physical_block_size) = if device {
            device_block_sizes(&file).map_err(host("finding the block sizes of disk", ""))?
        } else {
            (SECTOR_SIZE, file_block_size(&metadata))
        };
        let direct = if direct {
            // By its descriptor: the path may lead elsewhere by now.
            let same = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
            let cached = open(&same, 0).map_err(host("opening disk a second time", ""))?;
            let fallback = if device { logical_block_size } else { DIRECT_ALIGNMENT };
            let (memory, offset) = direct_alignment(&file).unwrap_or((fallback, fallback));
            Some(Direct { cached, memory, offset })
        } else {
            None
        };
        Ok(Self(Arc::new(Inner {
            path: path.to_owned(),
            readonly,
            device,
            size,
            logical_block_size,
            physical_block_size,
            file,
            direct,
        })))
    }

    /// Where it was opened.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// Whether it was opened for reading only.
    pub fn readonly(&self) -> bool {
        self.0.readonly
    }

    /// Size in bytes when it was opened, a multiple of 512.
    pub fn size(&self) -> u64 {
        self.0.size
    }

    /// Smallest unit that the host reads and writes, in bytes: a power of two, 512 at least.
    pub fn logical_block_size(&self) -> u32 {
        self.0.logical_block_size
    }

    /// Smallest unit that the host writes without reading, in bytes: a power of two.
    pub fn physical_block_size(&self) -> u32 {
        self.0.physical_block_size
    }

    /// The descriptors, the first for [`Self::route`] to say `Main`.
    pub(super) fn descriptors(&self) -> Vec<RawFd> {
        let cached = self.0.direct.as_ref().map(|direct| direct.cached.as_raw_fd());
        [self.0.file.as_raw_fd()].into_iter().chain(cached).collect()
    }

    /// Which descriptor takes `transfer` at `offset`: an index into [`Self::descriptors`].
    pub(super) fn route(&self, offset: u64, transfer: &Transfer) -> usize {
        match &self.0.direct {
            Some(direct)
                if !offset.is_multiple_of(u64::from(direct.offset))
                    || !transfer.is_aligned(direct.memory, direct.offset) =>
            {
                1
            }
            _ => 0,
        }
    }

    /// Do `operation` now, on this thread.
    pub(super) fn run(&self, operation: Operation) -> io::Result<()> {
        match operation {
            Operation::Read { offset, into } => {
                self.transfer(offset, into, |fd, pieces, count, offset| {
                    // SAFETY: `pieces` are `count` pieces of guest memory that their `Transfer` keeps mapped
                    // for the whole call, and that may be written at any time.
                    unsafe { libc::preadv(fd, pieces, count, offset) }
                })
            }
            Operation::Write { offset, from, durable } => {
                let flags = if durable { libc::RWF_DSYNC } else { 0 };
                self.transfer(offset, from, |fd, pieces, count, offset| {
                    // SAFETY: `pieces` are `count` pieces of guest memory that their `Transfer` keeps mapped
                    // for the whole call.
                    unsafe { libc::pwritev2(fd, pieces, count, offset, flags) }
                })
            }
            Operation::Flush => self.0.file.sync_data(),
            Operation::Discard { offset, len } => match self.allocate(DISCARD_MODE, offset, len) {
                Err(error) if is_unsupported(&error) => self.discard_otherwise(offset, len),
                result => result,
            },
            Operation::WriteZeroes { offset, len, unmap } => {
                match self.allocate(zero_mode(unmap), offset, len) {
                    Err(error) if is_unsupported(&error) => {
                        self.write_zeroes_otherwise(offset, len)
                    }
                    result => result,
                }
            }
        }
    }

    /// Move all of `transfer` with `call`, which takes a descriptor, pieces, their number and an offset.
    fn transfer(
        &self,
        offset: u64,
        mut transfer: Transfer,
        call: impl Fn(RawFd, *const libc::iovec, libc::c_int, libc::off_t) -> isize,
    ) -> io::Result<()> {
        let mut offset = offset;
        while transfer.left() > 0 {
            let fd = match (self.route(offset, &transfer), &self.0.direct) {
                (1, Some(direct)) => direct.cached.as_raw_fd(),
                _ => self.0.file.as_raw_fd(),
            };
            let pieces = transfer.pieces();
            // At most 1024 pieces; a file's offsets fit an off_t.
            let moved = call(fd, pieces.as_ptr(), pieces.len() as i32, offset as libc::off_t);
            match u64::try_from(moved) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(moved) => {
                    transfer.advance(moved);
                    offset += moved;
                }
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
        Ok(())
    }

    fn allocate(&self, mode: i32, offset: u64, len: u64) -> io::Result<()> {
        let fd = self.0.file.as_raw_fd();
        // SAFETY: the descriptor is open, and the call touches no memory of this process.
        let result =
            unsafe { libc::fallocate(fd, mode, offset as libc::off_t, len as libc::off_t) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Discard where a hole cannot be punched. Some devices can forget, but not forget to zeros.
    pub(super) fn discard_otherwise(&self, offset: u64, len: u64) -> io::Result<()> {
        if !self.0.device {
            return Ok(());
        }
        let range = [offset, len];
        // SAFETY: BLKDISCARD reads two u64 through the pointer, and writes nothing.
        let result = unsafe { libc::ioctl(self.0.file.as_raw_fd(), BLKDISCARD, range.as_ptr()) };
        match io::Error::last_os_error() {
            error if result != 0 && !is_unsupported(&error) => Err(error),
            _ => Ok(()),
        }
    }

    /// Write zeros where the host has no quicker way.
    pub(super) fn write_zeroes_otherwise(&self, offset: u64, len: u64) -> io::Result<()> {
        static ZEROS: [u8; 1 << 16] = [0; 1 << 16];
        if self.allocate(zero_mode(false), offset, len).is_ok() {
            return Ok(());
        }
        let file = self.0.direct.as_ref().map_or(&self.0.file, |direct| &direct.cached);
        let end = offset + len;
        let mut at = offset;
        while at < end {
            let count = (end - at).min(ZEROS.len() as u64);
            file.write_all_at(&ZEROS[..count as usize], at)?;
            at += count;
        }
        Ok(())
    }
}

/// `fallocate` mode of a discard. On a block device too it zeroes, and gives the space back.
pub(super) const DISCARD_MODE: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;

/// Discard a range of a block device, `linux/fs.h`: `_IO(0x12, 119)`.
const BLKDISCARD: libc::Ioctl = 0x1277;

/// `fallocate` mode of a write of zeros. On a block device it is what BLKZEROOUT does.
pub(super) fn zero_mode(unmap: bool) -> i32 {
    if unmap { DISCARD_MODE } else { libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE }
}

/// Whether the host lacks an operation, rather than having failed at it.
pub(super) fn is_unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY))
}

fn unusable_kind(kind: std::fs::FileType) -> Option<&'static str> {
    if kind.is_file() || kind.is_block_device() {
        None
    } else if kind.is_dir() {
        Some("a directory")
    } else if kind.is_char_device() {
        Some("a character device")
    } else if kind.is_fifo() {
        Some("a pipe")
    } else {
        Some("a socket")
    }
}

/// Logical and physical block size of a block device.
fn device_block_sizes(file: &File) -> io::Result<(u32, u32)> {
    let get = |request| {
        let mut size: libc::c_uint = 0;
        // SAFETY: BLKSSZGET and BLKPBSZGET write one int through the pointer.
        if unsafe { libc::ioctl(file.as_raw_fd(), request, &raw mut size) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(size.max(SECTOR_SIZE))
    };
    Ok((get(libc::BLKSSZGET)?, get(libc::BLKPBSZGET)?))
}

/// The block size of the file system around a file, as a power of two that is no surprise to a guest.
fn file_block_size(metadata: &std::fs::Metadata) -> u32 {
    match u32::try_from(metadata.blksize()) {
        Ok(size @ SECTOR_SIZE..=DIRECT_ALIGNMENT) if size.is_power_of_two() => size,
        _ => DIRECT_ALIGNMENT,
    }
}

/// What direct I/O on `file` needs: alignment in memory, and of offsets and lengths. `None` where the
/// kernel (before 6.1) or the file system does not say.
fn direct_alignment(file: &File) -> Option<(u32, u32)> {
    // struct statx of linux/stat.h as 32-bit words, by their index: not every C library has it.
    const MASK: usize = 0;
    const DIO_MEM_ALIGN: usize = 0x98 / 4;
    const DIO_OFFSET_ALIGN: usize = 0x9c / 4;
    const STATX_DIOALIGN: u32 = 0x2000;
    let mut statx = [0u32; 64];
    let (fd, path) = (file.as_raw_fd(), c"".as_ptr());
    // SAFETY: the path is an empty C string, and the kernel writes the 256 bytes of a struct statx.
    let result = unsafe {
        let to = statx.as_mut_ptr();
        libc::syscall(libc::SYS_statx, fd, path, libc::AT_EMPTY_PATH, STATX_DIOALIGN, to)
    };
    let (memory, offset) = (statx[DIO_MEM_ALIGN], statx[DIO_OFFSET_ALIGN]);
    let said = result == 0 && statx[MASK] & STATX_DIOALIGN != 0;
    (said && memory.is_power_of_two() && offset.is_power_of_two()).then_some((memory, offset))
}
