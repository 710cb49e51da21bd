// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! `[hypervisor.ecr]`: the virtual machine. `[hypervisor.qemu]` of a Kata configuration file is read as the same table.

use std::path::PathBuf;

use toml::Value;

use super::Table;
use super::setting::{Honoured, Key, Kind, Setting, choice, mismatch, settings};

/// What can be chosen of the machine: on aarch64, the interrupt controller.
const GIC_VERSIONS: &[&str] = if cfg!(target_arch = "aarch64") {
    &["", "gic-version=host", "gic-version=2", "gic-version=3"]
} else {
    &[""]
};
/// The machine type that this architecture has.
pub const MACHINE_TYPE: &str = if cfg!(target_arch = "aarch64") { "virt" } else { "q35" };
/// Megabytes that a machine has unless told otherwise, or told less than [`MIN_MEMORY`].
pub(super) const DEFAULT_MEMORY: u64 = 2048;
/// The least megabytes that a machine can have.
pub(super) const MIN_MEMORY: u64 = 256;

choice! {
    /// How block devices are shown to the guest.
    pub enum BlockDriver, |word, all| {
        format!("Invalid hypervisor block storage driver {word} specified (supported drivers: {all})")
    };
    /// SCSI disks of one controller.
    VirtioScsi = "virtio-scsi",
    /// A PCI function each.
    #[default]
    VirtioBlk = "virtio-blk",
    /// Without PCI.
    VirtioMmio = "virtio-mmio",
    /// Persistent memory.
    Nvdimm = "nvdimm",
    /// On channels of s390x.
    VirtioBlkCcw = "virtio-blk-ccw",
}

choice! {
    /// How block requests reach the host.
    pub enum BlockAio, |word, all| {
        format!("Invalid hypervisor block storage I/O mechanism {word} specified (supported AIO: {all})")
    };
    /// io_uring.
    #[default]
    IoUring = "io_uring",
    /// Linux's older asynchronous calls.
    Native = "native",
    /// Ordinary calls on threads.
    Threads = "threads",
}

choice! {
    /// How files are shared with the guest.
    pub enum SharedFs, |word, all| {
        format!("Invalid hypervisor shared file system {word} specified (supported file systems: {all})")
    };
    /// Plan 9's protocol.
    Virtio9p = "virtio-9p",
    /// virtiofsd.
    #[default]
    VirtioFs = "virtio-fs",
    /// nydusd.
    VirtioFsNydus = "virtio-fs-nydus",
    /// Files are not shared.
    None = "none",
}

choice! {
    /// What the guest may keep of shared files.
    pub enum VirtioFsCache, |word, all| {
        format!("Invalid virtio_fs_cache {word} specified (supported modes: {all})")
    };
    /// Nothing.
    #[default]
    Never = "never" | "none",
    /// Names and attributes.
    Metadata = "metadata",
    /// Until the file is opened again.
    Auto = "auto",
    /// Everything: the guest is the only one who writes.
    Always = "always",
}

choice! {
    /// Where devices that are passed through are plugged.
    pub enum VfioPort, |word, all| {
        format!("Invalid VFIO port {word} specified (supported ports: {all})")
    };
    /// Nowhere.
    #[default]
    NoPort = "no-port",
    /// A slot of a bridge.
    BridgePort = "bridge-port",
    /// A root port.
    RootPort = "root-port",
    /// A port of a switch.
    SwitchPort = "switch-port",
}

choice! {
    /// File system of the image.
    pub enum RootfsType, |word, all| format!("Invalid rootfs_type {word} specified (supported types: {all})");
    /// ext4.
    #[default]
    Ext4 = "ext4",
    /// XFS.
    Xfs = "xfs",
    /// EROFS.
    Erofs = "erofs",
}

choice! {
    /// A second monitor for people.
    pub enum ExtraMonitor, |word, all| {
        format!("Invalid extra_monitor_socket {word} specified (supported monitors: {all})")
    };
    /// None.
    #[default]
    None = "none",
    /// QEMU's human monitor.
    Hmp = "hmp",
    /// QMP.
    Qmp = "qmp",
    /// QMP with line breaks.
    QmpPretty = "qmp-pretty",
}

settings! {
    /// The virtual machine.
    pub struct Hypervisor, Table::Hypervisor, KEYS = config.hypervisor {
        /// VMM binary. ecr's VMM is a library of the shim: nothing need be at this path.
        path: PathBuf = PathBuf::new(), Honoured::Moot;
        /// Guest kernel.
        kernel: PathBuf = "/usr/share/ecr/vmlinuz.container".into(), Honoured::Yes, kernel;
        /// Image with the guest's root file system. Exactly one of image and initrd is needed.
        image: Option<PathBuf> = None, Honoured::Yes;
        /// Initial RAM disk with the guest's root file system.
        initrd: Option<PathBuf> = None, Honoured::Yes;
        /// Machine type, by QEMU's name.
        machine_type: String = MACHINE_TYPE.into(), Honoured::Only(&[MACHINE_TYPE]), machine_type;
        /// More options of the machine, by QEMU's names, comma separated.
        machine_accelerators: String = String::new(), Honoured::Only(GIC_VERSIONS);
        /// Features of the processor to add or take away. The guest never has a performance monitor.
        cpu_features: String = String::new(), Honoured::Only(&["", "pmu=off"]);
        /// Kernel parameters, put after all others.
        kernel_params: String = String::new(), Honoured::Yes;
        /// Firmware.
        firmware: Option<PathBuf> = None, Honoured::No;
        /// Variables of the firmware.
        firmware_volume: Option<PathBuf> = None, Honoured::No;
        /// Two images of flash memory, on arm64.
        pflashes: Vec<PathBuf> = Vec::new(), Honoured::No;
        /// Jailer of Firecracker.
        jailer_path: Option<PathBuf> = None, Honoured::Moot;
        /// Control tool of ACRN.
        ctlpath: Option<PathBuf> = None, Honoured::Moot;
        /// vCPUs at boot. 0: one; less than 0, or more than the host has: all of the host's. Fractions are rounded up.
        default_vcpus: u32 = 1, Honoured::Yes, vcpus;
        /// Most vCPUs there can ever be. 0, or more than the host has: as many as the host has.
        default_maxvcpus: u32 = 0, Honoured::Yes;
        /// Memory at boot, in MiB. Less than 256: 2048.
        default_memory: u64 = DEFAULT_MEMORY, Honoured::Yes;
        /// Most memory there can ever be, in MiB. 0, or more than the host has: the host's.
        default_maxmemory: u64 = 0, Honoured::Yes;
        /// Memory modules that can be added. 0: 10.
        memory_slots: u32 = 10, Honoured::No;
        /// MiB of address space kept for nvdimm.
        memory_offset: u64 = 0, Honoured::No;
        /// PCI bridges into which devices are plugged, 1 to 5.
        default_bridges: u32 = 1, Honoured::Yes;
        /// Change the size of memory with virtio-mem.
        enable_virtio_mem: bool = false, Honoured::No;
        /// Take all of the guest's memory before it starts.
        enable_mem_prealloc: bool = false, Honoured::Yes;
        /// Memory of huge pages.
        enable_hugepages: bool = false, Honoured::Yes;
        /// Directory of the file that backs memory.
        file_mem_backend: Option<PathBuf> = None, Honoured::Yes;
        /// What an annotation may set file_mem_backend to.
        valid_file_mem_backends: Vec<String> = Vec::new(), Honoured::Yes;
        /// An IOMMU for the guest.
        enable_iommu: bool = false, Honoured::No;
        /// virtio devices behind the IOMMU.
        enable_iommu_platform: bool = false, Honoured::No;
        /// How block devices are shown to the guest.
        block_device_driver: BlockDriver = BlockDriver::VirtioBlk, Honoured::Only(&["virtio-blk"]);
        /// How block requests reach the host.
        block_device_aio: BlockAio = BlockAio::IoUring, Honoured::Only(&["io_uring", "threads"]);
        /// Whether the next two count.
        block_device_cache_set: bool = false, Honoured::Yes;
        /// Bypass the host's page cache.
        block_device_cache_direct: bool = false, Honoured::Yes;
        /// Ignore the guest's flushes.
        block_device_cache_noflush: bool = false, Honoured::No;
        /// Never show a block device to the guest; share its files instead.
        disable_block_device_use: bool = false, Honoured::Yes;
        /// I/O threads for virtio-scsi. ecr's devices always have I/O threads.
        enable_iothreads: bool = false, Honoured::Moot;
        /// How files are shared with the guest.
        shared_fs: SharedFs = SharedFs::VirtioFs, Honoured::Only(&["virtio-fs"]);
        /// virtiofsd.
        virtio_fs_daemon: Option<PathBuf> = None, Honoured::Yes;
        /// What an annotation may set virtio_fs_daemon to.
        valid_virtio_fs_daemon_paths: Vec<String> = Vec::new(), Honoured::Yes;
        /// What the guest may keep of shared files.
        virtio_fs_cache: VirtioFsCache = VirtioFsCache::Never, Honoured::Yes;
        /// MiB of shared files that the guest can map.
        virtio_fs_cache_size: u32 = 0, Honoured::No;
        /// More arguments for virtiofsd.
        virtio_fs_extra_args: Vec<String> = Vec::new(), Honoured::Yes;
        /// By which name the guest mounts the shared files.
        virtio_fs_tag: String = "kataShared".into(), Honoured::Yes, tag;
        /// Entries of a queue of the shared file system.
        virtio_fs_queue_size: u32 = 1024, Honoured::Yes, queue_size;
        /// Size of a message of virtio-9p.
        msize_9p: u32 = 8192, Honoured::Moot;
        /// Block devices served by other processes.
        enable_vhost_user_store: bool = false, Honoured::No;
        /// Where those processes have their sockets.
        vhost_user_store_path: PathBuf = "/var/run/kata-containers/vhost-user/".into(), Honoured::Moot;
        /// What an annotation may set vhost_user_store_path to.
        valid_vhost_user_store_paths: Vec<String> = Vec::new(), Honoured::Yes;
        /// For how long a lost process is waited for.
        vhost_user_reconnect_timeout_sec: u32 = 0, Honoured::No;
        /// Where the guest's random numbers come from.
        entropy_source: PathBuf = "/dev/urandom".into(), Honoured::Yes, entropy_source;
        /// What an annotation may set entropy_source to.
        valid_entropy_sources: Vec<String> = Vec::new(), Honoured::Yes;
        /// Directory in the guest with programs that are run for each container.
        guest_hook_path: String = String::new(), Honoured::Yes;
        /// Directory for dumps of guests that panicked.
        guest_memory_dump_path: Option<PathBuf> = None, Honoured::No;
        /// Dump by virtual addresses.
        guest_memory_dump_paging: bool = false, Honoured::No;
        /// Plug devices that are passed through into the root bus.
        hotplug_vfio_on_root_bus: bool = false, Honoured::No;
        /// Where devices are passed through while the guest runs.
        hot_plug_vfio: VfioPort = VfioPort::NoPort, Honoured::No;
        /// Where devices are passed through at boot.
        cold_plug_vfio: VfioPort = VfioPort::NoPort, Honoured::No;
        /// PCIe root ports.
        pcie_root_port: u32 = 0, Honoured::No;
        /// Ports of PCIe switches.
        pcie_switch_port: u32 = 0, Honoured::No;
        /// Serve network queues in this process even where the host has vhost-net.
        disable_vhost_net: bool = false, Honoured::Yes;
        /// QEMU's test whether it is nested. ecr has modern devices only.
        disable_nesting_checks: bool = false, Honoured::Moot;
        /// Show the image as a block device instead of persistent memory.
        disable_image_nvdimm: bool = false, Honoured::Yes;
        /// File system of the image.
        rootfs_type: RootfsType = RootfsType::Ext4, Honoured::Yes;
        /// dm-verity parameters of the image.
        kernel_verity_params: String = String::new(), Honoured::No;
        /// Swap space for containers.
        enable_guest_swap: bool = false, Honoured::No;
        /// Run the VMM as another user.
        rootless: bool = false, Honoured::No;
        /// Encrypt the guest's memory.
        confidential_guest: bool = false, Honoured::No;
        /// Do not label the VMM process.
        disable_selinux: bool = false, Honoured::No;
        /// No labels inside the guest.
        disable_guest_selinux: bool = true, Honoured::No;
        /// No filter of system calls in Cloud Hypervisor and Firecracker.
        disable_seccomp: bool = false, Honoured::Moot;
        /// QEMU's filter of system calls.
        seccompsandbox: String = String::new(), Honoured::Moot;
        /// Most bits per second towards the guest.
        rx_rate_limiter_max_rate: u64 = 0, Honoured::No;
        /// Most bits per second from the guest.
        tx_rate_limiter_max_rate: u64 = 0, Honoured::No;
        /// Most bits per second of block devices.
        disk_rate_limiter_bw_max_rate: i64 = 0, Honoured::No;
        /// What may go beyond that once.
        disk_rate_limiter_bw_one_time_burst: i64 = 0, Honoured::No;
        /// Most requests per second of block devices.
        disk_rate_limiter_ops_max_rate: i64 = 0, Honoured::No;
        /// What may go beyond that once.
        disk_rate_limiter_ops_one_time_burst: i64 = 0, Honoured::No;
        /// Most bits per second of network devices.
        net_rate_limiter_bw_max_rate: i64 = 0, Honoured::No;
        /// What may go beyond that once.
        net_rate_limiter_bw_one_time_burst: i64 = 0, Honoured::No;
        /// Most packets per second of network devices.
        net_rate_limiter_ops_max_rate: i64 = 0, Honoured::No;
        /// What may go beyond that once.
        net_rate_limiter_ops_one_time_burst: i64 = 0, Honoured::No;
        /// The guest's console is ttyS0 instead of hvc0.
        use_legacy_serial: bool = false, Honoured::Yes;
        /// Log the guest's console, and let the kernel say more.
        enable_debug: bool = false, Honoured::Yes;
        /// Which annotations of a pod may change the virtual machine; regular expressions.
        enable_annotations: Vec<String> = Vec::new(), Honoured::Yes;
        /// What an annotation may set path to.
        valid_hypervisor_paths: Vec<String> = Vec::new(), Honoured::Yes;
        /// What an annotation may set jailer_path to.
        valid_jailer_paths: Vec<String> = Vec::new(), Honoured::Yes;
        /// What an annotation may set ctlpath to.
        valid_ctlpaths: Vec<String> = Vec::new(), Honoured::Yes;
        /// How much the hypervisor logs, 1 to 3.
        hypervisor_loglevel: u32 = 1, Honoured::No;
        /// Give memory that the guest has freed back to the host.
        reclaim_guest_freed_memory: bool = false, Honoured::No;
        /// Show the host's NUMA nodes to the guest.
        enable_numa: bool = false, Honoured::No;
        /// Which nodes.
        numa_mapping: Vec<String> = Vec::new(), Honoured::No;
        /// I/O threads that block devices share, up to 50.
        indep_iothreads: u32 = 0, Honoured::No;
        /// Logical sector size that block devices show; 0: the host's.
        block_device_logical_sector_size: u32 = 0, Honoured::No;
        /// Physical sector size that block devices show; 0: the host's.
        block_device_physical_sector_size: u32 = 0, Honoured::No;
        /// A second monitor for people.
        extra_monitor_socket: ExtraMonitor = ExtraMonitor::None, Honoured::No;
        /// Images that extend the guest's.
        guest_extension_images: Vec<PathBuf> = Vec::new(), Honoured::No;
        /// AMD SEV-SNP id block.
        snp_id_block: String = String::new(), Honoured::No;
        /// AMD SEV-SNP id authentication.
        snp_id_auth: String = String::new(), Honoured::No;
        /// AMD SEV-SNP policy.
        snp_guest_policy: u64 = 0, Honoured::No;
        /// vsock port of Intel TDX's quote generation service.
        tdx_quote_generation_service_socket_port: u32 = 0, Honoured::No;
        /// Digest that measures the guest.
        measurement_algo: String = String::new(), Honoured::No;
        /// Socket of a remote hypervisor.
        remote_hypervisor_socket: String = String::new(), Honoured::No;
        /// For how long a remote hypervisor may take, in seconds.
        remote_hypervisor_timeout: u32 = 0, Honoured::No;
    }
}

/// The empty string is the default.
fn text_or(value: &Value, default: &str) -> Result<String, String> {
    let text = String::from_value(value)?;
    Ok(if text.is_empty() { default.into() } else { text })
}

fn kernel(value: &Value) -> Result<PathBuf, String> {
    text_or(value, "/usr/share/ecr/vmlinuz.container").map(Into::into)
}

fn entropy_source(value: &Value) -> Result<PathBuf, String> {
    text_or(value, "/dev/urandom").map(Into::into)
}

fn machine_type(value: &Value) -> Result<String, String> {
    const KNOWN: &[&str] =
        if cfg!(target_arch = "aarch64") { &["virt"] } else { &["q35", "microvm", "virt"] };
    let machine = text_or(value, MACHINE_TYPE)?;
    if KNOWN.contains(&machine.as_str()) {
        Ok(machine)
    } else {
        Err(format!("unrecognised machinetype: {machine}"))
    }
}

/// Newer files have fractions, which are summed with those of containers; a machine has whole vCPUs.
fn vcpus(value: &Value) -> Result<u32, String> {
    let number = match value {
        #[expect(clippy::cast_precision_loss, reason = "so many vCPUs are clamped anyway")]
        Value::Integer(number) => *number as f64,
        Value::Float(number) if number.is_finite() => *number,
        _ => return Err(mismatch("a number of vCPUs", value)),
    };
    // Less than 0 asks for as many as there are.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "saturates")]
    Ok(if number < 0.0 { u32::MAX } else { number.ceil() as u32 })
}

/// Virtual I/O Device 1.2, 5.11.4: 36 bytes.
fn tag(value: &Value) -> Result<String, String> {
    let tag = text_or(value, "kataShared")?;
    if tag.len() > 36 || tag.contains('\0') {
        return Err(format!("{tag:?} is no tag: at most 36 bytes"));
    }
    Ok(tag)
}

fn queue_size(value: &Value) -> Result<u32, String> {
    let size = u32::from_value(value)?;
    match size {
        0 => Ok(1024),
        1..=32768 if size.is_power_of_two() => Ok(size),
        _ => Err(format!("{size} is no size of a queue: a power of two up to 32768")),
    }
}
