// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! From the specification that containerd wrote for this host to the one that the guest's agent gets.
//!
//! The host's namespaces, cgroup hierarchy, devices and labels mean nothing in the guest, so they are taken out; what
//! limits the container itself stays. Mounts are [`crate::container::volume`]'s business.

use std::path::Path;

use ecr_agent_protocol::oci;
use oci_spec::runtime::{LinuxNamespaceType, Spec};

use super::wire;

/// A specification as the agent gets it, and what was said in it about the pod.
#[derive(Debug)]
pub struct GuestSpec {
    /// The specification.
    pub spec: oci::Spec,
    /// The container shares its PID namespace with the pod's other containers.
    pub shares_pid_namespace: bool,
}

/// What of the specification depends on the configuration.
#[derive(Debug, Clone, Copy)]
pub struct Constraints {
    /// Drop the seccomp profile: the virtual machine is the wall.
    pub disable_seccomp: bool,
}

/// Namespaces that the agent makes itself, or that the whole guest is.
const GUEST_NAMESPACES: [&str; 4] = ["network", "cgroup", "time", "pid"];

/// The guest's version of `spec`, with its root file system at `root` in the guest.
pub fn for_guest(spec: &Spec, root: &str, constraints: Constraints) -> GuestSpec {
    let mut wire = wire::spec(spec);
    wire.hooks.take();
    if let Some(process) = wire.process.as_mut() {
        process.selinux_label.clear();
        process.apparmor_profile.clear();
    }
    wire.root.mut_or_insert_default().path = root.to_owned();
    let linux = wire.linux.mut_or_insert_default();
    linux.mount_label.clear();
    if constraints.disable_seccomp {
        linux.seccomp.take();
    }
    linux.cgroups_path = cgroups_path(&linux.cgroups_path);
    linux.namespaces.retain(|namespace| !GUEST_NAMESPACES.contains(&namespace.type_.as_str()));
    linux.namespaces.iter_mut().for_each(|namespace| namespace.path.clear());
    linux.devices.retain(|device| !device.path.starts_with("/dev/vfio/"));
    if let Some(resources) = linux.resources.as_mut() {
        constrain_resources(resources);
    }
    GuestSpec { spec: wire, shares_pid_namespace: shares_pid_namespace(spec) }
}

/// Limits that can be kept in the guest. Devices and disks have other numbers there, and its CPUs are not the host's.
pub fn constrain_resources(resources: &mut oci::LinuxResources) {
    resources.devices.clear();
    resources.block_io.take();
    resources.network.take();
    if let Some(cpu) = resources.cpu.as_mut() {
        cpu.cpus.clear();
        cpu.mems.clear();
    }
}

/// A cgroup of the guest. systemd's notation, `slice:prefix:name`, becomes a path.
fn cgroups_path(host: &str) -> String {
    match host.split(':').collect::<Vec<_>>()[..] {
        [_, prefix, name] => format!("/{prefix}/{name}"),
        _ => host.to_owned(),
    }
}

fn shares_pid_namespace(spec: &Spec) -> bool {
    namespace_path(spec, LinuxNamespaceType::Pid).is_some_and(|path| !path.as_os_str().is_empty())
}

/// The path of the namespace of type `kind` in `spec`: `None` where the container has no such namespace of its own,
/// empty where a new one is asked for.
pub fn namespace_path(spec: &Spec, kind: LinuxNamespaceType) -> Option<&Path> {
    let namespaces = spec.linux().as_ref()?.namespaces().as_ref()?;
    let namespace = namespaces.iter().find(|namespace| namespace.typ() == kind)?;
    Some(namespace.path().as_deref().unwrap_or(Path::new("")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(json: &str) -> Spec {
        serde_json::from_str(json).unwrap()
    }

    const POD_CONTAINER: &str = r#"{
        "ociVersion": "1.0.2", "root": {"path": "rootfs", "readonly": true}, "mounts": [],
        "process": {"user": {"uid": 0, "gid": 0}, "args": ["sh"], "cwd": "/", "selinuxLabel": "s", "apparmorProfile": "a"},
        "linux": {
            "cgroupsPath": "kubepods.slice:cri-containerd:c1",
            "namespaces": [{"type": "pid", "path": "/proc/7/ns/pid"}, {"type": "ipc", "path": "/proc/7/ns/ipc"},
                {"type": "mount"}, {"type": "network", "path": "/proc/7/ns/net"}, {"type": "cgroup"}],
            "resources": {"devices": [{"allow": false, "access": "rwm"}], "memory": {"limit": 1048576},
                "cpu": {"quota": 50000, "period": 100000, "cpus": "3"}, "pids": {"limit": 9}},
            "seccomp": {"defaultAction": "SCMP_ACT_ALLOW"}
        }}"#;

    #[test]
    fn what_belongs_to_the_host_stays_there() {
        let guest = for_guest(&spec(POD_CONTAINER), "/r", Constraints { disable_seccomp: true });
        let linux = &guest.spec.linux;
        let kinds: Vec<&str> = linux.namespaces.iter().map(|n| n.type_.as_str()).collect();
        assert_eq!(kinds, ["ipc", "mount"]);
        assert!(linux.namespaces.iter().all(|namespace| namespace.path.is_empty()));
        assert!(linux.seccomp.is_none());
        assert!(linux.resources.devices.is_empty());
        assert_eq!(linux.resources.cpu.cpus, "");
        assert_eq!(linux.cgroups_path, "/cri-containerd/c1");
        assert_eq!(guest.spec.process.selinux_label, "");
        assert_eq!(guest.spec.process.apparmor_profile, "");
        assert!(guest.shares_pid_namespace);
    }

    #[test]
    fn what_limits_the_container_reaches_the_guest() {
        let guest = for_guest(&spec(POD_CONTAINER), "/r", Constraints { disable_seccomp: false });
        assert_eq!(guest.spec.root.path, "/r");
        assert!(guest.spec.root.readonly);
        assert_eq!(guest.spec.linux.resources.memory.limit, 1 << 20);
        assert_eq!(guest.spec.linux.resources.cpu.quota, 50_000);
        assert_eq!(guest.spec.linux.resources.pids.limit, 9);
        assert!(guest.spec.linux.seccomp.is_some());
    }

    #[test]
    fn a_namespace_is_absent_new_or_shared() {
        let spec = spec(POD_CONTAINER);
        assert_eq!(namespace_path(&spec, LinuxNamespaceType::User), None);
        assert_eq!(namespace_path(&spec, LinuxNamespaceType::Mount), Some(Path::new("")));
        assert_eq!(
            namespace_path(&spec, LinuxNamespaceType::Network),
            Some(Path::new("/proc/7/ns/net"))
        );
    }
}
