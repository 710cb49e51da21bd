// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Kernel modules for an initial RAM disk: which files, and in which order.
//!
//! A module says itself what it needs, in the strings of its ELF section `.modinfo` (`depends=a,b`), so neither
//! `depmod` nor its index is needed. Left out: soft dependencies.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// Where the agent looks for its list.
const LIST: &str = "/etc/ecr-agent/modules";
const TARGET: &str = "/lib/modules";

/// Manifest lines for the modules `names` of the kernel whose modules are in `directory`. Decompressed copies and the
/// list are put in `scratch`.
pub fn manifest(directory: &Path, scratch: &Path, names: &[String]) -> Result<String> {
    let mut order = Order {
        files: find(directory)?,
        built_in: built_in(directory)?,
        scratch,
        done: BTreeSet::new(),
        loaded: Vec::new(),
    };
    for name in names {
        order.add(&plain(name))?;
    }
    let mut lines = format!("dir /lib 0755\ndir {TARGET} 0755\ndir /etc/ecr-agent 0755\n");
    let mut list = String::new();
    for (name, file) in &order.loaded {
        lines.push_str(&format!("file {TARGET}/{name}.ko 0644 {}\n", file.display()));
        list.push_str(&format!("{TARGET}/{name}.ko\n"));
    }
    let list_file = scratch.join("modules");
    fs::write(&list_file, list).with_context(|| format!("write {}", list_file.display()))?;
    lines.push_str(&format!("file {LIST} 0644 {}\n", list_file.display()));
    Ok(lines)
}

struct Order<'a> {
    files: BTreeMap<String, PathBuf>,
    built_in: BTreeSet<String>,
    scratch: &'a Path,
    done: BTreeSet<String>,
    loaded: Vec<(String, PathBuf)>,
}

impl Order<'_> {
    /// Append `name` after everything that it depends on.
    fn add(&mut self, name: &str) -> Result<()> {
        // Marked before its dependencies are followed: a circle, which no kernel has, would end here.
        if !self.done.insert(name.to_string()) {
            return Ok(());
        }
        let Some(file) = self.files.get(name) else {
            if self.built_in.contains(name) {
                return Ok(());
            }
            bail!("this kernel has no module {name}");
        };
        let file = decompress(file, &self.scratch.join(format!("{name}.ko")))?;
        let image = fs::read(&file).with_context(|| format!("read {}", file.display()))?;
        for needed in depends(&image) {
            self.add(&plain(needed)).with_context(|| format!("needed by {name}"))?;
        }
        self.loaded.push((name.to_string(), file));
        Ok(())
    }
}

/// Modules are called with `-` and `_` alike.
fn plain(name: &str) -> String {
    name.replace('-', "_")
}

/// All module files below `directory`, by module name.
fn find(directory: &Path) -> Result<BTreeMap<String, PathBuf>> {
    let mut found = BTreeMap::new();
    let mut pending = vec![directory.to_path_buf()];
    while let Some(directory) = pending.pop() {
        let entries =
            fs::read_dir(&directory).with_context(|| format!("read {}", directory.display()))?;
        for entry in entries {
            let entry = entry?;
            let path = entry.path();
            if entry.file_type()?.is_dir() {
                pending.push(path);
            } else if let Some((name, "" | ".xz")) =
                entry.file_name().to_string_lossy().split_once(".ko")
            {
                found.insert(plain(name), path);
            }
        }
    }
    Ok(found)
}

fn built_in(directory: &Path) -> Result<BTreeSet<String>> {
    let path = directory.join("modules.builtin");
    let list = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    let name =
        |line: &str| Some(plain(Path::new(line).file_name()?.to_str()?.strip_suffix(".ko")?));
    Ok(list.lines().filter_map(name).collect())
}

/// Debian 13 compresses modules; the guest is spared the work.
fn decompress(file: &Path, to: &Path) -> Result<PathBuf> {
    if file.extension().is_none_or(|extension| extension != "xz") {
        return Ok(file.to_path_buf());
    }
    let output = Command::new("xz")
        .args(["--decompress", "--stdout"])
        .arg(file)
        .output()
        .context("run xz (Debian package xz-utils)")?;
    if !output.status.success() {
        bail!("xz cannot read {}", file.display());
    }
    fs::write(to, output.stdout).with_context(|| format!("write {}", to.display()))?;
    Ok(to.to_path_buf())
}

/// The modules named in the `depends=` string of a module file.
fn depends(image: &[u8]) -> Vec<&str> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = image.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let value = image[at + KEY.len()..].split(|&byte| byte == 0).next().unwrap_or_default();
    let names = std::str::from_utf8(value).unwrap_or_default();
    names.split(',').filter(|name| !name.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kernel(dir: &Path) {
        fs::create_dir_all(dir.join("kernel/drivers")).unwrap();
        let module = |name: &str, depends: &str| {
            let info = format!("ELF\0license=GPL\0depends={depends}\0retpoline=Y\0");
            fs::write(dir.join("kernel/drivers").join(name), info).unwrap();
        };
        module("virtio.ko", "");
        module("virtio_ring.ko", "virtio");
        module("virtio_pci.ko", "virtio-ring,virtio");
        module("nd-pmem.ko", "libnvdimm,core");
        module("libnvdimm.ko", "");
        module("unused.ko", "");
        fs::write(
            dir.join("modules.builtin"),
            "kernel/lib/core.ko\nkernel/drivers/tty/con-sole.ko\n",
        )
        .unwrap();
    }

    fn order(names: &[&str]) -> Result<Vec<String>> {
        let dir = tempfile::tempdir().unwrap();
        kernel(dir.path());
        let names: Vec<String> = names.iter().map(ToString::to_string).collect();
        let lines = manifest(dir.path(), dir.path(), &names)?;
        let list = fs::read_to_string(dir.path().join("modules")).unwrap();
        assert!(lines.contains("file /etc/ecr-agent/modules 0644 "));
        for module in list.lines() {
            assert!(lines.contains(&format!("file {module} 0644 ")), "{module}: {lines}");
        }
        Ok(list.lines().map(|line| line.replace("/lib/modules/", "")).collect())
    }

    #[test]
    fn dependencies_come_first_and_once() {
        let order = order(&["virtio-pci", "nd_pmem", "virtio_ring"]).unwrap();
        assert_eq!(
            order,
            ["virtio.ko", "virtio_ring.ko", "virtio_pci.ko", "libnvdimm.ko", "nd_pmem.ko"]
        );
    }

    #[test]
    fn built_in_is_enough_and_missing_is_an_error() {
        assert!(order(&["con_sole"]).unwrap().is_empty());
        let error = format!("{:#}", order(&["floppy"]).unwrap_err());
        assert!(error.contains("floppy"), "{error}");
    }
}
