// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! `ecr-runtime env`: what a sandbox would be made of on this host, in the tables of Kata's `kata-env`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use serde::Serialize;

use ecr_shim::config::{self, Config, HostFacts, Root, Sources};

use crate::host;
use crate::version;

/// The version of these tables.
const FORMAT: &str = "1.0.26";

#[derive(Debug, Args)]
pub struct Arguments {
    /// In JSON instead of TOML
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Environment {
    meta: Meta,
    runtime: Runtime,
    hypervisor: Hypervisor,
    kernel: Kernel,
    image: File,
    initrd: File,
    agent: Agent,
    host: Host,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Meta {
    version: &'static str,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Kernel {
    path: PathBuf,
    parameters: String,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
struct File {
    path: PathBuf,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Hypervisor {
    machine_type: String,
    version: String,
    path: PathBuf,
    block_device_driver: &'static str,
    entropy_source: PathBuf,
    #[serde(rename = "SharedFS")]
    shared_fs: &'static str,
    #[serde(rename = "VirtioFSDaemon")]
    virtio_fs_daemon: PathBuf,
    socket_path: String,
    #[serde(rename = "Msize9p")]
    msize_9p: u32,
    memory_slots: u32,
    #[serde(rename = "PCIeRootPort")]
    pcie_root_port: u32,
    #[serde(rename = "HotplugVFIOOnRootBus")]
    hotplug_vfio_on_root_bus: bool,
    debug: bool,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Runtime {
    path: PathBuf,
    experimental: Vec<String>,
    debug: bool,
    trace: bool,
    disable_guest_seccomp: bool,
    disable_new_net_ns: bool,
    sandbox_cgroup_only: bool,
    config: File,
    version: RuntimeVersion,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
struct RuntimeVersion {
    #[serde(rename = "OCI")]
    oci: &'static str,
    version: Version,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Version {
    semver: &'static str,
    commit: &'static str,
    major: u64,
    minor: u64,
    patch: u64,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Agent {
    debug: bool,
    trace: bool,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Host {
    available_guest_protections: Vec<String>,
    kernel: String,
    architecture: &'static str,
    #[serde(rename = "VMContainerCapable")]
    vm_container_capable: bool,
    #[serde(rename = "SupportVSocks")]
    support_vsocks: bool,
    distro: Distro,
    #[serde(rename = "CPU")]
    cpu: Cpu,
    memory: Memory,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Distro {
    name: String,
    version: String,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Cpu {
    vendor: String,
    model: String,
    #[serde(rename = "CPUs")]
    cpus: u32,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Memory {
    total: u64,
    free: u64,
    available: u64,
}

/// Print the tables.
pub fn run(arguments: &Arguments, named: Option<PathBuf>) -> Result<ExitCode> {
    let sources = Sources::of_tool(named)?;
    let config = config::load(&sources)?;
    let environment = Environment::of(&config, sources.host);
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&environment)?);
    } else {
        print!("{}", toml::to_string(&environment)?);
    }
    Ok(ExitCode::SUCCESS)
}

impl Environment {
    fn of(config: &Config, facts: HostFacts) -> Self {
        let machine = &config.hypervisor;
        Self {
            meta: Meta { version: FORMAT },
            runtime: Runtime::of(config),
            hypervisor: Hypervisor::of(config),
            kernel: Kernel {
                path: machine.kernel.clone(),
                parameters: config::kernel_cmdline(config, root(config)),
            },
            image: File { path: machine.image.clone().unwrap_or_default() },
            initrd: File { path: machine.initrd.clone().unwrap_or_default() },
            agent: Agent { debug: config.agent.enable_debug, trace: config.agent.enable_tracing },
            host: Host::of(facts),
        }
    }
}

/// Where the guest's root file system would be.
fn root(config: &Config) -> Root {
    match (&config.hypervisor.image, config.hypervisor.disable_image_nvdimm) {
        (None, _) => Root::Initrd,
        (Some(_), true) => Root::VirtioBlk,
        (Some(_), false) => Root::Nvdimm,
    }
}

impl Hypervisor {
    fn of(config: &Config) -> Self {
        let machine = &config.hypervisor;
        // The machine runs in the shim.
        let shim = std::env::current_exe().unwrap_or_default();
        Self {
            machine_type: machine.machine_type.clone(),
            version: format!("ecr-vmm {}", version::VERSION),
            path: shim.with_file_name("containerd-shim-ecr-v2"),
            block_device_driver: machine.block_device_driver.as_str(),
            entropy_source: machine.entropy_source.clone(),
            shared_fs: machine.shared_fs.as_str(),
            virtio_fs_daemon: machine.virtio_fs_daemon.clone().unwrap_or_default(),
            socket_path: String::new(),
            msize_9p: machine.msize_9p,
            memory_slots: machine.memory_slots,
            pcie_root_port: machine.pcie_root_port,
            hotplug_vfio_on_root_bus: machine.hotplug_vfio_on_root_bus,
            debug: machine.enable_debug,
        }
    }
}

impl Runtime {
    fn of(config: &Config) -> Self {
        let number = |text: &str| text.parse().unwrap_or(0);
        Self {
            path: std::env::current_exe().unwrap_or_default(),
            experimental: config.runtime.experimental.clone(),
            debug: config.runtime.enable_debug,
            trace: config.runtime.enable_tracing,
            disable_guest_seccomp: config.runtime.disable_guest_seccomp,
            disable_new_net_ns: config.runtime.disable_new_netns,
            sandbox_cgroup_only: config.runtime.sandbox_cgroup_only,
            config: File { path: config.path.clone() },
            version: RuntimeVersion {
                oci: version::OCI,
                version: Version {
                    semver: version::VERSION,
                    commit: version::commit(),
                    major: number(env!("CARGO_PKG_VERSION_MAJOR")),
                    minor: number(env!("CARGO_PKG_VERSION_MINOR")),
                    patch: number(env!("CARGO_PKG_VERSION_PATCH")),
                },
            },
        }
    }
}

impl Host {
    fn of(facts: HostFacts) -> Self {
        Self {
            available_guest_protections: Vec::new(),
            kernel: host::kernel(),
            architecture: if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
            vm_container_capable: host::can_use("/dev/kvm").is_ok(),
            support_vsocks: Path::new("/dev/vhost-vsock").exists(),
            distro: Distro {
                name: host::distribution("NAME"),
                version: host::distribution("VERSION_ID"),
            },
            cpu: Cpu {
                vendor: host::cpuinfo("vendor_id"),
                model: host::cpuinfo("model name"),
                cpus: facts.cpus,
            },
            memory: Memory {
                total: host::memory("MemTotal"),
                free: host::memory("MemFree"),
                available: host::memory("MemAvailable"),
            },
        }
    }
}
