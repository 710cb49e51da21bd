// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Clamps, which put a value that can work in the place of one that cannot, and checks, which refuse.

use super::hypervisor::{DEFAULT_MEMORY, MIN_MEMORY, SharedFs, VfioPort};
use super::tables::NetModel;
use super::{Config, Hypervisor};
use crate::error::{Error, Kind, Result};

/// Most vCPUs that a machine of this architecture can have.
pub(super) const MAX_VCPUS: u32 = if cfg!(target_arch = "aarch64") { 123 } else { 240 };
const MAX_BRIDGES: u32 = 5;
const DEFAULT_MEMORY_SLOTS: u32 = 10;
const DEFAULT_MSIZE_9P: u32 = 8192;
const DEFAULT_DIAL_TIMEOUT: u32 = 30;
const MAX_ROOT_PORTS: u32 = 16;
const MAX_IO_THREADS: u32 = 50;

impl Config {
    /// Put limits on numbers. May be called again after values have changed.
    pub(super) fn clamp(&mut self) {
        let (host, machine) = (self.host, &mut self.hypervisor);
        machine.default_maxvcpus = match machine.default_maxvcpus {
            0 => host.cpus,
            count => count.min(host.cpus),
        }
        .min(MAX_VCPUS);
        machine.default_vcpus = machine.default_vcpus.clamp(1, machine.default_maxvcpus);
        if machine.default_memory < MIN_MEMORY {
            machine.default_memory = DEFAULT_MEMORY;
        }
        machine.default_maxmemory = match machine.default_maxmemory {
            0 => host.memory_mib,
            size => size.min(host.memory_mib),
        }
        .max(machine.default_memory);
        if machine.memory_slots == 0 {
            machine.memory_slots = DEFAULT_MEMORY_SLOTS;
        }
        machine.default_bridges = machine.default_bridges.clamp(1, MAX_BRIDGES);
        if machine.msize_9p == 0 {
            machine.msize_9p = DEFAULT_MSIZE_9P;
        }
        drop_idle_bursts(machine);
        if self.agent.dial_timeout == 0 {
            self.agent.dial_timeout = DEFAULT_DIAL_TIMEOUT;
        }
    }

    /// Refuse what cannot work, whatever is on the host.
    pub(super) fn check(&self) -> Result<()> {
        self.check_root()?;
        check_sharing(&self.hypervisor)?;
        check_devices(&self.hypervisor)?;
        check_architecture(&self.hypervisor)?;
        let runtime = &self.runtime;
        if runtime.disable_new_netns && runtime.internetworking_model != NetModel::None {
            return refuse("config disable_new_netns only works with 'none' internetworking_model");
        }
        if let Some(feature) = runtime.experimental.first() {
            return refuse(format!("Unsupported experimental feature {feature:?}"));
        }
        Ok(())
    }

    fn check_root(&self) -> Result<()> {
        let machine = &self.hypervisor;
        match (&machine.image, &machine.initrd) {
            (Some(_), Some(_)) => refuse(
                "having both an image and an initrd defined in the configuration file is not supported",
            ),
            (None, None) => {
                refuse("either image or initrd must be defined in the configuration file")
            }
            (Some(_), None) if self.factory.enable_template => {
                refuse("Factory option enable_template requires an initrd image")
            }
            _ => Ok(()),
        }
    }
}

/// A burst goes beyond a limit; without a limit there is none.
fn drop_idle_bursts(machine: &mut Hypervisor) {
    for (limit, burst, name) in [
        (
            machine.disk_rate_limiter_bw_max_rate,
            &mut machine.disk_rate_limiter_bw_one_time_burst,
            "disk_rate_limiter_bw",
        ),
        (
            machine.disk_rate_limiter_ops_max_rate,
            &mut machine.disk_rate_limiter_ops_one_time_burst,
            "disk_rate_limiter_ops",
        ),
        (
            machine.net_rate_limiter_bw_max_rate,
            &mut machine.net_rate_limiter_bw_one_time_burst,
            "net_rate_limiter_bw",
        ),
        (
            machine.net_rate_limiter_ops_max_rate,
            &mut machine.net_rate_limiter_ops_one_time_burst,
            "net_rate_limiter_ops",
        ),
    ] {
        if limit == 0 && *burst != 0 {
            log::warn!("{name}_one_time_burst = {burst} has no effect without {name}_max_rate");
            *burst = 0;
        }
    }
}

fn check_sharing(machine: &Hypervisor) -> Result<()> {
    let shared = matches!(machine.shared_fs, SharedFs::VirtioFs | SharedFs::VirtioFsNydus);
    if shared && machine.virtio_fs_daemon.is_none() {
        return refuse("cannot enable virtio-fs without daemon path in configuration file");
    }
    if machine.enable_vhost_user_store && !machine.enable_hugepages {
        return refuse(
            "Vhost-user-blk/scsi is enabled without HugePages. This configuration will not work",
        );
    }
    Ok(())
}

fn check_devices(machine: &Hypervisor) -> Result<()> {
    if machine.pcie_root_port > MAX_ROOT_PORTS {
        return refuse(format!(
            "pcie_root_port = {} is more than {MAX_ROOT_PORTS}",
            machine.pcie_root_port
        ));
    }
    if machine.indep_iothreads > MAX_IO_THREADS {
        return refuse(format!(
            "indep_iothreads = {} is more than {MAX_IO_THREADS}",
            machine.indep_iothreads
        ));
    }
    if machine.hot_plug_vfio != VfioPort::NoPort && machine.cold_plug_vfio != VfioPort::NoPort {
        return refuse(format!(
            "hot_plug_vfio = {} and cold_plug_vfio = {} exclude each other: set one of them to no-port",
            machine.hot_plug_vfio, machine.cold_plug_vfio
        ));
    }
    let logical = machine.block_device_logical_sector_size;
    let physical = machine.block_device_physical_sector_size;
    for (name, size) in [("logical", logical), ("physical", physical)] {
        if size != 0 && !(size.is_power_of_two() && (512..=65536).contains(&size)) {
            return refuse(format!(
                "block_device_{name}_sector_size = {size}: expected 0 or a power of two from 512 to 65536"
            ));
        }
    }
    if logical != 0 && physical != 0 && logical > physical {
        return refuse(format!(
            "block_device_logical_sector_size = {logical} is more than block_device_physical_sector_size = {physical}"
        ));
    }
    Ok(())
}

fn check_architecture(machine: &Hypervisor) -> Result<()> {
    if !cfg!(target_arch = "aarch64") {
        return Ok(());
    }
    match machine.pflashes.len() {
        0 | 2 => {}
        1 => return refuse("two pflash images needed for arm64"),
        _ => return refuse("too many pflash images for arm64"),
    }
    if machine.enable_iommu {
        return refuse("Arm64 architecture does not support vIOMMU");
    }
    Ok(())
}

pub(super) fn refuse<T>(text: impl Into<String>) -> Result<T> {
    Err(Error::new(Kind::InvalidArgument, text))
}
