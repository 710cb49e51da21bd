// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The other tables: `[agent.kata]`, `[runtime]`, `[factory]`, `[image]`.

use std::path::PathBuf;

use super::Table;
use super::setting::{Honoured, Key, Kind, Setting, choice, settings};

choice! {
    /// How a pod's network interface reaches the guest.
    pub enum NetModel, |word, all| format!("Unknown type {word} (known: {all})");
    /// Frames are redirected between the interface and a tap.
    #[default]
    TcFilter = "tcfilter" | "default",
    /// A macvtap on the interface.
    MacVtap = "macvtap",
    /// Not at all.
    None = "none",
}

choice! {
    /// What a container sees of a device that is passed through.
    pub enum VfioMode, |word, all| format!("Unknown VFIO mode {word} (known: {all})");
    /// What the guest's driver makes of it.
    #[default]
    GuestKernel = "guest-kernel",
    /// A VFIO group.
    Vfio = "vfio",
}

choice! {
    /// Where emptyDir volumes are.
    pub enum EmptyDirMode, |word, all| format!("Unknown emptydir_mode {word} (known: {all})");
    /// In the shared file system.
    #[default]
    SharedFs = "shared-fs",
    /// On an encrypted block device.
    BlockEncrypted = "block-encrypted",
    /// On a block device.
    BlockPlain = "block-plain",
}

settings! {
    /// The agent in the guest.
    pub struct Agent, Table::Agent, AGENT_KEYS = config.agent {
        /// Kernel modules to load, each with its parameters behind it.
        kernel_modules: Vec<String> = Vec::new(), Honoured::Yes;
        /// The agent logs more.
        enable_debug: bool = false, Honoured::Yes;
        /// The agent traces its calls.
        enable_tracing: bool = false, Honoured::No;
        /// A shell on vsock port 1026.
        debug_console_enabled: bool = false, Honoured::Yes;
        /// Seconds that the agent has until it answers first. 0: 30.
        dial_timeout: u32 = 30, Honoured::Yes;
        /// Size of the pipes of containers, in bytes; 0: the kernel's.
        container_pipe_size: u32 = 0, Honoured::Yes;
        /// Seconds that the confidential data hub has to answer.
        cdh_api_timeout: u32 = 50, Honoured::No;
        /// Seconds that the agent's helpers have to start.
        launch_process_timeout: u32 = 0, Honoured::No;
        /// Which CDI devices are shown to every container.
        visible_cdi_devices: String = String::new(), Honoured::No;
    }
}

settings! {
    /// The shim.
    pub struct Runtime, Table::Runtime, RUNTIME_KEYS = config.runtime {
        /// How a pod's network interface reaches the guest.
        internetworking_model: NetModel = NetModel::TcFilter, Honoured::Yes;
        /// Leave the pod's network namespace alone.
        disable_new_netns: bool = false, Honoured::Yes;
        /// What a container sees of a device that is passed through.
        vfio_mode: VfioMode = VfioMode::GuestKernel, Honoured::No;
        /// Host directories and files that the guest sees, read-only.
        sandbox_bind_mounts: Vec<PathBuf> = Vec::new(), Honoured::Yes;
        /// Everything of the pod runs in the pod's cgroup.
        sandbox_cgroup_only: bool = false, Honoured::Yes;
        /// Give the machine its final size at boot.
        static_sandbox_resource_mgmt: bool = false, Honoured::Yes;
        /// No seccomp filter in the guest.
        disable_guest_seccomp: bool = false, Honoured::Yes;
        /// Keep emptyDir volumes on the host.
        disable_guest_empty_dir: bool = false, Honoured::Yes;
        /// Where emptyDir volumes are.
        emptydir_mode: EmptyDirMode = EmptyDirMode::SharedFs, Honoured::No;
        /// Names of features that are not finished. There are none.
        experimental: Vec<String> = Vec::new(), Honoured::Yes;
        /// Log more.
        enable_debug: bool = false, Honoured::Yes;
        /// Trace.
        enable_tracing: bool = false, Honoured::No;
        /// Go's profiler.
        enable_pprof: bool = false, Honoured::Moot;
        /// Where traces are sent.
        jaeger_endpoint: String = String::new(), Honoured::No;
        /// User for that.
        jaeger_user: String = String::new(), Honoured::No;
        /// Password for that.
        jaeger_password: String = String::new(), Honoured::No;
        /// Network functions of SR-IOV devices.
        enable_sriov: bool = false, Honoured::No;
        /// SELinux label of processes in the guest.
        guest_selinux_label: String = String::new(), Honoured::No;
        /// Bind each vCPU to a CPU of the host.
        enable_vcpus_pinning: bool = false, Honoured::No;
        /// Seconds that the agent has to create a container.
        create_container_timeout: u32 = 60, Honoured::No;
        /// Where descriptions of directly attached networks are.
        dan_conf: String = "/run/kata-containers/dans".into(), Honoured::No;
        /// Let the guest pull images.
        experimental_force_guest_pull: bool = false, Honoured::No;
        /// The kubelet's socket that tells of devices.
        pod_resource_api_sock: String = String::new(), Honoured::No;
        /// The kubelet's directory.
        kubelet_root_dir: String = String::new(), Honoured::No;
        /// Kind of runtime.
        name: String = String::new(), Honoured::Moot;
        /// Which hypervisor's table counts.
        hypervisor_name: String = String::new(), Honoured::Moot;
        /// Which agent's table counts.
        agent_name: String = String::new(), Honoured::Moot;
        /// Streams of containers over connections of their own.
        use_passfd_io: bool = false, Honoured::No;
        /// The agent's port for those.
        passfd_listener_port: u32 = 1027, Honoured::No;
    }
}

settings! {
    /// Machines made before they are needed.
    pub struct Factory, Table::Factory, FACTORY_KEYS = config.factory {
        /// Clone machines from a template.
        enable_template: bool = false, Honoured::No;
        /// Where the template is.
        template_path: PathBuf = "/run/vc/vm/template".into(), Honoured::No;
        /// Machines kept ready.
        vm_cache_number: u32 = 0, Honoured::No;
        /// Who keeps them.
        vm_cache_endpoint: String = "/var/run/kata-containers/cache.sock".into(), Honoured::No;
    }
}

settings! {
    /// Images inside the guest; without use in Kata, too.
    pub struct Image, Table::Image, IMAGE_KEYS = config.image {
        /// Who provides images.
        provision: String = String::new(), Honoured::Moot;
        /// Pull images in the guest.
        service_offload: bool = false, Honoured::Moot;
    }
}
