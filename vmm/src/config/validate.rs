// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What is wrong with a configuration, found before anything is created.
//!
//! Only what can be told from the values alone. What depends on the host (how many vCPUs, how wide an address,
//! whether a file is there) is told by whoever asks the host.

use std::collections::HashMap;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use ecr_arch::layout::virt;
use ecr_devices::backend::unix_socket;

use super::{
    ChardevConfig, DiskConfig, FsConfig, GicVersion, MachineType, MemoryConfig, NetConfig,
    TapConfig, VmConfig, VsockBackend,
};

const MIB: u64 = 1 << 20;
/// Smallest page there is.
const PAGE: u64 = 4096;
/// Most bytes of a disk's serial number (virtio 1.3, 5.2.6.1).
const SERIAL_MAX: usize = 20;
/// Most entries of a queue, as with QEMU.
const QUEUE_SIZE_MAX: u16 = 1024;
/// Most request queues of a disk.
pub(super) const QUEUES_MAX: u16 = 256;
/// Most pairs of queues of a network device: as many as a tap of Linux has (linux/if_tun.h).
const QUEUE_PAIRS_MAX: u16 = 256;
/// Smallest MTU (virtio 1.3, 5.1.4.1).
const MTU_MIN: u16 = 68;
/// Most bytes of the name of an interface (IFNAMSIZ, less its end).
const IFNAME_MAX: usize = 15;
/// Most bytes of the tag of a file system (virtio 1.3, 5.11.4).
const TAG_MAX: usize = 36;
/// Most threads that serve device queues.
const IO_THREADS_MAX: u16 = 64;
/// Most PCI bridges, as with Kata.
const BRIDGES_MAX: u8 = 5;
/// Most vCPUs behind a GICv2 (Arm IHI 0048, 1.3.1).
pub(crate) const GIC_V2_CPUS: u32 = 8;
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
        self.check_machine()?;
        self.memory.check()?;
        self.check_boot()?;
        if let Some(nvdimm) = &self.nvdimm {
            check_path("nvdimm.path", &nvdimm.path)?;
        }
        for (index, disk) in self.disks.iter().enumerate() {
            disk.check(&format!("disks[{index}]"))?;
        }
        for (index, net) in self.nets.iter().enumerate() {
            net.check(&format!("nets[{index}]"))?;
        }
        self.check_taps()?;
        for (index, fs) in self.fs.iter().enumerate() {
            fs.check(&format!("fs[{index}]"))?;
        }
        self.check_fs()?;
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
        if self.bridges > BRIDGES_MAX {
            let problem = format!("{} is too many: use at most {BRIDGES_MAX}", self.bridges);
            return refuse("bridges", problem);
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

    fn check_machine(&self) -> Result {
        if self.machine != MachineType::Virt {
            if self.gic != GicVersion::Host {
                let machine = self.machine.name();
                let problem = format!("the machine type {machine} has no GIC: leave it out");
                return refuse("gic", problem);
            }
            if !self.acpi {
                let machine = self.machine.name();
                let problem = format!(
                    "off, but the machine type {machine} has no other description: leave it on"
                );
                return refuse("acpi", problem);
            }
        }
        let cpus = self.cpus.max;
        if self.machine == MachineType::Virt && cpus > virt::MAX_CPUS {
            let most = virt::MAX_CPUS;
            let problem =
                format!("{cpus} is more than the {most} that the machine type virt can have");
            return refuse("cpus.max", problem);
        }
        if self.gic == GicVersion::V2 && cpus > GIC_V2_CPUS {
            let problem = format!(
                "{cpus} is more than the {GIC_V2_CPUS} that a GICv2 can interrupt: use fewer, or another GIC"
            );
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
        let nets = self.nets.iter().enumerate();
        let nets = nets.map(|(index, net)| (format!("nets[{index}].id"), &net.id));
        let fs = self.fs.iter().enumerate();
        let fs = fs.map(|(index, fs)| (format!("fs[{index}].id"), &fs.id));
        let mut seen = HashMap::new();
        for (field, id) in nvdimm.chain(disks).chain(nets).chain(fs) {
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

    /// Each descriptor and each interface once: of what one device takes out, the other sees nothing.
    fn check_taps(&self) -> Result {
        let (mut fds, mut names) = (HashMap::new(), HashMap::new());
        for (index, net) in self.nets.iter().enumerate() {
            for (list, given) in [("taps", &net.taps), ("vhost", &net.vhost)] {
                for (place, fd) in given.iter().enumerate() {
                    let field = format!("nets[{index}].{list}[{place}]");
                    if let Some(first) = fds.insert(fd, field.clone()) {
                        let problem = format!("descriptor {fd} is also {first}: use one for each");
                        return refuse(field, problem);
                    }
                }
            }
            if let Some(tap) = &net.tap
                && let Some(first) = names.insert(&tap.name, index)
            {
                let problem =
                    format!("{:?} is also nets[{first}].tap: use a tap for each", tap.name);
                return refuse(format!("nets[{index}].tap.name"), problem);
            }
        }
        Ok(())
    }

    /// Each tag once, and memory that their daemons can map.
    fn check_fs(&self) -> Result {
        let mut tags = HashMap::new();
        for (index, fs) in self.fs.iter().enumerate() {
            if let Some(first) = tags.insert(&fs.tag, index) {
                let problem = format!(
                    "{:?} is also fs[{first}].tag: the guest could not tell them apart; use a tag for each",
                    fs.tag
                );
                return refuse(format!("fs[{index}].tag"), problem);
            }
        }
        if !self.fs.is_empty() && !self.memory.shared {
            let problem = "off, but the daemon of fs[0] has to map guest memory: turn it on";
            return refuse("memory.shared", problem);
        }
        Ok(())
    }

    /// Each socket once.
    fn check_sockets(&self) -> Result {
        let vsock = self.vsock.iter().filter_map(|vsock| match &vsock.backend {
            VsockBackend::Unix { path } => Some(("vsock.backend.unix.path".to_owned(), path)),
            VsockBackend::Vhost { .. } => None,
        });
        let consoles = [("console", &self.console), ("serial", &self.serial)];
        let consoles = consoles.into_iter().filter_map(|(field, chardev)| match chardev {
            ChardevConfig::Unix { path } => Some((field.to_owned(), path)),
            _ => None,
        });
        let fs = self.fs.iter().enumerate();
        let fs = fs.map(|(index, fs)| (format!("fs[{index}].socket"), &fs.socket));
        let mut seen = HashMap::new();
        for (field, path) in vsock.chain(consoles).chain(fs) {
            if let Some(first) = seen.insert(path, field.clone()) {
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
        check_queue_size(field, self.queue_size)
    }
}

impl NetConfig {
    fn check(&self, field: &str) -> Result {
        if !self.mac.is_unicast() {
            let problem = format!(
                "{} is no address of one station: use one whose first byte is even, such as 02:00:5e:10:00:01",
                self.mac
            );
            return refuse(format!("{field}.mac"), problem);
        }
        if let Some(mtu) = self.mtu
            && mtu < MTU_MIN
        {
            let problem = format!("{mtu} is too small for IPv4: use {MTU_MIN} or more");
            return refuse(format!("{field}.mtu"), problem);
        }
        check_queue_size(field, self.queue_size)?;
        match &self.tap {
            Some(tap) => self.check_tap(field, tap),
            None => self.check_descriptors(field),
        }
    }

    fn check_tap(&self, field: &str, tap: &TapConfig) -> Result {
        if !self.taps.is_empty() || !self.vhost.is_empty() {
            let problem =
                "is given beside descriptors, which are open already: use one or the other";
            return refuse(format!("{field}.tap"), problem);
        }
        let name = &tap.name;
        let is_name = (1..=IFNAME_MAX).contains(&name.len())
            && !matches!(name.as_str(), "." | "..")
            && name.bytes().all(|byte| byte.is_ascii_graphic() && !b"/:%".contains(&byte));
        if !is_name {
            let problem = format!(
                "{name:?} is no name of an interface: use 1 to {IFNAME_MAX} letters, digits, '-', '.' and '_'"
            );
            return refuse(format!("{field}.tap.name"), problem);
        }
        check_pairs(&format!("{field}.tap.queues"), tap.queues.into())
    }

    fn check_descriptors(&self, field: &str) -> Result {
        check_pairs(&format!("{field}.taps"), self.taps.len())?;
        let (taps, vhost) = (self.taps.len(), self.vhost.len());
        if vhost != 0 && vhost != taps {
            let problem = format!(
                "{vhost} descriptors of /dev/vhost-net for {taps} of the tap: use as many, or none"
            );
            return refuse(format!("{field}.vhost"), problem);
        }
        for (list, fds) in [("taps", &self.taps), ("vhost", &self.vhost)] {
            for (index, fd) in fds.iter().enumerate() {
                check_fd(&format!("{field}.{list}[{index}]"), *fd)?;
            }
        }
        Ok(())
    }
}

impl FsConfig {
    fn check(&self, field: &str) -> Result {
        let length = self.tag.len();
        if length == 0 || length > TAG_MAX || self.tag.contains('\0') {
            let problem = format!(
                "{:?} is {length} bytes long: use 1 to {TAG_MAX}, and no zero byte",
                self.tag
            );
            return refuse(format!("{field}.tag"), problem);
        }
        check_socket(&format!("{field}.socket"), &self.socket)?;
        if !(1..=QUEUES_MAX).contains(&self.queues) {
            let problem = format!("{} queues: use 1 to {QUEUES_MAX}", self.queues);
            return refuse(format!("{field}.queues"), problem);
        }
        check_queue_size(field, self.queue_size)
    }
}

fn check_pairs(field: &str, pairs: usize) -> Result {
    if !(1..=usize::from(QUEUE_PAIRS_MAX)).contains(&pairs) {
        let problem = format!("{pairs} pairs of queues: use 1 to {QUEUE_PAIRS_MAX}");
        return refuse(field, problem);
    }
    Ok(())
}

fn check_queue_size(field: &str, size: u16) -> Result {
    if !size.is_power_of_two() || !(2..=QUEUE_SIZE_MAX).contains(&size) {
        let problem =
            format!("{size} is no size of a queue: use a power of two from 2 to {QUEUE_SIZE_MAX}");
        return refuse(format!("{field}.queue_size"), problem);
    }
    Ok(())
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
