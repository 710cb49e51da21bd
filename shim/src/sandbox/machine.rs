// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! A sandbox's virtual machine, which runs in threads of this process: what it is made of, its control from async code,
//! and how its end is told.

use std::fmt;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use ecr_vmm::config::{
    BootConfig, ChardevConfig, CpuConfig, DiskConfig, FsConfig, GicVersion, MachineType,
    MemoryConfig, NetConfig, NvdimmConfig, ResetAction, RngConfig, VmConfig, VsockConfig,
};
use ecr_vmm::control::{Command, EventKind, Reply, ShutdownReason};
use ecr_vmm::{VmHandle, VmOptions, hypervisor};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::task::spawn_blocking;
use tokio::time::timeout;
use uuid::Uuid;

use super::paths::Paths;
use crate::config::{Config, Root, SharedFs, Sizing, kernel_cmdline};
use crate::container::rootfs;

/// How long a machine may take to end after it was told to.
const STOP: Duration = Duration::from_secs(15);

/// How long a guest may take to let a device go.
const EJECT: Duration = Duration::from_secs(5);

const MIB: u64 = 1 << 20;

/// Huge pages are of this size where the configuration wants them.
const HUGE_PAGE: u64 = 2 * MIB;

/// The name of the image where it is a disk.
const IMAGE: &str = "image";

/// What a machine is made of besides its configuration.
#[derive(Debug)]
pub struct MachineRequest<'a> {
    /// The configuration.
    pub config: &'a Config,
    /// The sandbox.
    pub id: &'a str,
    /// Its directories.
    pub paths: &'a Paths,
    /// Its size at boot.
    pub size: Sizing,
    /// How the agent is reached.
    pub vsock: VsockConfig,
    /// Its network devices.
    pub nets: Vec<NetConfig>,
    /// Disks besides the image's.
    pub disks: Vec<DiskConfig>,
}

/// The machine that `request` describes.
///
/// # Errors
/// There is neither image nor initrd.
pub fn vm_config(request: MachineRequest<'_>) -> Result<VmConfig> {
    let machine = &request.config.hypervisor;
    let root = match (&machine.image, &machine.initrd) {
        (_, Some(_)) => Root::Initrd,
        (Some(_), None) if machine.disable_image_nvdimm => Root::VirtioBlk,
        (Some(_), None) => Root::Nvdimm,
        (None, None) => bail!("the configuration names neither image nor initrd"),
    };
    let shares = machine.shared_fs == SharedFs::VirtioFs;
    let mut disks = Vec::new();
    if let (Root::VirtioBlk, Some(image)) = (root, &machine.image) {
        // The first disk: the kernel's command line says /dev/vda1.
        disks.push(DiskConfig { readonly: true, ..rootfs::disk(IMAGE, image, machine) });
    }
    disks.extend(request.disks);
    let console = if machine.enable_debug {
        ChardevConfig::Unix { path: request.paths.console_socket() }
    } else {
        ChardevConfig::Null
    };
    let (console, serial) = if machine.use_legacy_serial {
        (ChardevConfig::Off, console)
    } else {
        (console, ChardevConfig::Off)
    };
    Ok(VmConfig {
        name: Some(format!("sandbox-{}", request.id)),
        uuid: Uuid::new_v4(),
        machine: MachineType::native(),
        gic: gic_version(&machine.machine_accelerators),
        acpi: true,
        // vCPUs and memory cannot be added to a running machine, so there will never be more.
        cpus: CpuConfig { boot: request.size.vcpus, max: request.size.vcpus },
        memory: MemoryConfig {
            size: request.size.memory_mib * MIB,
            max: None,
            slots: 0,
            shared: shares,
            hugepages: machine.enable_hugepages.then_some(HUGE_PAGE),
            prealloc: machine.enable_mem_prealloc,
            path: machine.file_mem_backend.clone(),
        },
        boot: BootConfig {
            kernel: machine.kernel.clone(),
            initrd: machine.initrd.clone(),
            cmdline: kernel_cmdline(request.config, root),
        },
        nvdimm: match (root, &machine.image) {
            (Root::Nvdimm, Some(image)) => {
                Some(NvdimmConfig { id: IMAGE.into(), path: image.clone() })
            }
            _ => None,
        },
        nets: request.nets,
        fs: shares.then(|| share(machine, request.paths)).into_iter().collect(),
        disks,
        rng: Some(RngConfig { path: machine.entropy_source.clone() }),
        vsock: Some(request.vsock),
        console,
        serial,
        pvpanic: true,
        on_reset: ResetAction::Shutdown,
        io_threads: 1,
        bridges: u8::try_from(machine.default_bridges).unwrap_or(u8::MAX),
    })
}

/// The interrupt controller of aarch64, as an option of QEMU's machine.
fn gic_version(accelerators: &str) -> GicVersion {
    match accelerators {
        "gic-version=2" => GicVersion::V2,
        "gic-version=3" => GicVersion::V3,
        _ => GicVersion::Host,
    }
}

fn share(machine: &crate::config::Hypervisor, paths: &Paths) -> FsConfig {
    FsConfig {
        id: "share".into(),
        tag: machine.virtio_fs_tag.clone(),
        socket: paths.share_socket(),
        queues: u16::try_from(machine.default_vcpus).unwrap_or(u16::MAX).clamp(1, 8),
        queue_size: u16::try_from(machine.virtio_fs_queue_size).unwrap_or(1024),
    }
}

/// A machine that was started.
#[derive(Clone)]
pub struct Machine {
    vm: Arc<VmHandle>,
    exit: Arc<AsyncFd<OwnedFd>>,
}

impl fmt::Debug for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Machine")
    }
}

impl Machine {
    /// Start the machine that `config` describes, with QMP on `qmp`. Not cancelled by dropping: the machine then ends.
    ///
    /// # Errors
    /// The machine cannot be built; nothing of it is left.
    pub async fn start(config: VmConfig, qmp: PathBuf) -> Result<Self> {
        let start = move || -> Result<VmHandle> {
            let hypervisor = hypervisor::host().context("use the hypervisor of this host")?;
            let options = VmOptions { hypervisor, qmp: Some(qmp), paused: false };
            Ok(ecr_vmm::start(config, options)?)
        };
        let vm = spawn_blocking(start).await.context("start the virtual machine")??;
        // SAFETY: the descriptor is the handle's and stays open for as long as the handle lives, which it does here.
        let exit = unsafe { BorrowedFd::borrow_raw(vm.exit_fd()) }.try_clone_to_owned()?;
        // SAFETY: the descriptor is moved in and closed by nobody else.
        let exit = unsafe { AsyncFd::register_with_interest(exit, Interest::READABLE) }?;
        Ok(Self { vm: Arc::new(vm), exit: Arc::new(exit) })
    }

    /// Ask the machine for something.
    ///
    /// # Errors
    /// What it says.
    pub async fn send(&self, command: Command) -> Result<Reply> {
        let vm = Arc::clone(&self.vm);
        let answer = spawn_blocking(move || vm.send(command)).await?;
        answer.map_err(|error| anyhow!("{error}"))
    }

    /// Take the device `id` out, and wait until the guest has let it go.
    ///
    /// # Errors
    /// There is no such device, or the guest keeps it.
    pub async fn unplug(&self, id: &str) -> Result<()> {
        let (vm, id) = (Arc::clone(&self.vm), id.to_owned());
        spawn_blocking(move || {
            let events = vm.events();
            vm.send(Command::RemoveDevice { id: id.clone() })
                .map_err(|error| anyhow!("{error}"))?;
            let deadline = Instant::now() + EJECT;
            loop {
                let left = deadline.saturating_duration_since(Instant::now());
                match events.recv_timeout(left) {
                    Ok(event) if event.kind == EventKind::DeviceDeleted { id: id.clone() } => break,
                    Ok(_) => {}
                    Err(RecvTimeoutError::Disconnected) => break,
                    Err(RecvTimeoutError::Timeout) => {
                        bail!(
                            "the guest does not let device {id} go (waited {} s)",
                            EJECT.as_secs()
                        )
                    }
                }
            }
            Ok(())
        })
        .await?
    }

    /// Returns when it has ended, with how, and what the guest said last.
    pub async fn ended(&self) -> String {
        // Never read from, so readable for ever.
        let waited = self.exit.readable().await;
        let how = match (waited, self.vm.ended()) {
            (Err(error), _) => format!("its end cannot be waited for: {error}"),
            (Ok(_), Some(reason)) => describe(&reason).to_owned(),
            (Ok(_), None) => "it ended".to_owned(),
        };
        with_last_output(&how, &self.vm.last_output())
    }

    /// What the guest said last, for a failure report.
    pub async fn last_output(&self) -> String {
        let vm = Arc::clone(&self.vm);
        spawn_blocking(move || vm.last_output()).await.unwrap_or_default()
    }

    /// End it, at once, and wait until nothing of it is left. Ended already, it does nothing.
    ///
    /// # Errors
    /// It did not end in time.
    pub async fn stop(&self) -> Result<()> {
        drop(self.vm.request(Command::Quit));
        let ended = timeout(STOP, self.exit.readable()).await;
        ended
            .map(drop)
            .with_context(|| format!("the virtual machine did not end within {} s", STOP.as_secs()))
    }
}

/// `text`, and behind it what the guest said last, if anything.
pub fn with_last_output(text: &str, output: &str) -> String {
    if output.is_empty() || text.contains(output) {
        text.to_owned()
    } else {
        format!("{text}; the guest's last output was:\n{output}")
    }
}

fn describe(reason: &ShutdownReason) -> &str {
    match reason {
        ShutdownReason::GuestShutdown => "the guest powered off",
        ShutdownReason::GuestReset => "the guest rebooted",
        ShutdownReason::GuestPanic => "the guest's kernel panicked",
        ShutdownReason::HostQuit => "it was told to end",
        ShutdownReason::Failed(text) => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ecr_vmm::config::VsockBackend;

    fn config(change: impl FnOnce(&mut Config)) -> VmConfig {
        let mut config = Config::default();
        config.hypervisor.image = Some("/image".into());
        config.hypervisor.default_vcpus = 2;
        change(&mut config);
        let request = MachineRequest {
            config: &config,
            id: "s1",
            paths: &Paths::new("s1").unwrap(),
            size: Sizing { vcpus: 2, memory_mib: 512 },
            vsock: VsockConfig { cid: 3, backend: VsockBackend::Unix { path: "/v".into() } },
            nets: Vec::new(),
            disks: Vec::new(),
        };
        vm_config(request).unwrap()
    }

    #[test]
    fn the_image_is_persistent_memory() {
        let vm = config(|_| {});
        assert_eq!(vm.nvdimm.unwrap().path, PathBuf::from("/image"));
        assert!(vm.disks.is_empty());
        assert!(vm.boot.cmdline.contains("root=/dev/pmem0p1"), "{}", vm.boot.cmdline);
        assert_eq!((vm.memory.size, vm.memory.shared), (512 << 20, true));
        assert_eq!(vm.fs[0].tag, "kataShared");
    }

    #[test]
    fn or_it_is_the_first_disk() {
        let vm = config(|config| config.hypervisor.disable_image_nvdimm = true);
        assert!(vm.nvdimm.is_none());
        assert!(vm.disks[0].readonly);
        assert!(vm.boot.cmdline.contains("root=/dev/vda1"), "{}", vm.boot.cmdline);
    }

    #[test]
    fn the_console_is_where_the_configuration_says() {
        let serial = config(|config| config.hypervisor.use_legacy_serial = true);
        assert_eq!((serial.console, serial.serial), (ChardevConfig::Off, ChardevConfig::Null));
        let debug = config(|config| config.hypervisor.enable_debug = true);
        assert!(matches!(debug.console, ChardevConfig::Unix { .. }));
    }

    #[test]
    fn last_words_are_said_once() {
        assert_eq!(with_last_output("died", ""), "died");
        assert_eq!(with_last_output("died", "oops"), "died; the guest's last output was:\noops");
        assert_eq!(with_last_output("died: oops", "oops"), "died: oops");
    }
}
