// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The arguments of `ecr-vmm`: from words to a [`VmConfig`]. Nothing is opened and nothing printed here.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::Parser;
use uuid::Uuid;

use crate::config::{
    BootConfig, ChardevConfig, ConfigError, CpuConfig, DiskConfig, DiskIo, FsConfig, GicVersion,
    MachineType, MemoryConfig, NvdimmConfig, ResetAction, RngConfig, VmConfig, VsockBackend,
    VsockConfig, validate,
};
use options::Options;

mod devices;
mod options;

const EXAMPLES: &str = "\
Examples:
  Boot a root file system image that all VMs share, with a console here:
    ecr-vmm --kernel vmlinux --image rootfs.img
  Two vCPUs, 2 GiB, an initial RAM disk, a disk to write on:
    ecr-vmm --kernel bzImage --initrd initrd.img --cpus 2 --memory 2G --disk data.img
  With a network, and a directory that virtiofsd serves:
    ecr-vmm --kernel vmlinux --image rootfs.img --memory 512M,shared --net tap=tap0 \\
      --fs socket=fs.sock,tag=data
  In the background, with its console and its control on sockets:
    ecr-vmm --kernel vmlinux --image rootfs.img --console unix:console.sock --qmp unix:qmp.sock

Keys of --machine virt:
  gic-version=host|2|3   interrupt controller; by default the newest that the host has
  acpi=on|off            describe the machine by ACPI tables, or by a device tree alone
Keys of --memory:
  max=SIZE, slots=N      the most memory there can ever be, and in how many more pieces
  shared, path=PATH      let other processes map it; back it with a file there
  hugepages[=SIZE]       back it with huge pages, of 2M where no size is given
  prealloc               touch all of it before the guest starts
Keys of --disk:
  readonly, direct       the guest can only read; bypass the host's page cache
  serial=TEXT, id=ID     serial number for the guest; name for QMP
  queues=N               request queues, one a vCPU where it is not given
  queue_size=N           entries of a queue, a power of two
  io=auto|uring|sync     how requests reach the host
Keys of --net:
  tap=NAME               the tap, which is made where it is not there
  queues=N               pairs of queues, 1 where it is not given
  vhost=on|off           let the host's kernel serve them, through /dev/vhost-net
  fd=N[:N...]            in place of these: open descriptors, one for each pair of queues
  vhostfd=N[:N...]       and as many of /dev/vhost-net
  mac=ADDRESS, mtu=N     address of the guest, made up from its place where it is not given; its MTU
  queue_size=N, id=ID    entries of a queue, a power of two; name for QMP
Keys of --fs:
  socket=PATH, tag=TAG   where the daemon listens, and the name under which the guest mounts it
  queues=N, queue_size=N request queues, and entries of a queue
  id=ID                  name for QMP

Sizes are a whole number and a unit: 512M, 2G. A comma within a path is written twice.

Exit status: 0 the guest powered off or was told to end, 2 bad arguments, or what they ask for cannot be had,
3 the guest panicked, 4 the VM or its host failed.";

/// Run a virtual machine.
#[derive(Debug, Parser)]
#[command(
    name = "ecr-vmm",
    version,
    after_help = EXAMPLES,
    next_line_help = true,
    disable_help_subcommand = true
)]
struct Arguments {
    /// Kernel: bzImage or vmlinux for q35; Image, also compressed, for virt
    #[arg(long, value_name = "FILE", help_heading = "Boot")]
    kernel: PathBuf,
    /// Initial RAM disk
    #[arg(long, value_name = "FILE", help_heading = "Boot")]
    initrd: Option<PathBuf>,
    /// Root file system image, on persistent memory that VMs share, or as a read-only disk
    #[arg(long, value_name = "FILE[,as=pmem|disk]", value_parser = image, help_heading = "Boot")]
    image: Option<Image>,
    /// Kernel arguments; root= and console= are filled in where they are not given
    #[arg(
        long,
        value_name = "STRING",
        default_value = "",
        hide_default_value = true,
        allow_hyphen_values = true,
        help_heading = "Boot"
    )]
    cmdline: String,

    /// Machine type: q35 for x86_64, virt for aarch64. Its keys are listed below
    #[arg(
        long,
        value_name = "TYPE[,KEY=VALUE...]",
        default_value = MachineType::native().name(),
        value_parser = machine,
        help_heading = "Machine"
    )]
    machine: Machine,
    /// vCPUs at boot, and the most there can ever be
    #[arg(
        long,
        value_name = "N[,max=N]",
        default_value = "1",
        value_parser = cpus,
        help_heading = "Machine"
    )]
    cpus: CpuConfig,
    /// Memory at boot; its keys are listed below
    #[arg(
        long,
        value_name = "SIZE[,KEY=VALUE...]",
        default_value = "256M",
        value_parser = memory,
        help_heading = "Machine"
    )]
    memory: MemoryConfig,
    /// PCI bridges, each with room for 30 devices that are added while the guest runs
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Machine")]
    bridges: u8,
    /// End when the guest reboots
    #[arg(long, help_heading = "Machine")]
    no_reboot: bool,

    /// Disk: raw file or block device; may be repeated. Its keys are listed below
    #[arg(
        long = "disk",
        value_name = "FILE[,KEY=VALUE...]",
        value_parser = disk,
        help_heading = "Devices"
    )]
    disks: Vec<DiskConfig>,
    /// Network device before a tap; may be repeated. Its keys are listed below
    #[arg(
        long = "net",
        value_name = "tap=NAME|fd=N[,KEY=VALUE...]",
        value_parser = devices::net,
        help_heading = "Devices"
    )]
    nets: Vec<devices::Net>,
    /// Directory that a vhost-user daemon serves; may be repeated. Its keys are listed below
    #[arg(
        long = "fs",
        value_name = "socket=PATH,tag=TAG[,KEY=VALUE...]",
        value_parser = devices::fs,
        help_heading = "Devices"
    )]
    fs: Vec<FsConfig>,
    /// Entropy device, fed from FILE or /dev/urandom
    #[arg(
        long,
        value_name = "FILE",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "/dev/urandom",
        help_heading = "Devices"
    )]
    rng: Option<PathBuf>,
    /// Sockets between host and guest, through the host's kernel, or through a unix socket
    #[arg(
        long,
        value_name = "cid=N[,socket=PATH]",
        value_parser = vsock,
        help_heading = "Devices"
    )]
    vsock: Option<VsockConfig>,
    /// Console hvc0: stdio, unix:PATH, file:PATH, null or off
    #[arg(
        long,
        value_name = "WHERE",
        default_value = "stdio",
        value_parser = chardev,
        help_heading = "Devices"
    )]
    console: ChardevConfig,
    /// Serial port, ttyS0 of q35 and ttyAMA0 of virt: as --console
    #[arg(
        long,
        value_name = "WHERE",
        default_value = "off",
        value_parser = chardev,
        help_heading = "Devices"
    )]
    serial: ChardevConfig,

    /// Listen for QMP clients
    #[arg(long, value_name = "unix:PATH", value_parser = qmp, help_heading = "Control")]
    qmp: Option<PathBuf>,
    /// Name of the VM
    #[arg(long, help_heading = "Control")]
    name: Option<String>,
    /// Identity of the VM
    #[arg(long, help_heading = "Control")]
    uuid: Option<Uuid>,
    /// Wait for QMP's `cont` before the guest runs
    #[arg(long, requires = "qmp", help_heading = "Control")]
    paused: bool,
    /// What to log, on stderr or to a file: off, error, warn, info, debug or trace
    #[arg(
        long,
        value_name = "LEVEL[,file=FILE]",
        default_value = "warn",
        value_parser = log_target,
        help_heading = "Control"
    )]
    log: LogTarget,
}

/// What `ecr-vmm` was asked to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Invocation {
    /// The VM.
    pub config: VmConfig,
    /// Where to listen for QMP clients.
    pub qmp: Option<PathBuf>,
    /// Whether the guest waits for `cont`.
    pub paused: bool,
    /// Whether the terminal belongs to the guest.
    pub uses_stdio: bool,
    /// What to log.
    pub log: LogTarget,
}

/// What to log, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogTarget {
    /// Up to which level.
    pub level: log::LevelFilter,
    /// To which file; none is standard error.
    pub file: Option<PathBuf>,
}

/// Why there is nothing to run.
#[derive(Debug, thiserror::Error)]
pub enum CmdlineError {
    /// The arguments cannot be understood, or are a request for help. [`clap::Error::kind`] tells which.
    #[error(transparent)]
    Arguments(#[from] clap::Error),
    /// They are understood and cannot work.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

/// Understand the arguments; the first is the program's name.
///
/// # Errors
/// See [`CmdlineError`].
pub fn parse(
    arguments: impl IntoIterator<Item = impl Into<OsString> + Clone>,
) -> Result<Invocation, CmdlineError> {
    let arguments = Arguments::try_parse_from(arguments)?;
    let uses_stdio = [&arguments.console, &arguments.serial].into_iter().filter(|c| **c == STDIO);
    let uses_stdio = match uses_stdio.count() {
        2 => return refuse("serial", "stdio is the console's already: use --console off as well"),
        count => count == 1,
    };
    let (qmp, paused, log) = (arguments.qmp.clone(), arguments.paused, arguments.log.clone());
    let config = arguments.into_config();
    config.validate()?;
    if let Some(qmp) = &qmp {
        validate::check_socket("qmp", qmp)?;
    }
    for (field, chardev) in [("console", &config.console), ("serial", &config.serial)] {
        if let (ChardevConfig::Unix { path }, Some(qmp)) = (chardev, &qmp)
            && path == qmp
        {
            return refuse("qmp", &format!("{qmp:?} is also {field}: use a socket for each"));
        }
    }
    Ok(Invocation { config, qmp, paused, uses_stdio, log })
}

fn refuse(field: &str, problem: &str) -> Result<Invocation, CmdlineError> {
    Err(ConfigError { field: field.to_owned(), problem: problem.to_owned() }.into())
}

impl Arguments {
    fn into_config(mut self) -> VmConfig {
        let cmdline = self.kernel_arguments();
        let nvdimm = match &self.image {
            Some(Image { path, disk: false }) => {
                Some(NvdimmConfig { id: "image".into(), path: path.clone() })
            }
            Some(Image { path, disk: true }) => {
                self.disks.insert(0, image_disk(path.clone()));
                None
            }
            None => None,
        };
        for (index, disk) in self.disks.iter_mut().enumerate() {
            if disk.id.is_empty() {
                disk.id = format!("disk{index}");
            }
        }
        for (index, fs) in self.fs.iter_mut().enumerate() {
            if fs.id.is_empty() {
                fs.id = format!("fs{index}");
            }
        }
        let nets = self.nets.into_iter().enumerate().map(|(index, net)| net.numbered(index));
        VmConfig {
            name: self.name,
            uuid: self.uuid.unwrap_or_default(),
            machine: self.machine.kind,
            gic: self.machine.gic,
            acpi: self.machine.acpi,
            cpus: self.cpus,
            memory: self.memory,
            boot: BootConfig { kernel: self.kernel, initrd: self.initrd, cmdline },
            nvdimm,
            disks: self.disks,
            nets: nets.collect(),
            fs: self.fs,
            rng: self.rng.map(|path| RngConfig { path }),
            vsock: self.vsock,
            console: self.console,
            serial: self.serial,
            pvpanic: true,
            on_reset: if self.no_reboot { ResetAction::Shutdown } else { ResetAction::Reboot },
            bridges: self.bridges,
            io_threads: 0,
        }
    }

    /// What was given, behind what follows from the devices.
    fn kernel_arguments(&self) -> String {
        let given = |key: &str| self.cmdline.split_whitespace().any(|word| word.starts_with(key));
        let mut words: Vec<&str> = Vec::new();
        if !given("console=") {
            // The last one is /dev/console.
            if self.serial != ChardevConfig::Off {
                words.push(match self.machine.kind {
                    MachineType::Q35 => "console=ttyS0",
                    MachineType::Virt => "console=ttyAMA0",
                });
            }
            if self.console != ChardevConfig::Off {
                words.push("console=hvc0");
            }
        }
        if !given("root=") {
            words.extend(self.root());
        }
        if !self.cmdline.is_empty() {
            words.push(&self.cmdline);
        }
        words.join(" ")
    }

    fn root(&self) -> &'static [&'static str] {
        match (&self.image, &self.initrd, self.disks.first()) {
            (Some(Image { disk: false, .. }), ..) => {
                &["root=/dev/pmem0p1", "rootflags=dax", "rootfstype=ext4", "ro"]
            }
            (Some(Image { disk: true, .. }), ..) => &["root=/dev/vda1", "rootfstype=ext4", "ro"],
            (None, None, Some(disk)) if disk.readonly => &["root=/dev/vda", "ro"],
            (None, None, Some(_)) => &["root=/dev/vda", "rw"],
            // The initial RAM disk knows.
            _ => &[],
        }
    }
}

/// This process's standard input and output.
const STDIO: ChardevConfig = ChardevConfig::Fds { input: Some(0), output: 1 };

/// A root file system image.
#[derive(Debug, Clone)]
struct Image {
    path: PathBuf,
    disk: bool,
}

/// A machine type and what only some have.
#[derive(Debug, Clone, Copy)]
struct Machine {
    kind: MachineType,
    gic: GicVersion,
    acpi: bool,
}

fn machine(text: &str) -> Result<Machine, String> {
    let options = Options::parse(text, Some("type"), &["type", "gic-version", "acpi"])?;
    let kinds = MachineType::ALL.map(|kind| (kind.name(), kind));
    let kind = options.choice("type", &kinds)?.ok_or("type= is missing")?;
    let versions = [("host", GicVersion::Host), ("2", GicVersion::V2), ("3", GicVersion::V3)];
    let gic = options.choice("gic-version", &versions)?;
    let acpi = options.choice("acpi", &[("on", true), ("off", false)])?;
    if kind != MachineType::Virt && (gic.is_some() || acpi.is_some()) {
        return Err("gic-version and acpi can be chosen for virt only".into());
    }
    Ok(Machine { kind, gic: gic.unwrap_or_default(), acpi: acpi.unwrap_or(true) })
}

fn image(text: &str) -> Result<Image, String> {
    let options = Options::parse(text, Some("path"), &["path", "as"])?;
    Ok(Image {
        path: options.required("path")?.into(),
        disk: options.choice("as", &[("pmem", false), ("disk", true)])?.unwrap_or(false),
    })
}

fn cpus(text: &str) -> Result<CpuConfig, String> {
    let options = Options::parse(text, Some("boot"), &["boot", "max"])?;
    let boot = options::number(options.required("boot")?)?;
    Ok(CpuConfig { boot, max: options.number("max")?.unwrap_or(boot) })
}

fn memory(text: &str) -> Result<MemoryConfig, String> {
    const KEYS: &[&str] = &["size", "max", "slots", "shared", "hugepages", "prealloc", "path"];
    let options = Options::parse(text, Some("size"), KEYS)?;
    let hugepages = match options.switch("hugepages") {
        Ok(on) => on.then_some(2 << 20),
        Err(_) => options.size("hugepages")?,
    };
    Ok(MemoryConfig {
        size: options::size(options.required("size")?)?,
        max: options.size("max")?,
        slots: options.number("slots")?.unwrap_or(0),
        shared: options.switch("shared")?,
        hugepages,
        prealloc: options.switch("prealloc")?,
        path: options.path("path"),
    })
}

/// The image as a disk that all can share.
fn image_disk(path: PathBuf) -> DiskConfig {
    DiskConfig {
        id: "image".into(),
        path,
        readonly: true,
        direct: false,
        serial: None,
        queues: 0,
        queue_size: DiskConfig::default_queue_size(),
        io: DiskIo::Auto,
    }
}

/// A disk; its id may have to be filled in.
fn disk(text: &str) -> Result<DiskConfig, String> {
    const KEYS: &[&str] =
        &["path", "readonly", "direct", "serial", "queues", "queue_size", "io", "id"];
    const IO: &[(&str, DiskIo)] =
        &[("auto", DiskIo::Auto), ("uring", DiskIo::Uring), ("sync", DiskIo::Sync)];
    let options = Options::parse(text, Some("path"), KEYS)?;
    Ok(DiskConfig {
        id: options.text("id").unwrap_or_default(),
        path: options.required("path")?.into(),
        readonly: options.switch("readonly")?,
        direct: options.switch("direct")?,
        serial: options.text("serial"),
        queues: options.number("queues")?.unwrap_or(0),
        queue_size: options.number("queue_size")?.unwrap_or(DiskConfig::default_queue_size()),
        io: options.choice("io", IO)?.unwrap_or_default(),
    })
}

fn vsock(text: &str) -> Result<VsockConfig, String> {
    let options = Options::parse(text, Some("cid"), &["cid", "socket"])?;
    let backend = match options.path("socket") {
        Some(path) => VsockBackend::Unix { path },
        None => VsockBackend::Vhost { fd: None },
    };
    Ok(VsockConfig { cid: options::number(options.required("cid")?)?, backend })
}

fn chardev(text: &str) -> Result<ChardevConfig, String> {
    match text.split_once(':') {
        None if text == "stdio" => Ok(STDIO),
        None if text == "null" => Ok(ChardevConfig::Null),
        None if text == "off" => Ok(ChardevConfig::Off),
        Some(("unix", path)) => Ok(ChardevConfig::Unix { path: path.into() }),
        Some(("file", path)) => Ok(ChardevConfig::File { path: path.into() }),
        _ => Err("use stdio, unix:PATH, file:PATH, null or off".to_owned()),
    }
}

fn qmp(text: &str) -> Result<PathBuf, String> {
    match text.strip_prefix("unix:") {
        Some(path) if !path.is_empty() => Ok(path.into()),
        _ => Err("use unix:PATH".to_owned()),
    }
}

fn log_target(text: &str) -> Result<LogTarget, String> {
    let options = Options::parse(text, Some("level"), &["level", "file"])?;
    let level = options
        .required("level")?
        .parse()
        .map_err(|_| "use off, error, warn, info, debug or trace".to_owned())?;
    Ok(LogTarget { level, file: options.path("file") })
}

#[cfg(test)]
mod tests;
