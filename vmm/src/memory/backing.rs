// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Host memory that becomes guest memory: mmap(2), memfd_create(2), madvise(2).
//!
//! A child process never inherits it (`MADV_DONTFORK`) and a core dump never contains it (`MADV_DONTDUMP`).

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::thread;

use ecr_arch::layout::Range;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryRegion, GuestRegionMmap, MmapRegion};

use super::MemoryError;
use crate::config::MemoryConfig;

/// Where RAM comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RamBacking {
    /// Other processes can map it.
    pub shared: bool,
    /// Size of huge pages in bytes.
    pub hugepages: Option<u64>,
    /// Touch all of it now.
    pub prealloc: bool,
    /// A directory for an unlinked file, or a file.
    pub path: Option<PathBuf>,
}

impl From<&MemoryConfig> for RamBacking {
    fn from(config: &MemoryConfig) -> Self {
        Self {
            shared: config.shared,
            hugepages: config.hugepages,
            prealloc: config.prealloc,
            path: config.path.clone(),
        }
    }
}

/// What is mapped: a file from an offset on, or anonymous memory.
#[derive(Debug)]
pub struct Backing {
    file: Option<File>,
    name: String,
    flags: libc::c_int,
    next: u64,
}

/// A guest may be promised this many times what the host has, for few guests use all of theirs. More is a
/// mistake, and one that shows only when the host runs out.
const OVERCOMMIT: u64 = 2;

impl RamBacking {
    /// Get memory for `ranges`.
    pub(super) fn open(&self, ranges: &[Range]) -> Result<Backing, MemoryError> {
        let size = ranges.iter().map(|range| range.size).sum();
        let name = match &self.path {
            Some(path) => path.display().to_string(),
            None => {
                check_against_host(size)?;
                String::from(if self.shared { "shared memory" } else { "the host" })
            }
        };
        self.check_pages(ranges).map_err(failed(size, &name))?;
        let file = self.open_file(size).map_err(failed(size, &name))?;
        let sharing = if self.shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
        // Huge pages come from a file, and are reserved: a guest that meets an empty pool later would raise
        // SIGBUS here.
        let anonymous = match file {
            None => libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            Some(_) => 0,
        };
        Ok(Backing { file, name, flags: sharing | anonymous, next: 0 })
    }

    /// The pieces of memory must each be made of whole pages.
    fn check_pages(&self, ranges: &[Range]) -> io::Result<()> {
        let Some(page) = self.hugepages else { return Ok(()) };
        match ranges.iter().find(|range| !range.size.is_multiple_of(page)) {
            Some(range) => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "the piece at {:#x} of {:#x} bytes is not made of pages of {page:#x} bytes: use smaller pages",
                    range.base, range.size
                ),
            )),
            None => Ok(()),
        }
    }

    /// A file of at least `size` bytes, where one is needed.
    fn open_file(&self, size: u64) -> io::Result<Option<File>> {
        if let Some(path) = &self.path {
            let file = open_path(path)?;
            // What a file holds beyond is not ours to cut off.
            if file.metadata()?.len() < size {
                file.set_len(size)?;
            }
            return Ok(Some(file));
        }
        if !self.shared && self.hugepages.is_none() {
            return Ok(None);
        }
        let file = memfd(self.hugepages)?;
        file.set_len(size)?;
        seal(&file)?;
        Ok(Some(file))
    }
}

fn check_against_host(size: u64) -> Result<(), MemoryError> {
    let mut info = MaybeUninit::<libc::sysinfo>::zeroed();
    // SAFETY: sysinfo fills the structure, of which all zeroes is a valid value too.
    let info = unsafe {
        libc::sysinfo(info.as_mut_ptr());
        info.assume_init()
    };
    let present = (info.totalram + info.totalswap).saturating_mul(info.mem_unit.into());
    if present != 0 && size > present.saturating_mul(OVERCOMMIT) {
        return Err(MemoryError::TooMuch { size, present });
    }
    Ok(())
}

fn failed(size: u64, from: &str) -> impl FnOnce(io::Error) -> MemoryError {
    let from = from.to_owned();
    move |source| MemoryError::Allocate { size, from, source }
}

/// A file in the directory `path` that has no name, or the file `path` itself.
fn open_path(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    if path.is_dir() {
        options.custom_flags(libc::O_TMPFILE).mode(0o600);
    } else {
        options.create(true).truncate(false).mode(0o600);
    }
    options.open(path)
}

fn memfd(hugepages: Option<u64>) -> io::Result<File> {
    let mut flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    if let Some(size) = hugepages {
        flags |= libc::MFD_HUGETLB | size.trailing_zeros() << libc::MFD_HUGE_SHIFT;
    }
    let name = CString::new("ecr-ram")?;
    // SAFETY: the name is a C string that lives through the call.
    match unsafe { libc::memfd_create(name.as_ptr(), flags) } {
        -1 => Err(io::Error::last_os_error()),
        // SAFETY: the descriptor is new, so nobody else owns it.
        fd => Ok(unsafe { File::from_raw_fd(fd) }),
    }
}

/// Nobody who has the descriptor can change its size, which would raise SIGBUS here.
fn seal(file: &File) -> io::Result<()> {
    let seals = libc::F_SEAL_GROW | libc::F_SEAL_SHRINK | libc::F_SEAL_SEAL;
    // SAFETY: fcntl takes numbers only.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

impl Backing {
    /// An image that is mapped privately: writes that go round the guest's read-only view, by a device
    /// that was told to, change a private copy of the page.
    pub fn image(path: &Path) -> Result<(Self, u64), MemoryError> {
        let failed = |problem: String| MemoryError::Image { path: path.to_owned(), problem };
        let file = File::open(path).map_err(|e| failed(e.to_string()))?;
        let metadata = file.metadata().map_err(|e| failed(e.to_string()))?;
        if !metadata.is_file() {
            return Err(failed("it is not a regular file".into()));
        }
        let size = metadata.len();
        if size == 0 || size % IMAGE_ALIGNMENT != 0 {
            return Err(failed(format!(
                "its size of {size} bytes is not a multiple of {} MiB: pad it",
                IMAGE_ALIGNMENT >> 20
            )));
        }
        let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE;
        let backing = Self { file: Some(file), name: path.display().to_string(), flags, next: 0 };
        Ok((backing, size))
    }

    /// Map the next `range.size` bytes for the guest at `range`.
    pub(super) fn map(&mut self, range: Range) -> Result<GuestRegionMmap, MemoryError> {
        let region = self.map_from(range, self.next)?;
        // Fewer faults, and fewer levels to walk in two tables. A kernel without them has nothing to lose.
        let _ = madvise(region.as_ptr(), region.size(), libc::MADV_HUGEPAGE);
        self.next += range.size;
        Ok(region)
    }

    /// Map an image for the guest at `range`.
    pub(super) fn map_image(&self, range: Range) -> Result<GuestRegionMmap, MemoryError> {
        self.map_from(range, 0)
    }

    fn map_from(&self, range: Range, offset: u64) -> Result<GuestRegionMmap, MemoryError> {
        let failed =
            |source| MemoryError::Allocate { size: range.size, from: self.name.clone(), source };
        let file = match &self.file {
            Some(file) => Some(FileOffset::new(file.try_clone().map_err(failed)?, offset)),
            None => None,
        };
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let size = usize::try_from(range.size).map_err(|e| failed(io::Error::other(e)))?;
        let mapping =
            MmapRegion::build(file, size, protection, self.flags).map_err(|e| match e {
                vm_memory::mmap::MmapRegionError::Mmap(source) => failed(source),
                other => failed(io::Error::other(other)),
            })?;
        keep_private(&mapping).map_err(failed)?;
        GuestRegionMmap::new(mapping, GuestAddress(range.base))
            .ok_or_else(|| failed(io::Error::other("the guest's address space wraps around")))
    }
}

/// Each thread touches a multiple of this, so that no two of them share a huge page.
const PIECE: usize = 2 << 20;

/// Linux maps persistent memory in pages of this size.
const IMAGE_ALIGNMENT: u64 = 2 << 20;

fn keep_private(mapping: &MmapRegion) -> io::Result<()> {
    madvise(mapping.as_ptr(), mapping.size(), libc::MADV_DONTFORK)?;
    madvise(mapping.as_ptr(), mapping.size(), libc::MADV_DONTDUMP)
}

fn madvise(start: *mut u8, size: usize, advice: libc::c_int) -> io::Result<()> {
    // SAFETY: the range is a mapping of guest memory, which nobody holds references into; none of the
    // advices used here unmaps it.
    match unsafe { libc::madvise(start.cast(), size, advice) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Throw away what `region` contains.
pub(super) fn discard(region: &GuestRegionMmap) -> Result<(), MemoryError> {
    let shared = region.flags() & libc::MAP_SHARED != 0;
    let advice = if shared { libc::MADV_REMOVE } else { libc::MADV_DONTNEED };
    madvise(region.as_ptr(), region.size(), advice)
        .map_err(failed(region.len(), "the host, cleared"))
}

/// Touch every page of `region`, with several threads: one would take seconds for tens of gigabytes.
pub(super) fn populate(region: &GuestRegionMmap) -> Result<(), MemoryError> {
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let piece = region.size().div_ceil(threads).next_multiple_of(PIECE);
    let start = region.as_ptr().expose_provenance();
    let populate = |at: usize| {
        let size = piece.min(region.size() - at);
        let start = std::ptr::with_exposed_provenance_mut(start + at);
        madvise(start, size, libc::MADV_POPULATE_WRITE)
    };
    let populated = thread::scope(|scope| {
        let pieces: Vec<_> = (0..region.size())
            .step_by(piece)
            .map(|at| {
                let builder = thread::Builder::new().name("ecr-prealloc".into());
                builder.spawn_scoped(scope, move || populate(at))
            })
            .collect();
        pieces.into_iter().try_for_each(|piece| {
            piece?.join().unwrap_or_else(|_| Err(io::Error::other("a helper thread panicked")))
        })
    });
    populated.map_err(failed(region.len(), "the host, all of it now"))
}

#[cfg(test)]
mod tests;
