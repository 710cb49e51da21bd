// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The guest kernel's command line. Users see its order: the later of two parameters counts.

use super::{BlockDriver, Config};

/// Where the guest's root file system is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Root {
    /// In the initial RAM disk.
    Initrd,
    /// An image shown as persistent memory.
    Nvdimm,
    /// An image shown as the first block device.
    VirtioBlk,
}

/// `pci=lastbus=0` saves the kernel the search for buses that no bridge leads to. The i8042 options keep it from looking
/// for a keyboard; `reboot=k` resets by way of the same controller. Both are as the machine has them.
const X86_64: &str = "tsc=reliable no_timer_check rcupdate.rcu_expedited=1 i8042.direct=1 i8042.dumbkbd=1 i8042.nopnp=1 \
                      i8042.noaux=1 noreplace-smp reboot=k cryptomgr.notests net.ifnames=0 pci=lastbus=0";
const AARCH64: &str = "iommu.passthrough=0";
/// The console on the serial port.
const SERIAL_CONSOLE: &str =
    if cfg!(target_arch = "aarch64") { "console=ttyAMA0" } else { "console=ttyS0" };
const IOMMU: &str = "intel_iommu=on iommu=pt";
/// For images of Kata, whose first process is systemd. Our agent, when it is the first process, passes over them.
const SYSTEMD: &str = "systemd.unit=kata-containers.target systemd.mask=systemd-networkd.service \
                       systemd.mask=systemd-networkd.socket";

/// The kernel's command line for a machine with this configuration and root.
pub fn kernel_cmdline(config: &Config, root: Root) -> String {
    let machine = &config.hypervisor;
    let mut words: Vec<String> = Vec::new();
    let mut put = |text: &str| {
        if !text.trim().is_empty() {
            words.push(text.trim().into());
        }
    };
    put(if cfg!(target_arch = "aarch64") { AARCH64 } else { X86_64 });
    if machine.enable_iommu {
        put(IOMMU);
    }
    put(&root_parameters(root, machine.rootfs_type.as_str()));
    put(if machine.use_legacy_serial { SERIAL_CONSOLE } else { "console=hvc0 console=hvc1" });
    put(if machine.enable_debug {
        "debug systemd.show_status=true systemd.log_level=debug"
    } else {
        "quiet systemd.show_status=false"
    });
    put(&format!("panic=1 nr_cpus={}", machine.default_maxvcpus));
    if root != Root::Initrd {
        put(SYSTEMD);
    }
    // The shim says which SCSI disks there are; the kernel need not look.
    if machine.block_device_driver == BlockDriver::VirtioScsi {
        put("scsi_mod.scan=none");
    }
    put(&agent_parameters(config));
    put(&machine.kernel_params);
    if host_is_fips() {
        put("fips=1");
    }
    words.join(" ")
}

fn root_parameters(root: Root, fstype: &str) -> String {
    let (device, dax) = match root {
        Root::Initrd => return String::new(),
        Root::Nvdimm => ("/dev/pmem0p1", true),
        Root::VirtioBlk => ("/dev/vda1", false),
    };
    let flags = match (fstype, dax) {
        ("ext4", true) => "rootflags=dax,data=ordered,errors=remount-ro ",
        ("ext4", false) => "rootflags=data=ordered,errors=remount-ro ",
        (_, true) => "rootflags=dax ",
        (_, false) => "",
    };
    format!("root={device} {flags}ro rootfstype={fstype}")
}

fn agent_parameters(config: &Config) -> String {
    let agent = &config.agent;
    let mut words = Vec::new();
    if agent.enable_debug {
        words.push("agent.log=debug".to_owned());
    }
    if agent.enable_tracing {
        words.push("agent.trace=true".to_owned());
    }
    if agent.container_pipe_size != 0 {
        words.push(format!("agent.container_pipe_size={}", agent.container_pipe_size));
    }
    if agent.debug_console_enabled {
        words.push("agent.debug_console agent.debug_console_vport=1026".to_owned());
    }
    words.join(" ")
}

/// A host that restricts its cryptography asks the same of its guests.
fn host_is_fips() -> bool {
    std::fs::read("/proc/sys/crypto/fips_enabled").is_ok_and(|text| text.starts_with(b"1"))
}
