// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Where a sandbox's cgroups are. Pure: from the specification's `cgroupsPath` to paths below a hierarchy's mount.

use std::path::{Component, Path, PathBuf};

use anyhow::{Result, bail, ensure};

/// Put before the last component of a path: the container's own cgroup, which the orchestrator may make as well, is
/// another one.
const PREFIX: &str = "kata_";
/// Where relative paths start.
const DEFAULT_PARENT: &str = "/vc";
/// The parent of all overhead cgroups.
const OVERHEAD: &str = "/kata_overhead";

/// Where a sandbox's cgroup is, and who makes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum SandboxPath {
    /// We do.
    Cgroupfs(PathBuf),
    /// systemd does, as a scope in a slice.
    Systemd(Scope),
}

/// A scope of systemd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Scope {
    /// The slice that it is in, as in `kubepods-burstable.slice`.
    pub(super) slice: String,
    /// The name of the unit.
    pub(super) unit: String,
}

impl SandboxPath {
    /// Read `cgroupsPath` of the specification of sandbox `id`: `/a/b/name`, or systemd's `slice:prefix:name`.
    pub(super) fn parse(cgroups_path: &Path, id: &str) -> Result<Self> {
        let text = cgroups_path.to_str().unwrap_or_default();
        ensure!(
            text.len() == cgroups_path.as_os_str().len(),
            "cgroupsPath {} is no UTF-8",
            cgroups_path.display()
        );
        if !text.starts_with('/')
            && let [slice, prefix, name] = text.split(':').collect::<Vec<_>>()[..]
        {
            return Ok(Self::Systemd(Scope::new(slice, prefix, name)?));
        }
        let path = if text.is_empty() { Path::new(id) } else { cgroups_path };
        let path = normal(&Path::new(DEFAULT_PARENT).join(path))?;
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            bail!("cgroupsPath {text} is the root of the hierarchy");
        };
        let mut renamed = std::ffi::OsString::from(PREFIX);
        renamed.push(name);
        Ok(Self::Cgroupfs(parent.join(renamed)))
    }

    /// The cgroup's path, below the mount of a hierarchy.
    pub(super) fn path(&self) -> PathBuf {
        match self {
            Self::Cgroupfs(path) => path.clone(),
            Self::Systemd(scope) => scope.path(),
        }
    }
}

impl Scope {
    fn new(slice: &str, prefix: &str, name: &str) -> Result<Self> {
        let slice = match slice {
            // systemd's default for what the system starts.
            "" => "system.slice",
            slice => slice,
        };
        let stem = slice.strip_suffix(".slice").unwrap_or_default();
        let valid = !stem.is_empty()
            && !stem.contains('/')
            && !name.contains('/')
            && !prefix.contains('/')
            && !name.is_empty()
            && (stem == "-" || stem.split('-').all(|part| !part.is_empty()));
        ensure!(
            valid,
            "malformed systemd path '{slice}:{prefix}:{name}': expected to be of form 'slice:prefix:name'"
        );
        let unit = match prefix {
            "" => format!("{name}.scope"),
            prefix => format!("{prefix}-{name}.scope"),
        };
        Ok(Self { slice: slice.to_owned(), unit })
    }

    /// The path that systemd gives it: each dash in a slice's name is a level (systemd.slice(5)).
    pub(super) fn path(&self) -> PathBuf {
        let mut path = PathBuf::from("/");
        let stem = self.slice.trim_end_matches(".slice");
        if stem != "-" {
            let mut name = String::new();
            for part in stem.split('-') {
                if !name.is_empty() {
                    name.push('-');
                }
                name.push_str(part);
                path.push(format!("{name}.slice"));
            }
        }
        path.join(&self.unit)
    }
}

/// The overhead cgroup of sandbox `id`.
pub(super) fn overhead(id: &str) -> PathBuf {
    Path::new(OVERHEAD).join(id)
}

/// `path` without `.` and doubled slashes. It may not climb out of where it is.
fn normal(path: &Path) -> Result<PathBuf> {
    ensure!(
        !path.components().any(|component| component == Component::ParentDir),
        "cgroupsPath {} contains '..'",
        path.display()
    );
    Ok(path.components().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<PathBuf> {
        SandboxPath::parse(Path::new(text), "sid").map(|path| path.path())
    }

    #[test]
    fn the_last_component_gets_the_prefix() {
        for (given, expected) in [
            ("/kubepods/burstable/pod1/abc", "/kubepods/burstable/pod1/kata_abc"),
            ("/default/c1", "/default/kata_c1"),
            ("/c1", "/kata_c1"),
            ("//a/./b/", "/a/kata_b"),
            ("some/where", "/vc/some/kata_where"),
            ("", "/vc/kata_sid"),
            ("/a:b:c", "/kata_a:b:c"),
        ] {
            assert_eq!(parse(given).unwrap(), Path::new(expected), "{given}");
        }
        for bad in ["/", "/a/../../etc", "../x"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_slice_is_a_level_for_each_dash() {
        for (given, slice, unit, path) in [
            (
                "kubepods-burstable-pod1.slice:cri-containerd:abc",
                "kubepods-burstable-pod1.slice",
                "cri-containerd-abc.scope",
                "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/cri-containerd-abc.scope",
            ),
            ("system.slice::abc", "system.slice", "abc.scope", "/system.slice/abc.scope"),
            (":p:abc", "system.slice", "p-abc.scope", "/system.slice/p-abc.scope"),
            ("-.slice:p:abc", "-.slice", "p-abc.scope", "/p-abc.scope"),
        ] {
            let parsed = SandboxPath::parse(Path::new(given), "sid").unwrap();
            let scope = Scope { slice: slice.into(), unit: unit.into() };
            assert_eq!(parsed, SandboxPath::Systemd(scope));
            assert_eq!(parsed.path(), Path::new(path));
        }
        for bad in [
            "a:b:c",
            "a--b.slice:p:n",
            ".slice:p:n",
            "a.slice:p:",
            "a/b.slice:p:n",
            "a.slice:p:../n",
        ] {
            let error = parse(bad).unwrap_err().to_string();
            assert!(error.contains("malformed systemd path"), "{error}");
        }
    }
}
