// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The OCI runtime specification in the agent protocol's messages.
//!
//! The messages have no presence: an absent number becomes zero. What the protocol has no field for (personality, time
//! offsets, I/O priority, RDMA, unified cgroup keys) does not reach the guest; [`crate::container::spec`] says so once.

use std::path::Path;

use ecr_agent_protocol::oci;
use oci_spec::runtime as spec;
use protobuf::MessageField;
use serde::Serialize;

/// The name of an enumeration's value in `config.json`.
fn name(value: impl Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(name)) => name,
        _ => String::new(),
    }
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

fn path(path: Option<&std::path::PathBuf>) -> String {
    path.map(|path| text(path)).unwrap_or_default()
}

/// All items of an optional list, converted.
fn list<T, U>(items: Option<&Vec<T>>, convert: impl Fn(&T) -> U) -> Vec<U> {
    items.into_iter().flatten().map(convert).collect()
}

fn strings(items: Option<&Vec<String>>) -> Vec<String> {
    items.cloned().unwrap_or_default()
}

/// A whole specification.
pub fn spec(from: &spec::Spec) -> oci::Spec {
    oci::Spec {
        version: from.version().clone(),
        process: from.process().as_ref().map(process).into(),
        root: from.root().as_ref().map(root).into(),
        hostname: from.hostname().clone().unwrap_or_default(),
        mounts: list(from.mounts().as_ref(), mount),
        annotations: from.annotations().clone().unwrap_or_default(),
        linux: from.linux().as_ref().map(linux).into(),
        ..Default::default()
    }
}

/// A process: a container's first, or an exec.
pub fn process(from: &spec::Process) -> oci::Process {
    oci::Process {
        terminal: from.terminal().unwrap_or_default(),
        console_size: from.console_size().map(console_size).into(),
        user: MessageField::some(user(from.user())),
        args: strings(from.args().as_ref()),
        env: strings(from.env().as_ref()),
        cwd: text(from.cwd()),
        capabilities: from.capabilities().as_ref().map(capabilities).into(),
        rlimits: list(from.rlimits().as_ref(), |limit| oci::POSIXRlimit {
            type_: name(limit.typ()),
            hard: limit.hard(),
            soft: limit.soft(),
            ..Default::default()
        }),
        no_new_privileges: from.no_new_privileges().unwrap_or_default(),
        apparmor_profile: from.apparmor_profile().clone().unwrap_or_default(),
        oom_score_adj: from.oom_score_adj().unwrap_or_default().into(),
        selinux_label: from.selinux_label().clone().unwrap_or_default(),
        ..Default::default()
    }
}

/// Limits of a container.
pub fn resources(from: &spec::LinuxResources) -> oci::LinuxResources {
    oci::LinuxResources {
        devices: list(from.devices().as_ref(), |device| oci::LinuxDeviceCgroup {
            allow: device.allow(),
            type_: device.typ().map(name).unwrap_or_default(),
            major: device.major().unwrap_or_default(),
            minor: device.minor().unwrap_or_default(),
            access: device.access().clone().unwrap_or_default(),
            ..Default::default()
        }),
        memory: from.memory().as_ref().map(memory).into(),
        cpu: from.cpu().as_ref().map(cpu).into(),
        pids: from
            .pids()
            .as_ref()
            .map(|pids| oci::LinuxPids { limit: pids.limit(), ..Default::default() })
            .into(),
        block_io: from.block_io().as_ref().map(block_io).into(),
        hugepage_limits: list(from.hugepage_limits().as_ref(), |limit| oci::LinuxHugepageLimit {
            pagesize: limit.page_size().clone(),
            limit: u64::try_from(limit.limit()).unwrap_or(u64::MAX),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn console_size(from: spec::Box) -> oci::Box {
    oci::Box {
        height: u32::try_from(from.height()).unwrap_or_default(),
        width: u32::try_from(from.width()).unwrap_or_default(),
        ..Default::default()
    }
}

fn user(from: &spec::User) -> oci::User {
    oci::User {
        uid: from.uid(),
        gid: from.gid(),
        additional_gids: from.additional_gids().clone().unwrap_or_default(),
        username: from.username().clone().unwrap_or_default(),
        ..Default::default()
    }
}

fn capabilities(from: &spec::LinuxCapabilities) -> oci::LinuxCapabilities {
    let names = |set: &Option<spec::Capabilities>| {
        let mut names: Vec<String> = set.iter().flatten().map(name).collect();
        names.sort();
        names
    };
    oci::LinuxCapabilities {
        bounding: names(from.bounding()),
        effective: names(from.effective()),
        inheritable: names(from.inheritable()),
        permitted: names(from.permitted()),
        ambient: names(from.ambient()),
        ..Default::default()
    }
}

fn root(from: &spec::Root) -> oci::Root {
    oci::Root {
        path: text(from.path()),
        readonly: from.readonly().unwrap_or_default(),
        ..Default::default()
    }
}

fn mount(from: &spec::Mount) -> oci::Mount {
    oci::Mount {
        destination: text(from.destination()),
        source: path(from.source().as_ref()),
        type_: from.typ().clone().unwrap_or_default(),
        options: strings(from.options().as_ref()),
        ..Default::default()
    }
}

fn linux(from: &spec::Linux) -> oci::Linux {
    let id_mapping = |mapping: &spec::LinuxIdMapping| oci::LinuxIDMapping {
        host_id: mapping.host_id(),
        container_id: mapping.container_id(),
        size: mapping.size(),
        ..Default::default()
    };
    oci::Linux {
        uid_mappings: list(from.uid_mappings().as_ref(), id_mapping),
        gid_mappings: list(from.gid_mappings().as_ref(), id_mapping),
        sysctl: from.sysctl().clone().unwrap_or_default(),
        resources: from.resources().as_ref().map(resources).into(),
        cgroups_path: path(from.cgroups_path().as_ref()),
        namespaces: list(from.namespaces().as_ref(), |namespace| oci::LinuxNamespace {
            type_: name(namespace.typ()),
            path: path(namespace.path().as_ref()),
            ..Default::default()
        }),
        devices: list(from.devices().as_ref(), |device| oci::LinuxDevice {
            path: text(device.path()),
            type_: name(device.typ()),
            major: device.major(),
            minor: device.minor(),
            file_mode: device.file_mode().unwrap_or_default(),
            uid: device.uid().unwrap_or_default(),
            gid: device.gid().unwrap_or_default(),
            ..Default::default()
        }),
        seccomp: from.seccomp().as_ref().map(seccomp).into(),
        rootfs_propagation: from.rootfs_propagation().clone().unwrap_or_default(),
        masked_paths: strings(from.masked_paths().as_ref()),
        readonly_paths: strings(from.readonly_paths().as_ref()),
        mount_label: from.mount_label().clone().unwrap_or_default(),
        ..Default::default()
    }
}

fn memory(from: &spec::LinuxMemory) -> oci::LinuxMemory {
    oci::LinuxMemory {
        limit: from.limit().unwrap_or_default(),
        reservation: from.reservation().unwrap_or_default(),
        swap: from.swap().unwrap_or_default(),
        kernel: from.kernel().unwrap_or_default(),
        kernel_tcp: from.kernel_tcp().unwrap_or_default(),
        swappiness: from.swappiness().unwrap_or_default(),
        disable_oom_killer: from.disable_oom_killer().unwrap_or_default(),
        ..Default::default()
    }
}

fn cpu(from: &spec::LinuxCpu) -> oci::LinuxCPU {
    oci::LinuxCPU {
        shares: from.shares().unwrap_or_default(),
        quota: from.quota().unwrap_or_default(),
        period: from.period().unwrap_or_default(),
        realtime_runtime: from.realtime_runtime().unwrap_or_default(),
        realtime_period: from.realtime_period().unwrap_or_default(),
        cpus: from.cpus().clone().unwrap_or_default(),
        mems: from.mems().clone().unwrap_or_default(),
        ..Default::default()
    }
}

fn block_io(from: &spec::LinuxBlockIo) -> oci::LinuxBlockIO {
    let throttle = |device: &spec::LinuxThrottleDevice| oci::LinuxThrottleDevice {
        major: device.major(),
        minor: device.minor(),
        rate: device.rate(),
        ..Default::default()
    };
    oci::LinuxBlockIO {
        weight: from.weight().unwrap_or_default().into(),
        leaf_weight: from.leaf_weight().unwrap_or_default().into(),
        weight_device: list(from.weight_device().as_ref(), |device| oci::LinuxWeightDevice {
            major: device.major(),
            minor: device.minor(),
            weight: device.weight().unwrap_or_default().into(),
            leaf_weight: device.leaf_weight().unwrap_or_default().into(),
            ..Default::default()
        }),
        throttle_read_bps_device: list(from.throttle_read_bps_device().as_ref(), throttle),
        throttle_write_bps_device: list(from.throttle_write_bps_device().as_ref(), throttle),
        throttle_read_iops_device: list(from.throttle_read_iops_device().as_ref(), throttle),
        throttle_write_iops_device: list(from.throttle_write_iops_device().as_ref(), throttle),
        ..Default::default()
    }
}

fn seccomp(from: &spec::LinuxSeccomp) -> oci::LinuxSeccomp {
    oci::LinuxSeccomp {
        default_action: name(from.default_action()),
        architectures: list(from.architectures().as_ref(), |arch| name(arch)),
        flags: list(from.flags().as_ref(), |flag| name(flag)),
        syscalls: list(from.syscalls().as_ref(), |call| oci::LinuxSyscall {
            names: call.names().clone(),
            action: name(call.action()),
            errno_ret: call.errno_ret().map(oci::linux_syscall::Errno_ret::Errnoret),
            args: list(call.args().as_ref(), |arg| oci::LinuxSeccompArg {
                index: arg.index() as u64,
                value: arg.value(),
                value_two: arg.value_two().unwrap_or_default(),
                op: name(arg.op()),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci_spec::runtime::Spec;

    #[test]
    fn the_default_specification_crosses_with_its_names() {
        let wire = spec(&Spec::default());
        assert_eq!(wire.process.args, ["sh"]);
        assert_eq!(wire.process.cwd, "/");
        assert!(wire.process.capabilities.bounding.contains(&"CAP_KILL".to_owned()));
        assert_eq!(wire.process.rlimits[0].type_, "RLIMIT_NOFILE");
        let kinds: Vec<&str> = wire.linux.namespaces.iter().map(|n| n.type_.as_str()).collect();
        assert!(kinds.contains(&"mount") && kinds.contains(&"network"), "{kinds:?}");
        let proc = wire.mounts.iter().find(|mount| mount.destination == "/proc").unwrap();
        assert_eq!((proc.type_.as_str(), proc.source.as_str()), ("proc", "proc"));
    }

    #[test]
    fn seccomp_keeps_absent_and_zero_apart() {
        let profile = serde_json::from_str(
            r#"{"defaultAction":"SCMP_ACT_ERRNO","architectures":["SCMP_ARCH_X86_64"],"syscalls":[
                {"names":["read"],"action":"SCMP_ACT_ALLOW"},
                {"names":["clone"],"action":"SCMP_ACT_ERRNO","errnoRet":0,
                 "args":[{"index":0,"value":2114060288,"valueTwo":0,"op":"SCMP_CMP_MASKED_EQ"}]}]}"#,
        );
        let wire = seccomp(&profile.unwrap());
        assert_eq!(wire.default_action, "SCMP_ACT_ERRNO");
        assert_eq!(wire.architectures, ["SCMP_ARCH_X86_64"]);
        assert!(wire.syscalls[0].errno_ret.is_none());
        assert!(wire.syscalls[1].errno_ret.is_some());
        assert_eq!(wire.syscalls[1].args[0].op, "SCMP_CMP_MASKED_EQ");
    }
}
