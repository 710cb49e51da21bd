// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Which configuration file is read, and what the host has.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use crate::error::{Error, Kind, Result};

/// Where the configuration file is looked for when nobody names one.
pub const DEFAULT_PATHS: [&str; 2] =
    ["/etc/ecr/configuration.toml", "/usr/share/defaults/ecr/configuration.toml"];
/// The environment variable that names one.
const ENVIRONMENT: &str = "KATA_CONF_FILE";
/// The annotation that names one.
const ANNOTATION: &str = "io.katacontainers.config_path";

/// What the host has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostFacts {
    /// Its CPUs that are online.
    pub cpus: u32,
    /// Its memory in MiB.
    pub memory_mib: u64,
}

impl Default for HostFacts {
    fn default() -> Self {
        Self { cpus: 1, memory_mib: super::hypervisor::DEFAULT_MEMORY }
    }
}

impl HostFacts {
    /// Of this host.
    ///
    /// # Errors
    /// The system does not say.
    pub fn of_this_host() -> Result<Self> {
        let ask = |name, what| match nix::unistd::sysconf(name) {
            Ok(Some(value)) => u64::try_from(value).map_err(|_| unknown(what)),
            _ => Err(unknown(what)),
        };
        let cpus = ask(nix::unistd::SysconfVar::_NPROCESSORS_ONLN, "CPUs")?;
        let pages = ask(nix::unistd::SysconfVar::_PHYS_PAGES, "memory")?;
        let page = ask(nix::unistd::SysconfVar::PAGE_SIZE, "pages")?;
        Ok(Self {
            cpus: u32::try_from(cpus).unwrap_or(u32::MAX).max(1),
            memory_mib: pages.saturating_mul(page) >> 20,
        })
    }
}

fn unknown(what: &str) -> Error {
    Error::new(Kind::Internal, format!("the system does not say how much of {what} it has"))
}

/// Where the configuration comes from.
#[derive(Debug, Clone)]
pub struct Sources {
    /// Named by an annotation, or by a person; goes before all others.
    pub annotation: Option<PathBuf>,
    /// Named by containerd's task options.
    pub task_option: Option<PathBuf>,
    /// Named by the environment.
    pub environment: Option<PathBuf>,
    /// Where it is looked for otherwise; the first that is there counts.
    pub defaults: Vec<PathBuf>,
    /// What limits are taken from.
    pub host: HostFacts,
}

impl Sources {
    /// Of a shim whose first container has these annotations and task options.
    ///
    /// # Errors
    /// The system does not say what it has.
    pub fn of_sandbox(
        annotations: &HashMap<String, String>,
        task_option: Option<&Path>,
    ) -> Result<Self> {
        let given = |path: &Path| (!path.as_os_str().is_empty()).then(|| path.to_owned());
        Ok(Self {
            annotation: annotations.get(ANNOTATION).and_then(|path| given(Path::new(path))),
            task_option: task_option.and_then(given),
            environment: std::env::var_os(ENVIRONMENT).and_then(|path| given(Path::new(&path))),
            defaults: DEFAULT_PATHS.map(PathBuf::from).to_vec(),
            host: HostFacts::of_this_host()?,
        })
    }

    /// Of a tool to which a person may have named a file.
    ///
    /// # Errors
    /// The system does not say what it has.
    pub fn of_tool(named: Option<PathBuf>) -> Result<Self> {
        Ok(Self { annotation: named, ..Self::of_sandbox(&HashMap::new(), None)? })
    }

    /// The configuration file, absolute, symbolic links resolved.
    pub(super) fn find(&self) -> Result<PathBuf> {
        let named =
            [&self.annotation, &self.task_option, &self.environment].into_iter().flatten().next();
        if let Some(path) = named {
            return resolve(path);
        }
        for path in &self.defaults {
            if let Ok(path) = path.canonicalize() {
                return Ok(path);
            }
        }
        let tried: Vec<_> = self.defaults.iter().map(|path| path.display().to_string()).collect();
        Err(Error::new(
            Kind::FailedPrecondition,
            format!(
                "Cannot find usable config file: none of {} is there; copy the default file that comes with ecr to the \
                 first of them, or name a file in {ENVIRONMENT}",
                tried.join(", ")
            ),
        ))
    }
}

/// `path` made absolute, symbolic links resolved.
pub(super) fn resolve(path: &Path) -> Result<PathBuf> {
    path.canonicalize().map_err(|error| {
        let text = if error.kind() == std::io::ErrorKind::NotFound {
            format!("file {} does not exist", path.display())
        } else {
            format!("file {}: {error}", path.display())
        };
        Error::new(Kind::FailedPrecondition, text)
    })
}
