// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The devices that a sandbox's processes may use on the host: a version 1 controller's list
//! (kernel, admin-guide/cgroup-v1/devices). Version 2 wants a BPF program instead; it is left out, and no device is
//! withheld there.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;

use anyhow::{Context as _, Result};

use super::hierarchy::write;

/// Nodes that a sandbox uses, where the host has them.
const NODES: [&str; 11] = [
    "/dev/null",
    "/dev/random",
    "/dev/full",
    "/dev/tty",
    "/dev/zero",
    "/dev/urandom",
    "/dev/console",
    "/dev/kvm",
    "/dev/vhost-net",
    "/dev/vfio/vfio",
    "/dev/vhost-vsock",
];
/// Making nodes, which is not using them; pseudo-terminals; taps.
const RULES: [&str; 4] = ["c *:* m", "b *:* m", "c 136:* rwm", "c 10:200 rwm"];

/// Allow what a sandbox uses and nothing else.
pub(super) fn restrict(directory: &Path) -> Result<()> {
    write(&directory.join("devices.deny"), "a")
        .with_context(|| format!("withhold all devices from {}", directory.display()))?;
    for rule in RULES {
        allow(directory, rule)?;
    }
    for node in NODES {
        if let Ok(Some(rule)) = rule(Path::new(node)) {
            allow(directory, &rule)?;
        }
    }
    Ok(())
}

/// What is withheld from the parent cannot be allowed here, and is not used then.
fn allow(directory: &Path, rule: &str) -> Result<()> {
    match write(&directory.join("devices.allow"), rule) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            log::warn!("devices {rule} are withheld above cgroup {}", directory.display());
            Ok(())
        }
        result => {
            result.with_context(|| format!("allow devices {rule} in {}", directory.display()))
        }
    }
}

/// Allow one more device, or withhold it again.
pub(super) fn change(directory: &Path, node: &Path, allowed: bool) -> Result<()> {
    let Some(rule) = rule(node)? else { return Ok(()) };
    if allowed {
        return allow(directory, &rule);
    }
    write(&directory.join("devices.deny"), &rule)
        .with_context(|| format!("withhold device {} from {}", node.display(), directory.display()))
}

/// The rule for a device node; `None` for what is none.
fn rule(node: &Path) -> Result<Option<String>> {
    let metadata = fs::metadata(node).with_context(|| format!("look at {}", node.display()))?;
    let kind = match metadata.file_type() {
        kind if kind.is_char_device() => 'c',
        kind if kind.is_block_device() => 'b',
        _ => return Ok(None),
    };
    let number = metadata.rdev();
    Ok(Some(format!("{kind} {}:{} rwm", libc::major(number), libc::minor(number))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rule_of_a_node() {
        assert_eq!(rule(Path::new("/dev/null")).unwrap().as_deref(), Some("c 1:3 rwm"));
        assert_eq!(rule(Path::new("/proc")).unwrap(), None);
        assert!(rule(Path::new("/dev/no-such-node")).is_err());
    }
}
