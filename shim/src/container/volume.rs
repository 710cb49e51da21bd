// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! How a container's mounts reach the guest. What the host's kernel makes (`/proc`, `/sys`) the guest's makes anew; files
//! and directories of the host are shared; what lives in memory is made in the guest.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use ecr_agent_protocol::agent::Storage;
use oci_spec::runtime::{Mount, Spec};

use crate::host::share;

/// The most files of a configmap or secret that the guest watches for changes.
const WATCHED_FILES_MAX: usize = 8;

/// Below it, the guest keeps what is the whole sandbox's.
const GUEST_SANDBOX: &str = "/run/kata-containers/sandbox";

/// The whole sandbox's `/dev/shm`.
pub const GUEST_SHM: &str = "/run/kata-containers/sandbox/shm";

/// Where containers see it.
const SHM: &str = "/dev/shm";

/// What becomes of one mount of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Volume {
    /// The guest does with it what the specification says.
    InGuest,
    /// The sandbox's shared memory is bound there.
    SharedMemory,
    /// It is not for the guest.
    Dropped,
    /// A file or directory of the host appears there.
    Shared {
        /// It.
        source: PathBuf,
        /// Nobody in the guest can write to it.
        read_only: bool,
        /// The kubelet changes it in place, and programs wait for that: the guest keeps a copy that it can watch.
        watched: bool,
    },
    /// A file system in the guest's memory.
    Memory {
        /// What it is called.
        name: String,
        /// Its group, if not root's.
        gid: u32,
        /// Its size in bytes, 0 for the kernel's choice.
        size: u64,
    },
    /// A directory of the guest.
    Local {
        /// What it is called.
        name: String,
        /// Its group, if not root's.
        gid: u32,
    },
    /// A device node of the host.
    Device,
}

/// What of volumes depends on the configuration.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// emptyDir volumes stay on the host.
    pub disable_guest_empty_dir: bool,
}

/// What is to be done with `mount`.
///
/// # Errors
/// Its source is gone.
pub fn classify(mount: &Mount, rules: Rules) -> Result<Volume> {
    let options = mount.options().as_deref().unwrap_or_default();
    let bind = mount.typ().as_deref() == Some("bind")
        || options.iter().any(|option| option == "bind" || option == "rbind");
    let source = mount.source().as_deref().unwrap_or(Path::new(""));
    if !bind {
        return Ok(Volume::InGuest);
    }
    if mount.destination() == Path::new(SHM) {
        return Ok(Volume::SharedMemory);
    }
    if below(source, "/proc") || below(source, "/sys") {
        return Ok(Volume::Dropped);
    }
    let metadata = fs::metadata(source).with_context(|| {
        format!("mount {} at {}", source.display(), mount.destination().display())
    })?;
    let kind = metadata.file_type();
    if below(source, "/dev") && (kind.is_char_device() || kind.is_block_device()) {
        return Ok(Volume::Device);
    }
    if kind.is_block_device() {
        bail!(
            "{} is a block device; mounting one at {} is not supported yet: add it as a device",
            source.display(),
            mount.destination().display()
        );
    }
    if let Some(volume) = empty_dir(source, metadata.gid(), rules)? {
        return Ok(volume);
    }
    Ok(Volume::Shared {
        source: source.to_owned(),
        read_only: options.iter().any(|option| option == "ro"),
        watched: is_watched(source),
    })
}

fn below(path: &Path, directory: &str) -> bool {
    path.starts_with(directory)
}

/// Kubernetes' emptyDir: in memory, or an empty directory of the node.
fn empty_dir(source: &Path, gid: u32, rules: Rules) -> Result<Option<Volume>> {
    if !has_component(source, "kubernetes.io~empty-dir") {
        return Ok(None);
    }
    let name = source.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let status = nix::sys::statfs::statfs(source)
        .with_context(|| format!("ask for the file system of {}", source.display()))?;
    if status.filesystem_type() == nix::sys::statfs::TMPFS_MAGIC {
        let size = u64::try_from(status.block_size()).unwrap_or(0).saturating_mul(status.blocks());
        // Without a limit the kubelet's tmpfs is half of the node's memory, which is nothing to the guest.
        let size = if size >= host_memory()? / 2 { 0 } else { size };
        return Ok(Some(Volume::Memory { name, gid, size }));
    }
    Ok((!rules.disable_guest_empty_dir).then_some(Volume::Local { name, gid }))
}

fn has_component(path: &Path, name: &str) -> bool {
    path.iter().any(|component| component == name)
}

/// Bytes of memory that the host has.
fn host_memory() -> Result<u64> {
    let info = nix::sys::sysinfo::sysinfo().context("ask for the size of memory")?;
    Ok(info.ram_total())
}

/// Configmaps, secrets and their kin are replaced while containers run, by renaming a symbolic link, which inotify does
/// not report over a shared file system.
fn is_watched(source: &Path) -> bool {
    const KINDS: [&str; 4] = [
        "kubernetes.io~configmap",
        "kubernetes.io~secret",
        "kubernetes.io~projected",
        "kubernetes.io~downward-api",
    ];
    KINDS.iter().any(|kind| has_component(source, kind))
        && source.is_dir()
        && fs::read_dir(source).is_ok_and(|entries| {
            let shown =
                entries.flatten().filter(|e| !e.file_name().to_string_lossy().starts_with('.'));
            shown.take(WATCHED_FILES_MAX + 1).count() <= WATCHED_FILES_MAX
        })
}

/// The storage that the agent makes for a volume in the guest's memory, and its path there.
pub fn memory_storage(name: &str, gid: u32, size: u64) -> (Storage, String) {
    let path = format!("{GUEST_SANDBOX}/ephemeral/{name}");
    let mut options = Vec::new();
    if gid != 0 {
        options.push(format!("fsgid={gid}"));
    }
    if size != 0 {
        options.push(format!("size={size}"));
    }
    let storage = Storage {
        driver: "ephemeral".into(),
        source: "tmpfs".into(),
        fstype: "tmpfs".into(),
        options,
        mount_point: path.clone(),
        ..Default::default()
    };
    (storage, path)
}

/// The storage that the agent makes for a directory of the guest, and its path there.
pub fn local_storage(name: &str, gid: u32) -> (Storage, String) {
    let path = format!("{GUEST_SANDBOX}/local/{name}");
    let mut options = vec!["mode=0777".to_owned()];
    if gid != 0 {
        options.push(format!("fsgid={gid}"));
    }
    let storage = Storage {
        driver: "local".into(),
        source: "local".into(),
        fstype: "local".into(),
        options,
        mount_point: path.clone(),
        ..Default::default()
    };
    (storage, path)
}

/// The storage that keeps a watched copy of the shared directory `shared`, and its path in the guest.
pub fn watched_storage(shared: &str, name: &str) -> (Storage, String) {
    let path = format!("{}/{}/{name}", share::GUEST, share::WATCHABLE);
    let storage = Storage {
        driver: "watchable-bind".into(),
        source: shared.into(),
        fstype: "bind".into(),
        options: vec!["bind".into()],
        mount_point: path.clone(),
        ..Default::default()
    };
    (storage, path)
}

/// Bytes of `/dev/shm` that the pod's specification asks for: the size of what containerd mounted, or what the
/// specification's tmpfs says.
pub fn shm_size(spec: &Spec) -> Option<u64> {
    let mounts = spec.mounts().as_deref().unwrap_or_default();
    let mount = mounts.iter().rfind(|mount| mount.destination() == Path::new(SHM))?;
    if mount.typ().as_deref() == Some("bind") {
        let status = nix::sys::statfs::statfs(mount.source().as_deref()?).ok()?;
        let is_tmpfs = status.filesystem_type() == nix::sys::statfs::TMPFS_MAGIC;
        let size = u64::try_from(status.block_size()).ok()?.checked_mul(status.blocks())?;
        return (is_tmpfs && size > 0).then_some(size);
    }
    let options = mount.options().as_deref().unwrap_or_default();
    options.iter().find_map(|option| parse_size(option.strip_prefix("size=")?))
}

/// tmpfs(5)'s sizes: bytes, or with k, m or g.
fn parse_size(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" => 1,
        "k" => 1 << 10,
        "m" => 1 << 20,
        "g" => 1 << 30,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(unit)
}

/// Lines of the `resolv.conf` that the pod's specification mounts.
pub fn dns(spec: &Spec) -> Vec<String> {
    let mounts = spec.mounts().as_deref().unwrap_or_default();
    let file = mounts
        .iter()
        .find(|mount| mount.destination() == Path::new("/etc/resolv.conf"))
        .and_then(|mount| mount.source().as_deref());
    let text = file.and_then(|file| fs::read_to_string(file).ok()).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: Rules = Rules { disable_guest_empty_dir: false };

    fn mount(json: serde_json::Value) -> Mount {
        serde_json::from_value(json).unwrap()
    }

    fn bind(source: &Path, destination: &str, options: &[&str]) -> Mount {
        mount(
            serde_json::json!({"destination": destination, "type": "bind", "source": source, "options": options}),
        )
    }

    #[test]
    fn what_the_kernel_makes_is_made_in_the_guest() {
        let proc =
            mount(serde_json::json!({"destination": "/proc", "type": "proc", "source": "proc"}));
        assert_eq!(classify(&proc, RULES).unwrap(), Volume::InGuest);
        let sys = bind(Path::new("/sys/fs/cgroup"), "/sys/fs/cgroup", &["rbind"]);
        assert_eq!(classify(&sys, RULES).unwrap(), Volume::Dropped);
        let shm = bind(Path::new("/gone"), "/dev/shm", &["rbind"]);
        assert_eq!(classify(&shm, RULES).unwrap(), Volume::SharedMemory);
        let null = bind(Path::new("/dev/null"), "/dev/x", &["bind"]);
        assert_eq!(classify(&null, RULES).unwrap(), Volume::Device);
    }

    #[test]
    fn files_are_shared_as_writable_as_asked() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let shared = |options: &[&str]| classify(&bind(file.path(), "/f", options), RULES).unwrap();
        let expected = |read_only| Volume::Shared {
            source: file.path().to_owned(),
            read_only,
            watched: false,
        };
        assert_eq!(shared(&["rbind", "ro"]), expected(true));
        assert_eq!(shared(&["rbind", "rw"]), expected(false));
    }

    #[test]
    fn a_source_that_is_gone_is_named_with_its_place() {
        let error = classify(&bind(Path::new("/no/such"), "/f", &[]), RULES).unwrap_err();
        assert!(error.to_string().contains("mount /no/such at /f"), "{error}");
    }

    #[test]
    fn small_configmaps_are_watched() {
        let dir = tempfile::tempdir().unwrap();
        let map = dir.path().join("kubernetes.io~configmap/m");
        fs::create_dir_all(&map).unwrap();
        fs::write(map.join("key"), "value").unwrap();
        let watched = |map: &Path| match classify(&bind(map, "/m", &["ro"]), RULES).unwrap() {
            Volume::Shared { watched, .. } => watched,
            other => panic!("{other:?}"),
        };
        assert!(watched(&map));
        (0..WATCHED_FILES_MAX).for_each(|n| fs::write(map.join(n.to_string()), "").unwrap());
        assert!(!watched(&map));
    }

    #[test]
    fn an_empty_dir_on_disk_becomes_the_guests() {
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let volume = dir.path().join("kubernetes.io~empty-dir/scratch");
        fs::create_dir_all(&volume).unwrap();
        let mount = bind(&volume, "/scratch", &["rw"]);
        let local = classify(&mount, RULES).unwrap();
        assert!(matches!(local, Volume::Local { ref name, .. } if name == "scratch"), "{local:?}");
        let kept = classify(&mount, Rules { disable_guest_empty_dir: true }).unwrap();
        assert!(matches!(kept, Volume::Shared { .. }), "{kept:?}");
    }

    #[test]
    fn the_size_of_shared_memory_is_read() {
        let spec: Spec = serde_json::from_value(serde_json::json!({
            "ociVersion": "1.0.2",
            "mounts": [{"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["size=65536k"]}]
        }))
        .unwrap();
        assert_eq!(shm_size(&spec), Some(64 << 20));
        assert_eq!(parse_size("1g"), Some(1 << 30));
        assert_eq!(parse_size("7"), Some(7));
        assert_eq!(parse_size("7x"), None);
        assert_eq!(parse_size("99999999999g"), None);
    }
}
