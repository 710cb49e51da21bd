// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! `watchable-bind`: a copy in the guest that follows its source in the share.
//!
//! Programs watch their configuration with inotify, which sees nothing of what the host writes into a share. So small
//! volumes, such as Kubernetes' configuration maps and secrets, are copied to a tmpfs, and the copy is brought up to
//! date every two seconds. New files appear before the links that lead to them are changed, each in one step, so a
//! reader finds the old configuration or the new one. A volume that is too big to copy is bound instead, without notice
//! of changes. A copy whose source outgrows the limits later stays as it was.

use std::collections::BTreeMap;
use std::fs::{self, File, Metadata, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use ecr_agent_protocol::agent::Storage;
use nix::mount::{MsFlags, mount};
use parking_lot::Mutex;
use tokio::task::{AbortHandle, spawn_blocking};

use super::driver::create_directory;
use super::unmount;
use crate::mounts;
use crate::sandbox::SHARED;

/// Below the share; the copies are in a tmpfs there.
const COPIES: &str = "watchable";
const INTERVAL: Duration = Duration::from_secs(2);
/// A configuration map of Kubernetes has a directory and two links beside its files.
const MOST_ENTRIES: usize = 64;
const MOST_FILES: usize = 16;
const MOST_BYTES: u64 = 1 << 20;
const NEW: &str = ".ecr-new";

/// A copy, until it is ended.
#[derive(Debug)]
pub struct Copy {
    follow: Option<AbortHandle>,
    state: Arc<Mutex<State>>,
}

#[derive(Debug)]
struct State {
    source: PathBuf,
    target: PathBuf,
    /// What was copied last; none once it has ended, or if the source is bound.
    items: Option<Items>,
}

/// By their paths below the source; the source itself has the empty path.
type Items = BTreeMap<PathBuf, Item>;

#[derive(Clone, Debug, PartialEq, Eq)]
enum Item {
    Directory { mode: u32, owner: (u32, u32) },
    File { mode: u32, owner: (u32, u32), size: u64, changed: (i64, i64), inode: u64 },
    Link { to: PathBuf, owner: (u32, u32) },
}

/// Copy the source of `storage` to its mount point, and follow it.
pub async fn start(storage: &Storage) -> Result<Copy> {
    let (source, target) = (PathBuf::from(&storage.source), PathBuf::from(&storage.mount_point));
    let state = spawn_blocking(move || begin(source, target)).await.context("copy a volume")??;
    let follow = state.items.is_some();
    let state = Arc::new(Mutex::new(state));
    let task = follow.then(|| tokio::spawn(follow_source(Arc::clone(&state))).abort_handle());
    Ok(Copy { follow: task, state })
}

impl Copy {
    /// Stop following, and take the copy away.
    pub fn end(self) -> Result<()> {
        if let Some(task) = self.follow {
            task.abort();
        }
        // An update that is under way ends first, and none begins after this.
        let mut state = self.state.lock();
        match state.items.take() {
            None => unmount(&state.target),
            Some(_) => remove(&state.target)
                .with_context(|| format!("remove the copy {}", state.target.display())),
        }
    }
}

fn begin(source: PathBuf, target: PathBuf) -> Result<State> {
    make_room(&target)?;
    let mut state = State { source, target, items: None };
    let Some(items) = scan(&state.source)? else {
        bind(&state.source, &state.target)?;
        return Ok(state);
    };
    if let Err(error) = bring_up_to_date(&state.source, &state.target, &Items::new(), &items) {
        let _ = remove(&state.target);
        return Err(error);
    }
    state.items = Some(items);
    Ok(state)
}

async fn follow_source(state: Arc<Mutex<State>>) {
    let mut complained = false;
    loop {
        tokio::time::sleep(INTERVAL).await;
        let state = Arc::clone(&state);
        match spawn_blocking(move || update(&mut state.lock())).await {
            Ok(Ok(())) => complained = false,
            // Seen in the middle of a change, most likely: the next look will tell.
            Ok(Err(error)) if !complained => {
                log::warn!("{error:#}");
                complained = true;
            }
            Ok(Err(_)) => {}
            Err(_the_agent_ends) => return,
        }
    }
}

fn update(state: &mut State) -> Result<()> {
    let Some(before) = &state.items else { return Ok(()) };
    let Some(now) = scan(&state.source)? else {
        bail!("{} has become too big to be copied", state.source.display());
    };
    if now != *before {
        bring_up_to_date(&state.source, &state.target, before, &now)?;
        state.items = Some(now);
    }
    Ok(())
}

/// The share is the host's, and read-only perhaps: copies need a tmpfs, once.
fn make_room(target: &Path) -> Result<()> {
    let copies = Path::new(SHARED).join(COPIES);
    if target.starts_with(&copies) && !mounts::is_mount_point(&copies) {
        create_directory(&copies)?;
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        mount(Some("tmpfs"), &copies, Some("tmpfs"), flags, Some("mode=0755"))
            .with_context(|| format!("mount tmpfs on {}", copies.display()))?;
    }
    create_directory(target.parent().unwrap_or(target))
}

fn bind(source: &Path, target: &Path) -> Result<()> {
    if source.is_dir() {
        create_directory(target)?;
    } else {
        File::create(target).with_context(|| format!("create {}", target.display()))?;
    }
    mount(Some(source), target, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .with_context(|| format!("bind {} to {}", source.display(), target.display()))
}

/// What is in `source`; none if that is too much to be copied.
fn scan(source: &Path) -> Result<Option<Items>> {
    let mut items = Items::new();
    let (mut files, mut bytes) = (0, 0);
    let mut left = vec![PathBuf::new()];
    while let Some(path) = left.pop() {
        let full = below(source, &path);
        let attempt = || format!("look at {}", full.display());
        let metadata = fs::symlink_metadata(&full).with_context(attempt)?;
        if metadata.is_file() {
            files += 1;
            bytes += metadata.len();
        } else if metadata.is_dir() {
            // A bounded number of them: a directory may have any.
            for entry in fs::read_dir(&full).with_context(attempt)?.take(MOST_ENTRIES + 1) {
                left.push(path.join(entry.with_context(attempt)?.file_name()));
            }
        }
        if let Some(item) = item(&full, &metadata).with_context(attempt)? {
            items.insert(path, item);
        }
        if items.len() + left.len() > MOST_ENTRIES || files > MOST_FILES || bytes > MOST_BYTES {
            return Ok(None);
        }
    }
    Ok(Some(items))
}

/// Sockets, devices and the like are not copied.
fn item(path: &Path, metadata: &Metadata) -> io::Result<Option<Item>> {
    let (mode, owner) = (metadata.mode() & 0o7777, (metadata.uid(), metadata.gid()));
    Ok(if metadata.is_dir() {
        Some(Item::Directory { mode, owner })
    } else if metadata.is_symlink() {
        Some(Item::Link { to: fs::read_link(path)?, owner })
    } else if metadata.is_file() {
        let changed = (metadata.mtime(), metadata.mtime_nsec());
        Some(Item::File { mode, owner, size: metadata.len(), changed, inode: metadata.ino() })
    } else {
        None
    })
}

/// `root` itself for the empty path, without a slash at its end.
fn below(root: &Path, path: &Path) -> PathBuf {
    if path.as_os_str().is_empty() { root.to_owned() } else { root.join(path) }
}

/// Directories, files, links, and at last what is gone: at no time does a link lead nowhere that did not before.
fn bring_up_to_date(source: &Path, target: &Path, before: &Items, now: &Items) -> Result<()> {
    let changed = |path: &Path, item: &Item| before.get(path) != Some(item);
    for stage in [0, 1, 2] {
        for (path, item) in now.iter().filter(|(path, item)| changed(path, item)) {
            let to = below(target, path);
            let done = match (stage, item) {
                (0, Item::Directory { mode, owner }) => make_directory(&to, *mode, *owner),
                (1, Item::File { mode, owner, .. }) => {
                    copy_file(&below(source, path), &to, *mode, *owner)
                }
                (2, Item::Link { to: aim, owner }) => make_link(aim, &to, *owner),
                _ => continue,
            };
            done.with_context(|| format!("copy {}", below(source, path).display()))?;
        }
    }
    // Children come after their parents in a map by path.
    for path in before.keys().rev().filter(|path| !now.contains_key(*path)) {
        let gone = below(target, path);
        remove(&gone).with_context(|| format!("remove {}", gone.display()))?;
    }
    Ok(())
}

fn make_directory(path: &Path, mode: u32, owner: (u32, u32)) -> io::Result<()> {
    if !fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_dir()) {
        remove(path)?;
        fs::create_dir(path)?;
    }
    lchown(path, Some(owner.0), Some(owner.1))?;
    fs::set_permissions(path, Permissions::from_mode(mode))
}

fn copy_file(from: &Path, to: &Path, mode: u32, owner: (u32, u32)) -> io::Result<()> {
    let mut content = Vec::new();
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(from)?;
    file.take(MOST_BYTES + 1).read_to_end(&mut content)?;
    if content.len() as u64 > MOST_BYTES {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    let new = new_name(to);
    let mut file =
        OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    file.write_all(&content)?;
    lchown(&new, Some(owner.0), Some(owner.1))?;
    file.set_permissions(Permissions::from_mode(mode))?;
    put_in_place(&new, to)
}

fn make_link(aim: &Path, path: &Path, owner: (u32, u32)) -> io::Result<()> {
    let new = new_name(path);
    remove(&new)?;
    symlink(aim, &new)?;
    lchown(&new, Some(owner.0), Some(owner.1))?;
    put_in_place(&new, path)
}

fn new_name(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(NEW);
    name.into()
}

/// A directory cannot be replaced by something else in one step.
fn put_in_place(new: &Path, path: &Path) -> io::Result<()> {
    if fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_dir()) {
        remove(path)?;
    }
    fs::rename(new, path)
}

/// Remove whatever is there, if anything is.
fn remove(path: &Path) -> io::Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        // A parent may have become a file.
        Err(error)
            if !matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) =>
        {
            Err(error)
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Volume(tempfile::TempDir);

    impl Volume {
        /// As Kubernetes lays out a configuration map: `key -> ..data/key`, `..data -> ..1`.
        fn new() -> Self {
            let volume = Volume(tempfile::tempdir().unwrap());
            fs::create_dir(volume.source()).unwrap();
            volume.publish("1", &[("key", "old")]);
            symlink("..data/key", volume.source().join("key")).unwrap();
            volume
        }

        fn source(&self) -> PathBuf {
            self.0.path().join("source")
        }

        fn target(&self) -> PathBuf {
            self.0.path().join("target")
        }

        fn publish(&self, version: &str, content: &[(&str, &str)]) {
            let directory = self.source().join(format!("..{version}"));
            fs::create_dir(&directory).unwrap();
            for (name, text) in content {
                fs::write(directory.join(name), text).unwrap();
            }
            symlink(format!("..{version}"), self.source().join("..tmp")).unwrap();
            fs::rename(self.source().join("..tmp"), self.source().join("..data")).unwrap();
        }

        fn begin(&self) -> State {
            begin(self.source(), self.target()).unwrap()
        }
    }

    #[test]
    fn a_configuration_map_and_its_new_version() {
        let volume = Volume::new();
        let mut state = volume.begin();
        assert_eq!(fs::read_to_string(volume.target().join("key")).unwrap(), "old");
        assert_eq!(fs::read_link(volume.target().join("..data")).unwrap(), Path::new("..1"));

        volume.publish("2", &[("key", "new"), ("more", "")]);
        fs::remove_dir_all(volume.source().join("..1")).unwrap();
        update(&mut state).unwrap();
        assert_eq!(fs::read_to_string(volume.target().join("key")).unwrap(), "new");
        assert!(!volume.target().join("..1").exists());
        let names = scan(&volume.target()).unwrap().unwrap().into_keys().collect::<Vec<_>>();
        let expected = scan(&volume.source()).unwrap().unwrap().into_keys().collect::<Vec<_>>();
        assert_eq!(names, expected);
    }

    #[test]
    fn a_file_that_becomes_a_directory_and_back() {
        let volume = Volume::new();
        let mut state = volume.begin();
        let key = volume.source().join("key");
        fs::remove_file(&key).unwrap();
        fs::create_dir(&key).unwrap();
        fs::write(key.join("inner"), "x").unwrap();
        update(&mut state).unwrap();
        assert_eq!(fs::read_to_string(volume.target().join("key/inner")).unwrap(), "x");
        fs::remove_dir_all(&key).unwrap();
        fs::write(&key, "plain").unwrap();
        update(&mut state).unwrap();
        assert_eq!(fs::read_to_string(volume.target().join("key")).unwrap(), "plain");
    }

    #[test]
    fn one_file_is_a_volume_too() {
        let volume = Volume::new();
        let file = volume.source().join("..1/key");
        let mut state = begin(file.clone(), volume.target()).unwrap();
        assert_eq!(fs::read_to_string(volume.target()).unwrap(), "old");
        fs::write(&file, "longer than before").unwrap();
        update(&mut state).unwrap();
        assert_eq!(fs::read_to_string(volume.target()).unwrap(), "longer than before");
    }

    #[test]
    fn what_is_too_big() {
        let volume = Volume::new();
        let big = volume.source().join("big");
        File::create(&big).unwrap().set_len(MOST_BYTES + 1).unwrap();
        assert!(scan(&volume.source()).unwrap().is_none());
        fs::remove_file(&big).unwrap();
        assert!(scan(&volume.source()).unwrap().is_some());
        for number in 0..MOST_FILES {
            fs::write(volume.source().join(format!("{number}")), "").unwrap();
        }
        assert!(scan(&volume.source()).unwrap().is_none());
    }

    #[tokio::test(flavor = "current_thread")]
    async fn nothing_is_left_of_a_copy_that_ended() {
        let volume = Volume::new();
        let storage = Storage {
            source: volume.source().to_str().unwrap().into(),
            mount_point: volume.target().to_str().unwrap().into(),
            ..Default::default()
        };
        let copy = start(&storage).await.unwrap();
        let state = Arc::clone(&copy.state);
        copy.end().unwrap();
        assert!(!volume.target().exists());
        update(&mut state.lock()).unwrap();
        assert!(!volume.target().exists());
    }
}
