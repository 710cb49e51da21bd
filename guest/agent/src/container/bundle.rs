// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! A container's directory `/run/kata-containers/<id>` (`rootfs`, `config.json`), and what the guest changes in the
//! specification that the runtime has sent.

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use ecr_agent_protocol::oci::{LinuxNamespace, Spec};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::{Value, json};

use super::helper::Root;
use crate::sandbox::Namespaces;

const DIRECTORY: &str = "/run/kata-containers";
/// The longest id, as a name of a file.
const MAX_ID: usize = 255;

/// Ids are names of directories: letters, digits, `_`, `.`, `-`, at least two, and a letter or digit first.
pub fn check_id(id: &str) -> Result<()> {
    let bytes = id.as_bytes();
    let good = bytes.len() >= 2
        && bytes.len() <= MAX_ID
        && bytes.first().is_some_and(u8::is_ascii_alphanumeric)
        && bytes.iter().all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(byte));
    if !good {
        bail!("invalid container ID format: {id:?}");
    }
    Ok(())
}

/// Where the container `id` lives.
pub fn directory(id: &str) -> PathBuf {
    Path::new(DIRECTORY).join(id)
}

pub fn rootfs(bundle: &Path) -> PathBuf {
    bundle.join("rootfs")
}

/// All containers share the network, and the IPC and UTS namespaces, of the sandbox. `shared_pid` is the PID namespace
/// to join; without it a new one is made.
pub fn amend_namespaces(spec: &mut Spec, shared: &Namespaces, shared_pid: Option<String>) {
    let linux = spec.linux.mut_or_insert_default();
    linux.namespaces.retain(|one| !matches!(one.type_.as_str(), "pid" | "network" | "time"));
    for namespace in &mut linux.namespaces {
        let path = match namespace.type_.as_str() {
            "ipc" => &shared.ipc,
            "uts" => &shared.uts,
            _ => continue,
        };
        if let Some(path) = path {
            namespace.path = path.display().to_string();
        }
    }
    linux.namespaces.push(LinuxNamespace {
        type_: "pid".into(),
        path: shared_pid.unwrap_or_default(),
        ..Default::default()
    });
}

/// Make the directory and let the specification's root appear in it; the specification then names that.
pub fn make(bundle: &Path, spec: &mut Spec) -> Result<()> {
    let root = spec.root.mut_or_insert_default();
    let (source, target) = (PathBuf::from(&root.path), rootfs(bundle));
    if !source.is_dir() {
        bail!("the root file system {:?} is not a directory in the guest", root.path);
    }
    fs::create_dir_all(&target).with_context(|| format!("make {}", target.display()))?;
    if source != target {
        let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
        mount(Some(&source), &target, None::<&str>, flags, None::<&str>)
            .with_context(|| format!("mount {} to {}", source.display(), target.display()))?;
    }
    root.path = target.display().to_string();
    let config = bundle.join("config.json");
    fs::write(&config, to_json(spec).to_string())
        .with_context(|| format!("write {}", config.display()))
}

/// Undo [`make`], from whatever it has left.
pub fn remove(bundle: &Path) -> Result<()> {
    let target = rootfs(bundle);
    loop {
        match umount2(&target, MntFlags::MNT_DETACH) {
            // There may be another one below.
            Ok(()) => {}
            // No mount point any more, or it does not exist.
            Err(Errno::EINVAL | Errno::ENOENT) => break,
            Err(error) => {
                return Err(error).with_context(|| format!("unmount {}", target.display()));
            }
        }
    }
    // Only what was made here is removed: nothing below the root, should it still be there.
    let removed = [
        fs::remove_dir(&target),
        fs::remove_file(bundle.join("config.json")),
        fs::remove_dir(bundle),
    ];
    for outcome in removed {
        match outcome {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("remove {}", bundle.display()));
            }
            _ => {}
        }
    }
    Ok(())
}

/// The first `length` bytes of a file of a container, which may be a link, but not out of the container.
pub fn read_below(root: &Path, path: &str, length: u64) -> Result<String> {
    let read = || {
        let file =
            Root::open(root)?.open_with(Path::new(path), OFlag::O_RDONLY | OFlag::O_NONBLOCK)?;
        let mut data = Vec::new();
        fs::File::from(file).take(length).read_to_end(&mut data)?;
        anyhow::Ok(String::from_utf8_lossy(&data).into_owned())
    };
    read().with_context(|| format!("read {path:?} in the container"))
}

/// The specification as the OCI defines it, for people and hooks that look into the bundle.
fn to_json(spec: &Spec) -> Value {
    let process = spec.process.get_or_default();
    let user = process.user.get_or_default();
    let capabilities = process.capabilities.get_or_default();
    let linux = spec.linux.get_or_default();
    let root = spec.root.get_or_default();
    json!({
        "ociVersion": spec.version,
        "hostname": spec.hostname,
        "root": { "path": root.path, "readonly": root.readonly },
        "annotations": spec.annotations,
        "process": {
            "terminal": process.terminal,
            "user": { "uid": user.uid, "gid": user.gid, "additionalGids": user.additional_gids },
            "args": process.args,
            "env": process.env,
            "cwd": process.cwd,
            "noNewPrivileges": process.no_new_privileges,
            "oomScoreAdj": process.oom_score_adj,
            "capabilities": {
                "bounding": capabilities.bounding,
                "effective": capabilities.effective,
                "inheritable": capabilities.inheritable,
                "permitted": capabilities.permitted,
                "ambient": capabilities.ambient,
            },
            "rlimits": process.rlimits.iter().map(|one| json!({
                "type": one.type_, "hard": one.hard, "soft": one.soft,
            })).collect::<Vec<_>>(),
        },
        "mounts": spec.mounts.iter().map(|one| json!({
            "destination": one.destination,
            "source": one.source,
            "type": one.type_,
            "options": one.options,
        })).collect::<Vec<_>>(),
        "linux": {
            "cgroupsPath": linux.cgroups_path,
            "sysctl": linux.sysctl,
            "rootfsPropagation": linux.rootfs_propagation,
            "maskedPaths": linux.masked_paths,
            "readonlyPaths": linux.readonly_paths,
            "namespaces": linux.namespaces.iter().map(|one| json!({
                "type": one.type_, "path": one.path,
            })).collect::<Vec<_>>(),
            "devices": linux.devices.iter().map(|one| json!({
                "path": one.path,
                "type": one.type_,
                "major": one.major,
                "minor": one.minor,
                "fileMode": one.file_mode,
                "uid": one.uid,
                "gid": one.gid,
            })).collect::<Vec<_>>(),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids() {
        for id in ["ab", "0a", "pod_1.x-y", &"a".repeat(MAX_ID)] {
            assert!(check_id(id).is_ok(), "{id}");
        }
        for id in ["", "a", ".a", "-a", "a/b", "a b", "ä1", "a\0", &"a".repeat(MAX_ID + 1)] {
            assert!(check_id(id).is_err(), "{id}");
        }
    }

    #[test]
    fn namespaces_are_the_sandboxs() {
        let mut spec = Spec::new();
        let namespace = |kind: &str, path: &str| LinuxNamespace {
            type_: kind.into(),
            path: path.into(),
            ..Default::default()
        };
        spec.linux.mut_or_insert_default().namespaces = vec![
            namespace("pid", "/proc/1/ns/pid"),
            namespace("network", ""),
            namespace("ipc", ""),
            namespace("uts", "/host/path"),
            namespace("mount", ""),
        ];
        let shared = Namespaces { ipc: Some("/run/ipc".into()), uts: None };
        amend_namespaces(&mut spec, &shared, Some("/proc/7/ns/pid".into()));
        let expected = [
            namespace("ipc", "/run/ipc"),
            namespace("uts", "/host/path"),
            namespace("mount", ""),
            namespace("pid", "/proc/7/ns/pid"),
        ];
        assert_eq!(spec.linux.namespaces, expected);
    }

    #[test]
    fn a_root_must_be_a_directory() {
        let mut spec = Spec::new();
        spec.root.mut_or_insert_default().path = "/dev/null".into();
        assert!(make(Path::new("/nonexistent"), &mut spec).is_err());
    }

    #[test]
    fn the_configuration_has_the_words_of_the_oci() {
        let mut spec = Spec::new();
        spec.process.mut_or_insert_default().args = vec!["sh".into()];
        let json = to_json(&spec);
        assert_eq!(json["process"]["args"][0], "sh");
        assert_eq!(json["linux"]["namespaces"], json!([]));
    }
}
