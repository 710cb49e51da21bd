// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Volumes that live in the guest: tmpfs, huge pages, and plain directories.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use ecr_agent_protocol::agent::Storage;
use nix::mount::{MsFlags, mount};
use parking_lot::Mutex;

use super::Made;
use super::driver::create_directory;
use super::options::MountOptions;
use crate::mounts;

const HUGE_PAGES: &str = "/sys/kernel/mm/hugepages";
const SETGID: u32 = 0o2000;

/// The agent's own options, which no file system knows.
const GROUP: &str = "fsgid=";
const MODE: &str = "mode=";

/// The pool of huge pages is one for all volumes: what one adds, another must not overwrite.
static POOL: Mutex<()> = Mutex::new(());

/// A tmpfs, or a hugetlbfs with its pages reserved.
pub async fn make(storage: &Storage) -> Result<Made> {
    let storage = storage.clone();
    let make = move || match storage.fstype.as_str() {
        "hugetlbfs" => huge(&storage, Path::new(HUGE_PAGES)),
        _ => tmpfs(&storage),
    };
    tokio::task::spawn_blocking(make).await.context("make an ephemeral volume")??;
    Ok(Made::Kept)
}

fn tmpfs(storage: &Storage) -> Result<()> {
    let group = group_of(storage)?;
    let target = Path::new(&storage.mount_point);
    create_directory(target)?;
    mount_with(storage, MsFlags::empty())?;
    match group {
        Some(group) => give(target, group),
        None => Ok(()),
    }
}

/// New options for the tmpfs that `storage` names.
pub fn update(storage: &Storage) -> Result<()> {
    if !mounts::is_mount_point(Path::new(&storage.mount_point)) {
        bail!("{} is not a mount point", storage.mount_point);
    }
    if storage.options.is_empty() {
        return Ok(());
    }
    mount_with(storage, MsFlags::MS_REMOUNT)
}

fn mount_with(storage: &Storage, more: MsFlags) -> Result<()> {
    let options: Vec<_> =
        storage.options.iter().filter(|option| !option.starts_with(GROUP)).collect();
    let MountOptions { flags, data } = MountOptions::parse(&options);
    let target = storage.mount_point.as_str();
    mount(
        Some(storage.source.as_str()),
        target,
        Some(storage.fstype.as_str()),
        flags | more,
        Some(data.as_str()),
    )
    .with_context(|| format!("mount {:?} on {target} (options {data:?})", storage.fstype))
}

/// Reserve the pages first: a hugetlbfs without pages gives every writer SIGBUS.
fn huge(storage: &Storage, pools: &Path) -> Result<()> {
    let (page, size) = huge_options(&storage.options)?;
    create_directory(Path::new(&storage.mount_point))?;
    let pages = size.div_ceil(page);
    let pool = pools.join(format!("hugepages-{}kB", page >> 10)).join("nr_hugepages");
    let _guard = POOL.lock();
    let before = read_number(&pool)?;
    let wanted = before.checked_add(pages).context("more huge pages than can be counted")?;
    set_pool(&pool, wanted)?;
    let has = read_number(&pool)?;
    let outcome = if has < wanted {
        Err(anyhow::anyhow!(
            "the guest has no memory for {pages} pages of {page} bytes: {} could be reserved",
            has.saturating_sub(before)
        ))
    } else {
        let data = format!("pagesize={page},size={}", pages * page);
        mount(
            Some("nodev"),
            storage.mount_point.as_str(),
            Some("hugetlbfs"),
            MsFlags::empty(),
            Some(data.as_str()),
        )
        .with_context(|| format!("mount hugetlbfs on {} ({data})", storage.mount_point))
    };
    if outcome.is_err() {
        set_pool(&pool, before)?;
    }
    outcome
}

/// `pagesize=<bytes>,size=<bytes>`, in one string or several.
fn huge_options(options: &[String]) -> Result<(u64, u64)> {
    let value = |key: &str| {
        options
            .iter()
            .flat_map(|option| option.split(','))
            .find_map(|option| option.strip_prefix(key)?.parse::<u64>().ok())
            .filter(|&bytes| bytes > 0)
            .with_context(|| format!("huge pages need {key}<bytes>, got {options:?}"))
    };
    let (page, size) = (value("pagesize=")?, value("size=")?);
    if page < 1 << 10 || size.checked_next_multiple_of(page).is_none() {
        bail!("pages of {page} bytes do not make {size} bytes");
    }
    Ok((page, size))
}

fn read_number(file: &Path) -> Result<u64> {
    let text = fs::read_to_string(file).with_context(|| {
        format!("read {}: does the guest have pages of this size?", file.display())
    })?;
    text.trim().parse().with_context(|| format!("{} holds {text:?}", file.display()))
}

fn set_pool(pool: &Path, pages: u64) -> Result<()> {
    fs::write(pool, pages.to_string())
        .with_context(|| format!("write {pages} to {}", pool.display()))
}

/// A directory, with the mode and the group that the options ask for.
pub fn directory(storage: &Storage) -> Result<Made> {
    let group = group_of(storage)?;
    let mode = option_of(storage, MODE)
        .map(|mode| {
            u32::from_str_radix(mode, 8)
                .ok()
                .filter(|mode| *mode <= 0o7777)
                .with_context(|| format!("{MODE}{mode} is not an octal mode"))
        })
        .transpose()?;
    let path = PathBuf::from(&storage.mount_point);
    create_directory(&path)?;
    if let Some(mode) = mode {
        set_mode(&path, mode)?;
    }
    if let Some(group) = group {
        give(&path, group)?;
    }
    Ok(Made::Kept)
}

fn option_of<'a>(storage: &'a Storage, key: &str) -> Option<&'a str> {
    storage.options.iter().find_map(|option| option.strip_prefix(key))
}

fn group_of(storage: &Storage) -> Result<Option<u32>> {
    option_of(storage, GROUP)
        .map(|group| group.parse().with_context(|| format!("{GROUP}{group} is not a group id")))
        .transpose()
}

/// What is made in the directory belongs to the group, too.
fn give(path: &Path, group: u32) -> Result<()> {
    let attempt = || format!("give {} to group {group}", path.display());
    chown(path, None, Some(group)).with_context(attempt)?;
    let mode = fs::metadata(path).with_context(attempt)?.mode();
    set_mode(path, mode & 0o7777 | SETGID)
}

fn set_mode(path: &Path, mode: u32) -> Result<()> {
    fs::set_permissions(path, Permissions::from_mode(mode))
        .with_context(|| format!("set the mode of {} to {mode:o}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn storage(mount_point: &Path, options: &[&str]) -> Storage {
        Storage {
            mount_point: mount_point.to_str().unwrap().into(),
            options: options.iter().map(|&option| option.into()).collect(),
            ..Default::default()
        }
    }

    #[test]
    fn a_directory_with_mode_and_group() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b");
        let group = format!("fsgid={}", nix::unistd::getegid());
        directory(&storage(&path, &["mode=0777", &group])).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o2777);
        directory(&storage(&path, &["mode=0750"])).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o750);
        for wrong in ["mode=rwx", "mode=77777", "fsgid=wheel", "fsgid=-1"] {
            assert!(directory(&storage(&path, &[wrong])).is_err(), "{wrong}");
        }
    }

    #[test]
    fn sizes_of_huge_pages() {
        let parse = |options: &[&str]| {
            huge_options(&options.iter().map(|&option| option.into()).collect::<Vec<_>>())
        };
        assert_eq!(parse(&["pagesize=2097152,size=4194304"]).unwrap(), (2 << 20, 4 << 20));
        assert_eq!(parse(&["pagesize=2097152", "size=1"]).unwrap(), (2 << 20, 1));
        for wrong in [
            &["pagesize=2097152"][..],
            &["size=4194304"],
            &["pagesize=2M,size=4M"],
            &["pagesize=0,size=4194304"],
            &["pagesize=512,size=4194304"],
            &["pagesize=2097152,size=18446744073709551615"],
        ] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn pages_that_the_guest_does_not_have() {
        let dir = tempfile::tempdir().unwrap();
        let volume = storage(&dir.path().join("volume"), &["pagesize=2097152,size=4194304"]);
        let error = huge(&volume, dir.path()).unwrap_err();
        assert!(format!("{error:#}").contains("pages of this size"), "{error:#}");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn only_a_mount_point_is_updated() {
        let dir = tempfile::tempdir().unwrap();
        let error = update(&storage(dir.path(), &["remount,size=1M"])).unwrap_err().to_string();
        assert!(error.contains("is not a mount point"), "{error}");
    }
}
