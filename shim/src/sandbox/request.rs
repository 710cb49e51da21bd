// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What the agent is told about the sandbox before there is a container in it.

use ecr_agent_protocol::agent::{self as rpc, Storage};
use oci_spec::runtime::Spec;

use crate::config::{Config, SharedFs};
use crate::container::volume;
use crate::host::share;

/// The specification of the container that a sandbox was made for asks for these things of the whole sandbox.
pub fn create_sandbox(id: &str, spec: &Spec, config: &Config) -> rpc::CreateSandboxRequest {
    const HOSTNAME_MAX: usize = 64;
    let hostname = spec.hostname().clone().unwrap_or_default();
    let shm_size = volume::shm_size(spec).unwrap_or(64 << 20);
    let mut storages = Vec::new();
    if config.hypervisor.shared_fs == SharedFs::VirtioFs {
        storages.push(Storage {
            driver: "virtio-fs".into(),
            source: config.hypervisor.virtio_fs_tag.clone(),
            fstype: "virtiofs".into(),
            mount_point: format!("{}/", share::GUEST),
            ..Default::default()
        });
    }
    storages.push(Storage {
        driver: "ephemeral".into(),
        source: "shm".into(),
        fstype: "tmpfs".into(),
        options: ["noexec", "nosuid", "nodev", "mode=1777"]
            .into_iter()
            .map(str::to_owned)
            .chain([format!("size={shm_size}")])
            .collect(),
        mount_point: volume::GUEST_SHM.into(),
        ..Default::default()
    });
    rpc::CreateSandboxRequest {
        hostname: hostname.chars().take(HOSTNAME_MAX).collect(),
        dns: volume::dns(spec),
        storages,
        sandbox_id: id.into(),
        guest_hook_path: config.hypervisor.guest_hook_path.clone(),
        kernel_modules: config.agent.kernel_modules.iter().map(|m| kernel_module(m)).collect(),
        ..Default::default()
    }
}

/// A module's name and its parameters, separated by blanks.
fn kernel_module(text: &str) -> rpc::KernelModule {
    let mut words = text.split_whitespace().map(str::to_owned);
    rpc::KernelModule {
        name: words.next().unwrap_or_default(),
        parameters: words.collect(),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_has_parameters() {
        let module = kernel_module("e1000e InterruptThrottleRate=3000,3000 EEE=1");
        assert_eq!(module.name, "e1000e");
        assert_eq!(module.parameters, ["InterruptThrottleRate=3000,3000", "EEE=1"]);
    }

    #[test]
    fn the_guest_is_told_what_the_pod_wants() {
        let spec: Spec = serde_json::from_value(serde_json::json!({
            "ociVersion": "1.0.2", "hostname": "h".repeat(80),
            "mounts": [{"destination": "/dev/shm", "type": "tmpfs", "options": ["size=1m"]}]
        }))
        .unwrap();
        let request = create_sandbox("s1", &spec, &Config::default());
        assert_eq!(request.hostname.len(), 64);
        assert_eq!(request.storages[0].source, "kataShared");
        assert!(request.storages[1].options.contains(&"size=1048576".to_owned()));
    }
}
