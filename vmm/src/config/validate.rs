// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What is wrong with a configuration, found before anything is created.
//!
//! Only what can be told from the values alone. What depends on the host (how many vCPUs, how wide an address,
//! whether a file is there) is told by whoever asks the host.

use std::collections::HashMap;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use ecr_devices::backend::unix_socket;

use super::{ChardevConfig, DiskConfig, MemoryConfig, VmConfig, VsockBackend};

const MIB: u64 = 1 << 20;
/// Smallest page there is.
const PAGE: u64 = 4096;
/// Most bytes of a disk's serial number (virtio 1.3, 5.2.6.1).
const SERIAL_MAX: usize = 20;
/// Most entries of a queue, as with QEMU.
const QUEUE_SIZE_MAX: u16 = 1024;
/// Most request queues of a disk.
pub(super) const QUEUES_MAX: u16 = 256;
/// Most threads that serve device queues.
const IO_THREADS_MAX: u16 = 64;
/// Context ids that mean something else: hypervisor, local, host (vsock(7)).
const CID_RESERVED: u32 = 2;
/// The context id that stands for any.
const CID_ANY: u32 = u32::MAX;

/// A value that cannot work. The text names the field and the value, and says what would work.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct ConfigError {
    /// Which field.
    pub field: String,
    /// The value, and what is wrong with it.
    pub problem: String,
}

type Result = std::result::Result<(), ConfigError>;

fn refuse(field: impl Into<String>, problem: impl Into<String>) -> Result {
    Err(ConfigError { field: field.into(), problem: problem.into() })
}

impl VmConfig {
    /// Check all that can be checked without touching the host.
    ///
    /// # Errors
    /// The first value that cannot work.
    pub fn validate(&self) -> Result {
        self.check_cpus()?;
        self.memory.check()?;
        self.check_boot()?;
        if let Some(nvdimm) = &self.nvdimm {
            check_path("nvdimm.path", &nvdimm.path)?;
        }
        for (index, disk) in self.disks.iter().enumerate() {
            disk.check(&format!("disks[{index}]"))?;
        }
        if let Some(rng) = &self.rng {
            check_path("rng.path", &rng.path)?;
        }
        self.check_vsock()?;
        check_chardev("console", &self.console)?;
        check_chardev("serial", &self.serial)?;
        if self.io_threads > IO_THREADS_MAX {
            let problem = format!("{} is too many: use at most {IO_THREADS_MAX}", self.io_threads);
            return refuse("io_threads", problem);
        }
        self.check_ids()?;
        self.check_images()?;
        self.check_sockets()
    }

    fn check_cpus(&self) -> Result {
        let (boot, max) = (self.cpus.boot, self.cpus.max);
        if boot == 0 {
            return refuse("cpus.boot", "0 vCPUs cannot run anything: use at least 1");
        }
        if max < boot {
            let problem =
                format!("{max} is less than the {boot} present at boot: use {boot} or more");
            return refuse("cpus.max", problem);
        }
        Ok(())
    }

    fn check_boot(&self) -> Result {
        check_path("boot.kernel", &self.boot.kernel)?;
        if let Some(initrd) = &self.boot.initrd {
            check_path("boot.initrd", initrd)?;
        }
        match self.boot.cmdline.bytes().position(|byte| byte == 0) {
            Some(at) => {
                let problem =
                    format!("has a zero byte at offset {at}, which would end it: remove it");
                refuse("boot.cmdline", problem)
            }
            None => Ok(()),
        }
    }

    fn check_vsock(&self) -> Result {
        let Some(vsock) = &self.vsock else { return Ok(()) };
        let cid = vsock.cid;
        if cid <= CID_RESERVED || cid == CID_ANY {
            let problem =
                format!("{cid} is reserved: use one from {} to {}", CID_RESERVED + 1, CID_ANY - 1);
            return refuse("vsock.cid", problem);
        }
        match &vsock.backend {
            VsockBackend::Vhost { fd: Some(fd) } => check_fd("vsock.backend.vhost.fd", *fd),
            VsockBackend::Vhost { fd: None } => Ok(()),
            VsockBackend::Unix { path } => check_socket("vsock.backend.unix.path", path),
        }
    }

    /// Each id once, and such as QEMU's clients can name.
    fn check_ids(&self) -> Result {
        let nvdimm = self.nvdimm.iter().map(|nvdimm| ("nvdimm.id".to_owned(), &nvdimm.id));
        let disks = self.disks.iter().enumerate();
        let disks = disks.map(|(index, disk)| (format!("disks[{index}].id"), &disk.id));
        let mut seen = HashMap::new();
        for (field, id) in nvdimm.chain(disks) {
            let mut characters = id.chars();
            let well_formed = characters.next().is_some_and(|first| first.is_ascii_alphabetic())
                && characters.all(|next| next.is_ascii_alphanumeric() || "-._".contains(next));
            if !well_formed {
                let problem = format!(
                    "{id:?} is no id: use a letter, then letters, digits, '-', '.' and '_'"
                );
                return refuse(field, problem);
            }
            if let Some(first) = seen.insert(id, field.clone()) {
                return refuse(
                    field,
                    format!("{id:?} is also {first}: give each device its own id"),
                );
            }
        }
        Ok(())
    }

    /// No image that one device writes and another one uses.
    fn check_images(&self) -> Result {
        let nvdimm =
            self.nvdimm.iter().map(|nvdimm| ("nvdimm.path".to_owned(), &nvdimm.path, false));
        let disks = self.disks.iter().enumerate();
        let disks =
            disks.map(|(index, disk)| (format!("disks[{index}].path"), &disk.path, !disk.readonly));
        let mut seen: HashMap<&Path, (String, bool)> = HashMap::new();
        for (field, path, writable) in nvdimm.chain(disks) {
            if let Some((first, first_writable)) = seen.get(path.as_path())
                && (writable || *first_writable)
            {
                let problem = format!(
                    "{path:?} is also {first}, and what one writes corrupts the other: make all of them \
                     read-only or use two images"
                );
                return refuse(field, problem);
            }
            seen.insert(path, (field, writable));
        }
        Ok(())
    }

    /// Each socket once.
    fn check_sockets(&self) -> Result {
        let vsock = self.vsock.iter().filter_map(|vsock| match &vsock.backend {
            VsockBackend::Unix { path } => Some(("vsock.backend.unix.path", path)),
            VsockBackend::Vhost { .. } => None,
        });
        let consoles = [("console", &self.console), ("serial", &self.serial)];
        let consoles = consoles.into_iter().filter_map(|(field, chardev)| match chardev {
            ChardevConfig::Unix { path } => Some((field, path)),
            _ => None,
        });
        let mut seen = HashMap::new();
        for (field, path) in vsock.chain(consoles) {
            if let Some(first) = seen.insert(path, field) {
                return refuse(field, format!("{path:?} is also {first}: use a socket for each"));
            }
        }
        Ok(())
    }
}

impl MemoryConfig {
    fn check(&self) -> Result {
        check_size("memory.size", self.size)?;
        let max = self.max.unwrap_or(self.size);
        if let Some(max) = self.max {
            check_size("memory.max", max)?;
        }
        if max < self.size {
            let problem = format!(
                "{max} bytes is less than the {} present at boot: use as much or more",
                self.size
            );
            return refuse("memory.max", problem);
        }
        if max > self.size && self.slots == 0 {
            let problem = "0 leaves no slot for the memory that memory.max promises: use 1 or more";
            return refuse("memory.slots", problem);
        }
        if max == self.size && self.slots > 0 {
            let problem = format!(
                "{} slots and no memory to put into them: set memory.max above memory.size",
                self.slots
            );
            return refuse("memory.slots", problem);
        }
        if let Some(page) = self.hugepages {
            self.check_hugepages(page)?;
        }
        match &self.path {
            Some(path) => check_path("memory.path", path),
            None => Ok(()),
        }
    }

    fn check_hugepages(&self, page: u64) -> Result {
        if !page.is_power_of_two() || page <= PAGE {
            let problem = format!("{page} bytes is no size of a huge page: use 2 MiB or 1 GiB");
            return refuse("memory.hugepages", problem);
        }
        if !self.size.is_multiple_of(page) {
            let problem = format!(
                "{} bytes is not a whole number of huge pages of {page} bytes: use a multiple of them",
                self.size
            );
            return refuse("memory.size", problem);
        }
        Ok(())
    }
}

impl DiskConfig {
    fn check(&self, field: &str) -> Result {
        check_path(&format!("{field}.path"), &self.path)?;
        if let Some(serial) = &self.serial
            && serial.len() > SERIAL_MAX
        {
            let length = serial.len();
            let problem = format!("{serial:?} is {length} bytes long: use at most {SERIAL_MAX}");
            return refuse(format!("{field}.serial"), problem);
        }
        if self.queues > QUEUES_MAX {
            let problem = format!(
                "{} is too many: use at most {QUEUES_MAX}, or 0 for one a vCPU",
                self.queues
            );
            return refuse(format!("{field}.queues"), problem);
        }
        if !self.queue_size.is_power_of_two() || !(2..=QUEUE_SIZE_MAX).contains(&self.queue_size) {
            let problem = format!(
                "{} is no size of a queue: use a power of two from 2 to {QUEUE_SIZE_MAX}",
                self.queue_size
            );
            return refuse(format!("{field}.queue_size"), problem);
        }
        Ok(())
    }
}

fn check_size(field: &str, size: u64) -> Result {
    if size == 0 {
        return refuse(field, "0 bytes cannot hold a kernel: use at least 1 MiB");
    }
    if !size.is_multiple_of(MIB) {
        let (below, above) = (size / MIB, (size / MIB).saturating_add(1));
        let problem =
            format!("{size} bytes is not a whole number of MiB: use {below} MiB or {above} MiB");
        return refuse(field, problem);
    }
    Ok(())
}

fn check_path(field: &str, path: &Path) -> Result {
    if path.as_os_str().is_empty() {
        return refuse(field, "is empty: name a file");
    }
    if path.as_os_str().as_bytes().contains(&0) {
        return refuse(field, format!("{path:?} has a zero byte in it: remove it"));
    }
    Ok(())
}

/// Check the path of a unix socket.
pub(crate) fn check_socket(field: &str, path: &Path) -> Result {
    check_path(field, path)?;
    let length = path.as_os_str().len();
    if length > unix_socket::MAX_PATH {
        let problem = format!(
            "{path:?} is {length} bytes long, more than the {} of a unix socket: choose a shorter path",
            unix_socket::MAX_PATH
        );
        return refuse(field, problem);
    }
    Ok(())
}

fn check_fd(field: &str, fd: i32) -> Result {
    if fd < 0 {
        return refuse(field, format!("{fd} is no descriptor: use one that is open"));
    }
    Ok(())
}

fn check_chardev(field: &str, chardev: &ChardevConfig) -> Result {
    match chardev {
        ChardevConfig::Off | ChardevConfig::Null => Ok(()),
        ChardevConfig::Fds { input, output } => {
            input.map_or(Ok(()), |fd| check_fd(&format!("{field}.input"), fd))?;
            check_fd(&format!("{field}.output"), *output)
        }
        ChardevConfig::File { path } => check_path(&format!("{field}.path"), path),
        ChardevConfig::Unix { path } => check_socket(&format!("{field}.path"), path),
    }
}

#[cfg(test)]
mod tests;
