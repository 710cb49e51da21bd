// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What a sandbox's containers will ask for, known before it starts.
//!
//! With `static_sandbox_resource_mgmt` the machine has its final size at boot: the configured size and what is asked for
//! here. A pod's manager sums its containers up in annotations; a container without a pod says it in its specification.

use std::collections::HashMap;

use oci_spec::runtime::LinuxResources;

use super::Config;

const PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";
const QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
const MEMORY: &str = "io.kubernetes.cri.sandbox-memory";

/// What containers ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sizing {
    /// vCPUs.
    pub vcpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
}

impl Sizing {
    fn new(quota: i64, period: u64, memory_bytes: i64) -> Self {
        let quota = u64::try_from(quota).unwrap_or(0);
        let vcpus = if period == 0 { 0 } else { quota.div_ceil(period) };
        Self {
            vcpus: u32::try_from(vcpus).unwrap_or(u32::MAX),
            memory_mib: u64::try_from(memory_bytes).unwrap_or(0) >> 20,
        }
    }
}

/// What a pod's manager says that its containers will ask for. A number that is none counts as 0.
pub fn requested_by_annotations(annotations: &HashMap<String, String>) -> Sizing {
    let number = |key: &str| -> i64 {
        let Some(text) = annotations.get(key) else { return 0 };
        text.parse().unwrap_or_else(|error| {
            log::warn!("annotation {key} = {text:?} is passed over: {error}");
            0
        })
    };
    Sizing::new(number(QUOTA), u64::try_from(number(PERIOD)).unwrap_or(0), number(MEMORY))
}

/// What a container's specification asks for.
pub fn requested_by_resources(resources: &LinuxResources) -> Sizing {
    let cpu = resources.cpu().as_ref();
    let quota = cpu.and_then(|cpu| cpu.quota()).unwrap_or(0);
    let period = cpu.and_then(|cpu| cpu.period()).unwrap_or(0);
    let memory = resources.memory().as_ref().and_then(|memory| memory.limit()).unwrap_or(0);
    Sizing::new(quota, period, memory)
}

impl Config {
    /// The machine's size at boot, when its containers will ask for `requested`.
    pub fn boot_size(&self, requested: Sizing) -> Sizing {
        let machine = &self.hypervisor;
        let configured =
            Sizing { vcpus: machine.default_vcpus, memory_mib: machine.default_memory };
        if !self.runtime.static_sandbox_resource_mgmt {
            return configured;
        }
        let vcpus = configured.vcpus.saturating_add(requested.vcpus);
        let memory = configured.memory_mib.saturating_add(requested.memory_mib);
        Sizing {
            vcpus: vcpus.min(machine.default_maxvcpus),
            memory_mib: memory.min(machine.default_maxmemory),
        }
    }
}
