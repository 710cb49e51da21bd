// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Host memory that becomes guest memory: mmap(2), memfd_create(2), madvise(2).
//!
//! A child process never inherits it (`MADV_DONTFORK`) and a core dump never contains it (`MADV_DONTDUMP`).

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::thread;

use ecr_arch::layout::Range;
use ecr_devices::memory::GuestMemory;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestRegionMmap, MmapRegion};

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

impl RamBacking {
    /// Get `size` bytes.
    pub(super) fn open(&self, size: u64) -> Result<Backing, MemoryError> {
        let sharing = if self.shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
        let (file, name) = match (&self.path, self.shared, self.hugepages) {
            (Some(path), ..) => {
                let name = path.display().to_string();
                (Some(open_path(path).map_err(failed(size, &name))?), name)
            }
            (None, true, _) | (None, _, Some(_)) => {
                let name = String::from("a memfd");
                (Some(memfd(self.hugepages).map_err(failed(size, &name))?), name)
            }
            (None, false, None) => (None, String::from("the host")),
        };
        if let Some(file) = &file {
            file.set_len(size).map_err(failed(size, &name))?;
            if self.path.is_none() {
                seal(file).map_err(failed(size, &name))?;
            }
        }
        let anonymous = if file.is_none() { libc::MAP_ANONYMOUS } else { 0 };
        Ok(Backing { file, name, flags: sharing | anonymous | libc::MAP_NORESERVE, next: 0 })
    }
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
        advise(&mapping).map_err(failed)?;
        GuestRegionMmap::new(mapping, GuestAddress(range.base))
            .ok_or_else(|| failed(io::Error::other("the guest's address space wraps around")))
    }
}

/// Linux maps persistent memory in pages of this size.
const IMAGE_ALIGNMENT: u64 = 2 << 20;

fn advise(mapping: &MmapRegion) -> io::Result<()> {
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
pub(super) fn discard(region: &GuestRegionMmap) -> io::Result<()> {
    let shared = region.flags() & libc::MAP_SHARED != 0;
    let advice = if shared { libc::MADV_REMOVE } else { libc::MADV_DONTNEED };
    madvise(region.as_ptr(), region.size(), advice)
}

/// Touch every page of `ranges`, with several threads: one would take seconds for tens of gigabytes.
pub(super) fn populate(memory: &GuestMemory, ranges: &[Range]) -> Result<(), MemoryError> {
    let threads = thread::available_parallelism().map_or(1, usize::from);
    for range in ranges {
        let Some(region) = memory.find_region(GuestAddress(range.base)) else { continue };
        let piece = region.size().div_ceil(threads).next_multiple_of(IMAGE_ALIGNMENT as usize);
        let start = region.as_ptr() as usize;
        let populated = thread::scope(|scope| {
            let pieces: Vec<_> = (0..region.size())
                .step_by(piece)
                .map(|at| {
                    let size = piece.min(region.size() - at);
                    scope.spawn(move || {
                        madvise((start + at) as *mut u8, size, libc::MADV_POPULATE_WRITE)
                    })
                })
                .collect();
            pieces.into_iter().try_for_each(|piece| {
                piece.join().unwrap_or_else(|_| Err(io::Error::other("a helper thread panicked")))
            })
        });
        populated.map_err(failed(range.size, "the host (preallocation)"))?;
    }
    Ok(())
}
