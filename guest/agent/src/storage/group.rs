// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! A volume for a group (Kubernetes' `fsGroup`): all of it belongs to the group, which may do what the owner may, and
//! what is made in its directories inherits the group.

use std::fs::{self, Metadata, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, lchown};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use ecr_agent_protocol::agent::FSGroup;
use ecr_agent_protocol::types::FSGroupChangePolicy;

const READ_WRITE: u32 = 0o660;
const READ_ONLY: u32 = 0o440;
const ENTER: u32 = 0o110;
const SETGID: u32 = 0o2000;

/// Give the tree at `root` to the group. Symbolic links are not followed, and other file systems not entered.
pub fn give(root: &Path, group: &FSGroup, read_only: bool) -> Result<()> {
    let attempt = || format!("give {} to group {}", root.display(), group.group_id);
    let own = fs::symlink_metadata(root).with_context(attempt)?;
    let mode = if read_only { READ_ONLY } else { READ_WRITE };
    let policy = group.group_change_policy.enum_value();
    if policy == Ok(FSGroupChangePolicy::OnRootMismatch)
        && own.gid() == group.group_id
        && own.mode() & wanted(&own, mode) == wanted(&own, mode)
    {
        return Ok(());
    }
    let device = own.dev();
    // Not recursive: how deep a volume is nested is not ours to choose. The root comes last, so that an interrupted
    // change is not taken for a finished one.
    let mut directories = vec![root.to_owned()];
    while let Some(directory) = directories.pop() {
        for path in entries(&directory).with_context(attempt)? {
            let metadata = fs::symlink_metadata(&path).with_context(attempt)?;
            if metadata.dev() != device {
                continue;
            }
            change(&path, &metadata, group.group_id, mode).with_context(attempt)?;
            if metadata.is_dir() {
                directories.push(path);
            }
        }
    }
    change(root, &own, group.group_id, mode).with_context(attempt)
}

fn entries(directory: &Path) -> std::io::Result<Vec<PathBuf>> {
    fs::read_dir(directory)?.map(|entry| Ok(entry?.path())).collect()
}

fn change(path: &Path, metadata: &Metadata, group: u32, mode: u32) -> Result<()> {
    let attempt = || format!("change {}", path.display());
    lchown(path, None, Some(group)).with_context(attempt)?;
    if metadata.is_symlink() {
        return Ok(());
    }
    let mode = metadata.mode() & 0o7777 | wanted(metadata, mode);
    fs::set_permissions(path, Permissions::from_mode(mode)).with_context(attempt)
}

fn wanted(metadata: &Metadata, mode: u32) -> u32 {
    if metadata.is_dir() { mode | ENTER | SETGID } else { mode }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn group(policy: FSGroupChangePolicy) -> FSGroup {
        FSGroup {
            // The group of the process: without root, no other can be given.
            group_id: nix::unistd::getegid().as_raw(),
            group_change_policy: policy.into(),
            ..Default::default()
        }
    }

    fn mode(path: &Path) -> u32 {
        fs::symlink_metadata(path).unwrap().mode() & 0o7777
    }

    #[test]
    fn files_and_directories_but_not_what_links_point_to() {
        let dir = tempfile::tempdir().unwrap();
        let (volume, outside) = (dir.path().join("volume"), dir.path().join("outside"));
        fs::create_dir_all(volume.join("a/b")).unwrap();
        for file in [&outside, &volume.join("a/b/file")] {
            fs::write(file, "").unwrap();
            fs::set_permissions(file, Permissions::from_mode(0o600)).unwrap();
        }
        symlink(&outside, volume.join("link")).unwrap();
        symlink("/no/such", volume.join("dangling")).unwrap();
        give(&volume, &group(FSGroupChangePolicy::Always), false).unwrap();
        assert_eq!(mode(&volume.join("a/b/file")), 0o660);
        assert_eq!(mode(&volume.join("a/b")) & 0o2770, 0o2770);
        assert_eq!(mode(&outside), 0o600);
    }

    #[test]
    fn a_root_that_fits_ends_the_change_when_asked() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        fs::set_permissions(&file, Permissions::from_mode(0o600)).unwrap();
        fs::set_permissions(dir.path(), Permissions::from_mode(0o2770)).unwrap();
        give(dir.path(), &group(FSGroupChangePolicy::OnRootMismatch), false).unwrap();
        assert_eq!(mode(&file), 0o600);
        fs::set_permissions(dir.path(), Permissions::from_mode(0o770)).unwrap();
        give(dir.path(), &group(FSGroupChangePolicy::OnRootMismatch), false).unwrap();
        assert_eq!(mode(&file), 0o660);
        give(dir.path(), &group(FSGroupChangePolicy::Always), true).unwrap();
    }
}
