// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Carry out a boot plan: read the kernel and the initial RAM disk straight into guest memory.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use ecr_arch::boot::{BootFile, Load, ReadAt, Source};
use ecr_devices::memory::GuestMemory;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, ReadVolatile, VolatileSlice};

/// A file that the guest boots from, kept open so that a reset can read it again.
#[derive(Debug)]
pub struct BootImage {
    path: PathBuf,
    file: File,
}

/// Why a boot file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BootImageError {
    /// It cannot be opened.
    #[error("open {what} {path}: {source}", path = path.display())]
    Open {
        /// Kernel or initrd.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is a directory, a pipe or a device.
    #[error("{what} {path} is not a regular file", path = path.display())]
    NotAFile {
        /// Kernel or initrd.
        what: &'static str,
        /// The file.
        path: PathBuf,
    },
    /// Its bytes cannot be put where the plan says.
    #[error("load {what} at {address:#x} ({size} bytes): {problem}")]
    Load {
        /// What.
        what: &'static str,
        /// Guest-physical address.
        address: u64,
        /// Size in bytes.
        size: u64,
        /// What went wrong.
        problem: String,
    },
}

impl BootImage {
    /// Open `path`; `what` names it in errors.
    ///
    /// # Errors
    /// [`BootImageError::Open`] or [`BootImageError::NotAFile`].
    pub fn open(what: &'static str, path: &Path) -> Result<Self, BootImageError> {
        let open_error = |source| BootImageError::Open { what, path: path.to_path_buf(), source };
        let file = File::open(path).map_err(open_error)?;
        if !file.metadata().map_err(open_error)?.is_file() {
            return Err(BootImageError::NotAFile { what, path: path.to_path_buf() });
        }
        Ok(Self { path: path.to_path_buf(), file })
    }

    /// Where it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl ReadAt for BootImage {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }
}

/// What a guest boots from.
#[derive(Debug)]
pub struct BootImages {
    /// The kernel.
    pub kernel: BootImage,
    /// The initial RAM disk.
    pub initrd: Option<BootImage>,
}

impl BootImages {
    /// Put everything that `loads` names into `memory`.
    ///
    /// # Errors
    /// A load that lies outside of memory, or a file that has become shorter.
    pub fn load(&self, loads: &[Load], memory: &GuestMemory) -> Result<(), BootImageError> {
        loads.iter().try_for_each(|load| self.load_one(load, memory))
    }

    fn load_one(&self, load: &Load, memory: &GuestMemory) -> Result<(), BootImageError> {
        let address = GuestAddress(load.address);
        let (size, outcome) = match &load.source {
            Source::Bytes(bytes) => {
                (bytes.len() as u64, memory.write_slice(bytes, address).map_err(|e| e.to_string()))
            }
            Source::File { file, offset, size } => {
                let image = match file {
                    BootFile::Kernel => Some(&self.kernel),
                    BootFile::Initrd => self.initrd.as_ref(),
                };
                let outcome = image
                    .ok_or_else(|| String::from("there is no such file"))
                    .and_then(|image| read_into(image, *offset, *size, memory, address));
                (*size, outcome)
            }
        };
        outcome.map_err(|problem| BootImageError::Load {
            what: load.what,
            address: load.address,
            size,
            problem,
        })
    }
}

/// Read `size` bytes of `image` from `offset` on to `address`, with no copy in between.
fn read_into(
    image: &BootImage,
    offset: u64,
    size: u64,
    memory: &GuestMemory,
    address: GuestAddress,
) -> Result<(), String> {
    let count = usize::try_from(size).map_err(|e| e.to_string())?;
    let mut source = FileAt { file: &image.file, offset };
    for slice in memory.get_slices(address, count) {
        let slice = slice.map_err(|e| e.to_string())?;
        source.read_exact_volatile(&mut slice.offset(0).map_err(|e| e.to_string())?).map_err(
            |e| format!("read {} bytes from {}: {e}", slice.len(), image.path.display()),
        )?;
    }
    Ok(())
}

/// A position in a file that does not move the file's own.
struct FileAt<'a> {
    file: &'a File,
    offset: u64,
}

impl ReadVolatile for FileAt<'_> {
    fn read_volatile<B: vm_memory::bitmap::BitmapSlice>(
        &mut self,
        buf: &mut VolatileSlice<'_, B>,
    ) -> Result<usize, vm_memory::VolatileMemoryError> {
        use std::os::fd::AsRawFd;
        let guard = buf.ptr_guard_mut();
        let offset = libc::off_t::try_from(self.offset)
            .map_err(|e| vm_memory::VolatileMemoryError::IOError(io::Error::other(e)))?;
        // SAFETY: the guard points to `buf.len()` bytes of guest memory that stay mapped while it lives;
        // guest memory is only ever accessed through raw pointers.
        let read =
            unsafe { libc::pread(self.file.as_raw_fd(), guard.as_ptr().cast(), buf.len(), offset) };
        let read = usize::try_from(read)
            .map_err(|_| vm_memory::VolatileMemoryError::IOError(io::Error::last_os_error()))?;
        self.offset += read as u64;
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn image(bytes: &[u8]) -> (tempfile::NamedTempFile, BootImage) {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        let image = BootImage::open("kernel", file.path()).unwrap();
        (file, image)
    }

    fn at(source: Source, address: u64) -> [Load; 1] {
        [Load { what: "kernel", address, source }]
    }

    fn memory() -> GuestMemory {
        GuestMemory::from_ranges(&[(GuestAddress(0), 0x1000), (GuestAddress(0x1000), 0x1000)])
            .unwrap()
    }

    #[test]
    fn file_ranges_and_bytes_land_at_their_addresses() {
        let (_file, kernel) = image(b"0123456789");
        let images = BootImages { kernel, initrd: None };
        let memory = memory();
        let file = Source::File { file: BootFile::Kernel, offset: 2, size: 6 };
        // Across the border of two regions.
        images.load(&at(file, 0xffd), &memory).unwrap();
        images.load(&at(Source::Bytes(vec![7, 8]), 0x10), &memory).unwrap();
        let mut read = [0; 6];
        memory.read_slice(&mut read, GuestAddress(0xffd)).unwrap();
        assert_eq!(&read, b"234567");
        assert_eq!(memory.read_obj::<u16>(GuestAddress(0x10)).unwrap(), 0x0807);
    }

    #[test]
    fn a_file_that_has_become_shorter_is_an_error_that_names_it() {
        let (file, kernel) = image(b"0123456789");
        let images = BootImages { kernel, initrd: None };
        let source = Source::File { file: BootFile::Kernel, offset: 0, size: 11 };
        let error = images.load(&at(source, 0), &memory()).unwrap_err().to_string();
        assert!(error.contains(&*file.path().to_string_lossy()), "{error}");
    }

    #[test]
    fn a_load_outside_of_memory_is_an_error() {
        let (_file, kernel) = image(b"0123456789");
        let images = BootImages { kernel, initrd: None };
        let source = Source::File { file: BootFile::Kernel, offset: 0, size: 10 };
        assert!(images.load(&at(source, 0x1ffd), &memory()).is_err());
        assert!(images.load(&at(Source::Bytes(vec![0; 4]), 0x1ffd), &memory()).is_err());
    }

    #[test]
    fn directories_and_missing_files_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let refused = BootImage::open("kernel", directory.path());
        assert!(matches!(refused, Err(BootImageError::NotAFile { .. })));
        let refused = BootImage::open("kernel", &directory.path().join("none"));
        assert!(matches!(refused, Err(BootImageError::Open { .. })));
    }
}
