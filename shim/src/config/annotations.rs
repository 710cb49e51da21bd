// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What a pod's annotations change.
//!
//! Those about the virtual machine must be let in by `enable_annotations`; paths among them must, besides, be one of
//! those that the matching `valid_*` key stands for. Those about the agent and the runtime are always let in. Only the
//! annotations of the container that brings the sandbox into being count.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use regex::Regex;
use toml::Value;

use super::check::{MAX_VCPUS, refuse};
use super::hypervisor::{MACHINE_TYPE, MIN_MEMORY};
use super::setting::{Key, Kind};
use super::{Config, Hypervisor, Origin, Table, asset};
use crate::error::{Error, Kind as ErrorKind, Result};

const HYPERVISOR: &str = "io.katacontainers.config.hypervisor.";
const RUNTIME: &str = "io.katacontainers.config.runtime.";
const AGENT: &str = "io.katacontainers.config.agent.";
const VCPUS_PINNING: &str = "io.katacontainers.enable_vcpus_pinning";
/// The documentation has the hash's type beside the hashes, the code beside the prefix.
const HASH_TYPES: [&str; 2] =
    ["io.katacontainers.asset_hash_type", "io.katacontainers.config.hypervisor.asset_hash_type"];

/// What besides its type is asked of an annotation's value.
#[derive(Clone, Copy)]
pub(super) enum Rule {
    /// Nothing.
    Plain,
    /// 0 and the empty string change nothing.
    UnlessEmpty,
    /// At least 1.
    Positive,
    /// vCPUs of the host, at boot.
    Vcpus,
    /// vCPUs of the host.
    MaxVcpus,
    /// Enough for a machine.
    Memory,
    /// A path that the list stands for; the text names it in errors.
    Listed(fn(&Hypervisor) -> &[String], &'static str),
    /// A file, absolute, with the hash that this annotation may give.
    Asset(&'static str),
    /// Goes behind what is there.
    Append,
    /// Words separated by this character.
    Words(char),
}

/// The annotation's name behind its prefix, and what it does. Where the key has another name, `RENAMED` says so.
pub(super) const HYPERVISOR_RULES: &[(&str, Rule)] = &[
    ("kernel", Rule::Asset("kernel_hash")),
    ("image", Rule::Asset("image_hash")),
    ("initrd", Rule::Asset("initrd_hash")),
    ("firmware", Rule::Asset("firmware_hash")),
    ("firmware_volume", Rule::Asset("firmware_volume_hash")),
    ("path", Rule::Listed(|h| &h.valid_hypervisor_paths, "hypervisor")),
    ("jailer_path", Rule::Listed(|h| &h.valid_jailer_paths, "jailer")),
    ("ctlpath", Rule::Listed(|h| &h.valid_ctlpaths, "hypervisor control")),
    ("kernel_params", Rule::Append),
    ("machine_type", Rule::UnlessEmpty),
    ("machine_accelerators", Rule::UnlessEmpty),
    ("cpu_features", Rule::UnlessEmpty),
    // The most comes first: the number at boot is measured by it.
    ("default_max_vcpus", Rule::MaxVcpus),
    ("default_vcpus", Rule::Vcpus),
    ("default_memory", Rule::Memory),
    ("memory_slots", Rule::UnlessEmpty),
    ("memory_offset", Rule::UnlessEmpty),
    ("enable_virtio_mem", Rule::Plain),
    ("enable_mem_prealloc", Rule::Plain),
    ("enable_hugepages", Rule::Plain),
    ("enable_iommu", Rule::Plain),
    ("enable_iommu_platform", Rule::Plain),
    ("enable_guest_swap", Rule::Plain),
    ("rootless", Rule::Plain),
    ("file_mem_backend", Rule::Listed(|h| &h.valid_file_mem_backends, "file_mem_backend value")),
    ("entropy_source", Rule::Listed(|h| &h.valid_entropy_sources, "entropy source")),
    (
        "vhost_user_store_path",
        Rule::Listed(|h| &h.valid_vhost_user_store_paths, "vhost store path"),
    ),
    ("virtio_fs_daemon", Rule::Listed(|h| &h.valid_virtio_fs_daemon_paths, "virtiofs daemon")),
    ("block_device_driver", Rule::UnlessEmpty),
    ("block_device_aio", Rule::UnlessEmpty),
    ("disable_block_device_use", Rule::Plain),
    ("enable_iothreads", Rule::Plain),
    ("block_device_cache_set", Rule::Plain),
    ("block_device_cache_direct", Rule::Plain),
    ("block_device_cache_noflush", Rule::Plain),
    ("shared_fs", Rule::UnlessEmpty),
    ("virtio_fs_cache", Rule::UnlessEmpty),
    ("virtio_fs_cache_size", Rule::Plain),
    ("virtio_fs_extra_args", Rule::Append),
    ("msize_9p", Rule::Positive),
    ("disable_vhost_net", Rule::Plain),
    ("disable_image_nvdimm", Rule::Plain),
    ("hotplug_vfio_on_root_bus", Rule::Plain),
    ("use_legacy_serial", Rule::Plain),
    ("pcie_root_port", Rule::Plain),
    ("guest_hook_path", Rule::UnlessEmpty),
    ("rx_rate_limiter_max_rate", Rule::Plain),
    ("tx_rate_limiter_max_rate", Rule::Plain),
    ("enable_vhost_user_store", Rule::Plain),
    // Newer ones.
    ("kernel_verity_params", Rule::Plain),
    ("vhost_user_reconnect_timeout_sec", Rule::Plain),
    ("hot_plug_vfio", Rule::UnlessEmpty),
    ("cold_plug_vfio", Rule::UnlessEmpty),
    ("pcie_switch_port", Rule::Plain),
    ("reclaim_guest_freed_memory", Rule::Plain),
    ("numa_mapping", Rule::Plain),
    ("indep_iothreads", Rule::Plain),
    ("blk_logical_sector_size", Rule::Plain),
    ("blk_physical_sector_size", Rule::Plain),
];

pub(super) const RENAMED: &[(&str, &str)] = &[
    ("default_max_vcpus", "default_maxvcpus"),
    ("blk_logical_sector_size", "block_device_logical_sector_size"),
    ("blk_physical_sector_size", "block_device_physical_sector_size"),
];

pub(super) const RUNTIME_RULES: &[(&str, Rule)] = &[
    ("disable_guest_seccomp", Rule::Plain),
    ("sandbox_cgroup_only", Rule::Plain),
    ("enable_pprof", Rule::Plain),
    ("disable_new_netns", Rule::Plain),
    ("experimental", Rule::Words(' ')),
    ("internetworking_model", Rule::Plain),
    ("vfio_mode", Rule::Plain),
    ("guest_selinux_label", Rule::Plain),
    ("create_container_timeout", Rule::Plain),
    ("experimental_force_guest_pull", Rule::Plain),
];

pub(super) const AGENT_RULES: &[(&str, Rule)] = &[
    ("kernel_modules", Rule::Words(';')),
    ("enable_tracing", Rule::Plain),
    ("container_pipe_size", Rule::Plain),
];

impl Config {
    /// Let a pod's annotations change the configuration, as far as they are let in.
    ///
    /// # Errors
    /// One of them is not let in, or its value makes no sense.
    pub fn apply_annotations(&mut self, annotations: &HashMap<String, String>) -> Result<()> {
        self.let_in(annotations)?;
        for (table, prefix, rules) in [
            (Table::Hypervisor, HYPERVISOR, HYPERVISOR_RULES),
            (Table::Runtime, RUNTIME, RUNTIME_RULES),
            (Table::Agent, AGENT, AGENT_RULES),
        ] {
            for &(suffix, rule) in rules {
                let annotation = format!("{prefix}{suffix}");
                let Some(text) = annotations.get(&annotation) else { continue };
                let renamed = RENAMED.iter().find(|(from, _)| *from == suffix);
                let Some(key) = table.key(renamed.map_or(suffix, |(_, to)| to)) else { continue };
                self.apply(key, rule, &annotation, text, annotations)?;
            }
        }
        if let (Some(text), Some(key)) =
            (annotations.get(VCPUS_PINNING), Table::Runtime.key("enable_vcpus_pinning"))
        {
            self.apply(key, Rule::Plain, VCPUS_PINNING, text, annotations)?;
        }
        self.settle_root(annotations);
        self.clamp();
        self.check()?;
        self.check_assets()
    }

    /// Refuse annotations about the virtual machine that no entry of `enable_annotations` matches.
    fn let_in(&self, annotations: &HashMap<String, String>) -> Result<()> {
        let mut names: Vec<_> = annotations
            .keys()
            .filter_map(|key| Some((key, key.strip_prefix(HYPERVISOR)?)))
            .collect();
        if names.is_empty() {
            return Ok(());
        }
        names.sort_unstable();
        let patterns: Vec<Regex> = self
            .hypervisor
            .enable_annotations
            .iter()
            .filter_map(|pattern| {
                Regex::new(pattern)
                    .inspect_err(|error| log::warn!("configuration: enable_annotations: {error}"))
                    .ok()
            })
            .collect();
        for (key, name) in names {
            if !patterns.iter().any(|pattern| pattern.is_match(name)) {
                return refuse(format!("annotation {key} is not enabled"));
            }
            let known = HYPERVISOR_RULES.iter().any(|(known, _)| *known == name)
                || name.ends_with("_hash")
                || HASH_TYPES.contains(&key.as_str());
            if !known {
                log::warn!("annotation {key} is not known and has no effect");
            }
        }
        Ok(())
    }

    fn apply(
        &mut self,
        key: &Key,
        rule: Rule,
        annotation: &str,
        text: &str,
        annotations: &HashMap<String, String>,
    ) -> Result<()> {
        let value = parse(key.kind, rule, annotation, text)?;
        let value = match rule {
            Rule::UnlessEmpty if value == Value::from(0) || value == Value::from("") => {
                return Ok(());
            }
            Rule::Positive if value == Value::from(0) => return refuse(not_a_number(annotation)),
            Rule::Plain | Rule::UnlessEmpty | Rule::Positive | Rule::Words(_) => value,
            Rule::Vcpus | Rule::MaxVcpus | Rule::Memory => {
                self.check_size(rule, annotation, &value)?;
                value
            }
            Rule::Listed(list, what) => {
                if !asset::is_listed(text, list(&self.hypervisor)) {
                    return refuse(format!("{what} {text} required from annotation is not valid"));
                }
                value
            }
            Rule::Asset(hash) => {
                check_asset(text, annotations.get(&format!("{HYPERVISOR}{hash}")), annotations)?;
                value
            }
            Rule::Append => appended((key.get)(self), value),
        };
        let origin = Origin::Annotation(annotation.into());
        self.set(key, &value, origin).map_err(|wrong| {
            Error::new(ErrorKind::InvalidArgument, format!("{annotation}: {wrong}"))
        })
    }

    fn check_size(&self, rule: Rule, annotation: &str, value: &Value) -> Result<()> {
        let asked =
            value.as_integer().and_then(|asked| u64::try_from(asked).ok()).unwrap_or(u64::MAX);
        let cpus = self.host.cpus;
        match rule {
            Rule::Vcpus if asked > u64::from(cpus) => refuse(format!(
                "Number of cpus {asked} specified in annotation default_vcpus is greater than the number of CPUs {cpus} \
                 on the system"
            )),
            Rule::MaxVcpus if asked > u64::from(cpus) => refuse(format!(
                "Number of cpus {asked} in annotation default_maxvcpus is greater than the number of CPUs {cpus} on the \
                 system"
            )),
            Rule::MaxVcpus if asked > u64::from(MAX_VCPUS) => refuse(format!(
                "Number of cpus {asked} in annotation default_maxvcpus is greater than max no of CPUs {MAX_VCPUS} \
                 supported for {MACHINE_TYPE}"
            )),
            Rule::Memory if asked < MIN_MEMORY => refuse(format!(
                "Memory specified in annotation {annotation} is less than minimum required {MIN_MEMORY}, please specify a \
                 larger value"
            )),
            _ => Ok(()),
        }
    }

    /// An annotation that brings one kind of root file system takes the configured other kind away.
    fn settle_root(&mut self, annotations: &HashMap<String, String>) {
        let has = |name| annotations.contains_key(&format!("{HYPERVISOR}{name}"));
        match (has("image"), has("initrd")) {
            (true, false) => self.hypervisor.initrd = None,
            (false, true) => self.hypervisor.image = None,
            _ => {}
        }
    }
}

/// Read an annotation's text as a value of the key's kind.
fn parse(kind: Kind, rule: Rule, annotation: &str, text: &str) -> Result<Value> {
    Ok(match kind {
        Kind::Bool => match text {
            "1" | "t" | "T" | "TRUE" | "true" | "True" => true.into(),
            "0" | "f" | "F" | "FALSE" | "false" | "False" => false.into(),
            _ => {
                return refuse(format!(
                    "Error parsing annotation for {annotation}: Please specify boolean value 'true|false'"
                ));
            }
        },
        // A plus sign is for Rust only.
        Kind::Unsigned | Kind::Signed => {
            let number = text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok());
            number
                .flatten()
                .map(Value::Integer)
                .ok_or_else(|| Error::new(ErrorKind::InvalidArgument, not_a_number(annotation)))?
        }
        Kind::Text => text.into(),
        Kind::List => {
            let words: Vec<String> = match rule {
                Rule::Words(separator) => text
                    .split(separator)
                    .map(str::trim)
                    .filter(|word| !word.is_empty())
                    .map(Into::into)
                    .collect(),
                _ => serde_json::from_str(text).map_err(|error| {
                    let text = format!("Error parsing annotation for {annotation}: expected a JSON list of strings: {error}");
                    Error::new(ErrorKind::InvalidArgument, text)
                })?,
            };
            words.into()
        }
    })
}

fn not_a_number(annotation: &str) -> String {
    format!("Error parsing annotation for {annotation}: Please specify positive numeric value")
}

/// `new` behind `old`: lists item by item, texts word by word.
fn appended(old: Value, new: Value) -> Value {
    match (old, new) {
        (Value::Array(mut old), Value::Array(new)) => {
            old.extend(new);
            Value::Array(old)
        }
        (Value::String(old), Value::String(new)) => format!("{old} {new}").trim().into(),
        (_, new) => new,
    }
}

fn check_asset(
    path: &str,
    hash: Option<&String>,
    annotations: &HashMap<String, String>,
) -> Result<()> {
    if !Path::new(path).is_absolute() {
        return refuse(format!("{path} is not an absolute path"));
    }
    let path: PathBuf = super::sources::resolve(Path::new(path))?;
    let Some(hash) = hash else { return Ok(()) };
    let kind = HASH_TYPES.iter().find_map(|key| annotations.get(*key));
    match kind.map(String::as_str) {
        None | Some("" | "sha512") => asset::check_hash(&path, hash),
        Some(other) => refuse(format!("Invalid hash type {other}: only sha512 is supported")),
    }
}
