// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Mounts on the host: what containerd wants mounted, binds into the share, and taking all of it down again.
//!
//! - Option words are those of mount(8) as containerd understands them; what is no known word goes to the file system.
//! - mount(2) takes one page of options. An overlay of many layers has more, so its paths are shortened against the
//!   directory that they share, and mounted from there by a thread that has a working directory of its own.
//! - A bind is made read-only by mount_setattr(2) (Linux 5.12), which, unlike a remount, keeps `nosuid` and the like,
//!   and reaches the mounts below.
//! - Loop devices are not set up here: a file that holds a file system is the virtual machine's to attach.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Component, Path, PathBuf};
use std::thread;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, umount2};
use nix::sched::{CloneFlags, unshare};

use crate::host::mountinfo::{self, Entry};
use crate::sandbox::Mount;

/// What mount(2) takes of options: a page, with the zero at its end.
const MAX_OPTIONS: usize = 4095;
/// How often [`unmount_below`] looks again for mounts that appeared, or came to light, meanwhile.
const UNMOUNT_ROUNDS: usize = 8;

/// How mount and unmount events travel between a mount and its copies (mount_namespaces(7)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Propagation {
    /// Not at all.
    Private,
    /// From the source to the copy.
    Slave,
    /// Both ways.
    Shared,
}

/// How to bind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Flags {
    /// Nobody writes through the new mount, nor through those below it when `recursive`.
    pub read_only: bool,
    /// Take the mounts below the source along.
    pub recursive: bool,
    /// Propagation of the new mount, and of those below it when `recursive`. `None`: as the kernel makes it.
    pub propagation: Option<Propagation>,
}

/// Mount all of `mounts` on `target`, the first at the bottom. When one fails, those before it are unmounted.
pub fn mount_all(mounts: &[Mount], target: &Path) -> Result<()> {
    for (done, mount) in mounts.iter().enumerate() {
        if let Err(error) = mount_one(mount, target) {
            for _ in 0..done {
                if let Err(errno) = umount2(target, MntFlags::MNT_DETACH) {
                    log::warn!("unmount {} again: {errno}", target.display());
                }
            }
            return Err(error);
        }
    }
    Ok(())
}

/// Bind `source` on `destination`, which is made (a directory, or an empty file) when it is not there. When this fails,
/// nothing is left mounted.
pub fn bind(source: &Path, destination: &Path, flags: Flags) -> Result<()> {
    let what = || format!("bind {} on {}", source.display(), destination.display());
    let created = create_mountpoint(source, destination).with_context(what)?;
    let recursive = if flags.recursive { MsFlags::MS_REC } else { MsFlags::empty() };
    let bound = nix::mount::mount(
        Some(source),
        destination,
        None::<&str>,
        MsFlags::MS_BIND | recursive,
        None::<&str>,
    );
    if let Err(errno) = bound {
        remove_mountpoint(created);
        return Err(errno).with_context(what);
    }
    if let Err(error) = restrict(destination, flags) {
        if let Err(errno) = umount2(destination, MntFlags::MNT_DETACH) {
            log::warn!("unmount {} again: {errno}", destination.display());
        }
        remove_mountpoint(created);
        return Err(error).with_context(what);
    }
    Ok(())
}

/// Unmount what is mounted on `path`, at once for new users and in the end for those who have it open. Nothing mounted
/// there is no error.
pub fn unmount(path: &Path) -> Result<()> {
    match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => Ok(()),
        Err(errno) => Err(errno).with_context(|| format!("unmount {}", path.display())),
    }
}

/// Unmount everything mounted on `prefix` or below it, the innermost first.
pub fn unmount_below(prefix: &Path) -> Result<()> {
    let prefix = canonical(prefix);
    for _ in 0..UNMOUNT_ROUNDS {
        let points = mounted_below(&mountinfo::read()?, &prefix);
        if points.is_empty() {
            return Ok(());
        }
        for point in &points {
            unmount(point)?;
        }
    }
    let left = mounted_below(&mountinfo::read()?, &prefix);
    ensure!(
        left.is_empty(),
        "{} mounts below {} keep coming back, {} first: somebody else mounts there",
        left.len(),
        prefix.display(),
        left[0].display()
    );
    Ok(())
}

/// Whether something is mounted on exactly `path`.
pub fn is_mounted(path: &Path) -> Result<bool> {
    let path = canonical(path);
    Ok(mountinfo::read()?.iter().any(|entry| entry.point == path))
}

/// Mount points at or below `prefix`, in an order in which they can be unmounted: a later entry of mountinfo may lie on
/// an earlier one, never the other way round.
fn mounted_below(entries: &[Entry], prefix: &Path) -> Vec<PathBuf> {
    let mut below: Vec<_> = entries
        .iter()
        .map(|entry| &entry.point)
        .filter(|point| point.starts_with(prefix))
        .collect();
    below.reverse();
    // Stable: of two mounts on one point, the later stays first.
    below.sort_by_key(|point| std::cmp::Reverse(point.components().count()));
    below.into_iter().cloned().collect()
}

/// `path` as mountinfo spells it. The last component is not resolved: what is mounted on it may be dead.
fn canonical(path: &Path) -> PathBuf {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return path.to_owned();
    };
    match fs::canonicalize(parent) {
        Ok(parent) => parent.join(name),
        Err(_) => path.to_owned(),
    }
}

/// Option words, sorted out.
#[derive(Debug, PartialEq, Eq)]
struct Options {
    flags: MsFlags,
    /// Applied by a second call: the kernel ignores it in the one that mounts.
    propagation: MsFlags,
    /// The file system's own, in the order given.
    data: Vec<String>,
}

impl Options {
    fn parse(words: &[String]) -> Result<Self> {
        let none = MsFlags::empty();
        let mut options = Self { flags: none, propagation: none, data: Vec::new() };
        for word in words {
            match (flag(word), propagation(word)) {
                (Some((true, flag)), _) => options.flags |= flag,
                (Some((false, flag)), _) => options.flags &= !flag,
                (None, Some(propagation)) => options.propagation |= propagation,
                (None, None) if word == "loop" => {
                    bail!(
                        "option loop: loop devices are not used; the file is attached to the virtual machine"
                    )
                }
                (None, None) => options.data.push(word.clone()),
            }
        }
        Ok(options)
    }
}

/// What a word sets (`true`) or clears in the flags of mount(2).
fn flag(word: &str) -> Option<(bool, MsFlags)> {
    Some(match word {
        "defaults" => (true, MsFlags::empty()),
        "ro" => (true, MsFlags::MS_RDONLY),
        "rw" => (false, MsFlags::MS_RDONLY),
        "bind" => (true, MsFlags::MS_BIND),
        "rbind" => (true, MsFlags::MS_BIND | MsFlags::MS_REC),
        "remount" => (true, MsFlags::MS_REMOUNT),
        "nosuid" => (true, MsFlags::MS_NOSUID),
        "suid" => (false, MsFlags::MS_NOSUID),
        "nodev" => (true, MsFlags::MS_NODEV),
        "dev" => (false, MsFlags::MS_NODEV),
        "noexec" => (true, MsFlags::MS_NOEXEC),
        "exec" => (false, MsFlags::MS_NOEXEC),
        "sync" => (true, MsFlags::MS_SYNCHRONOUS),
        "async" => (false, MsFlags::MS_SYNCHRONOUS),
        "dirsync" => (true, MsFlags::MS_DIRSYNC),
        "mand" => (true, MsFlags::MS_MANDLOCK),
        "nomand" => (false, MsFlags::MS_MANDLOCK),
        "noatime" => (true, MsFlags::MS_NOATIME),
        "atime" => (false, MsFlags::MS_NOATIME),
        "nodiratime" => (true, MsFlags::MS_NODIRATIME),
        "diratime" => (false, MsFlags::MS_NODIRATIME),
        "relatime" => (true, MsFlags::MS_RELATIME),
        "norelatime" => (false, MsFlags::MS_RELATIME),
        "strictatime" => (true, MsFlags::MS_STRICTATIME),
        "nostrictatime" => (false, MsFlags::MS_STRICTATIME),
        "silent" => (true, MsFlags::MS_SILENT),
        "loud" => (false, MsFlags::MS_SILENT),
        _ => return None,
    })
}

fn propagation(word: &str) -> Option<MsFlags> {
    Some(match word {
        "private" => MsFlags::MS_PRIVATE,
        "rprivate" => MsFlags::MS_PRIVATE | MsFlags::MS_REC,
        "slave" => MsFlags::MS_SLAVE,
        "rslave" => MsFlags::MS_SLAVE | MsFlags::MS_REC,
        "shared" => MsFlags::MS_SHARED,
        "rshared" => MsFlags::MS_SHARED | MsFlags::MS_REC,
        "unbindable" => MsFlags::MS_UNBINDABLE,
        "runbindable" => MsFlags::MS_UNBINDABLE | MsFlags::MS_REC,
        _ => return None,
    })
}

fn mount_one(mount: &Mount, target: &Path) -> Result<()> {
    let what = || format!("mount {} {} on {}", mount.kind, mount.source, target.display());
    let options = Options::parse(&mount.options).with_context(what)?;
    if options.flags.contains(MsFlags::MS_BIND) || mount.kind == "bind" {
        return bind_with_options(mount, &options, target).with_context(what);
    }
    let data = options.data.join(",");
    let mounted = if data.len() <= MAX_OPTIONS {
        nix::mount::mount(
            Some(mount.source.as_str()),
            target,
            Some(mount.kind.as_str()),
            options.flags,
            Some(data.as_str()).filter(|data| !data.is_empty()),
        )
        .map_err(anyhow::Error::from)
    } else if mount.kind == "overlay" {
        mount_overlay(&mount.source, target, &options)
    } else {
        Err(anyhow!("{} bytes of options, the kernel takes {MAX_OPTIONS}", data.len()))
    };
    mounted.with_context(what)?;
    propagate(target, options.propagation).inspect_err(|_| drop(unmount(target))).with_context(what)
}

/// A bind as containerd asks for it: per-mount flags are set on top of those of the source.
fn bind_with_options(mount: &Mount, options: &Options, target: &Path) -> Result<()> {
    let flags = Flags {
        read_only: options.flags.contains(MsFlags::MS_RDONLY),
        recursive: options.flags.contains(MsFlags::MS_REC),
        propagation: None,
    };
    bind(Path::new(&mount.source), target, flags)?;
    let mut attributes = 0;
    for (flag, attribute) in [
        (MsFlags::MS_NOSUID, libc::MOUNT_ATTR_NOSUID),
        (MsFlags::MS_NODEV, libc::MOUNT_ATTR_NODEV),
        (MsFlags::MS_NOEXEC, libc::MOUNT_ATTR_NOEXEC),
    ] {
        if options.flags.contains(flag) {
            attributes |= attribute;
        }
    }
    set_attributes(target, attributes, 0, flags.recursive)
        .and_then(|()| propagate(target, options.propagation))
        .inspect_err(|_| drop(unmount(target)))
}

fn propagate(target: &Path, propagation: MsFlags) -> Result<()> {
    if propagation.is_empty() {
        return Ok(());
    }
    nix::mount::mount(None::<&str>, target, None::<&str>, propagation, None::<&str>)
        .with_context(|| format!("set propagation {propagation:?}"))
}

/// Read-only and propagation of a fresh bind, in one step.
fn restrict(destination: &Path, flags: Flags) -> Result<()> {
    let attributes = if flags.read_only { libc::MOUNT_ATTR_RDONLY } else { 0 };
    let propagation = match flags.propagation {
        None => 0,
        Some(Propagation::Private) => libc::MS_PRIVATE,
        Some(Propagation::Slave) => libc::MS_SLAVE,
        Some(Propagation::Shared) => libc::MS_SHARED,
    };
    set_attributes(destination, attributes, propagation, flags.recursive)
}

/// mount_setattr(2).
fn set_attributes(path: &Path, attributes: u64, propagation: u64, recursive: bool) -> Result<()> {
    if attributes == 0 && propagation == 0 {
        return Ok(());
    }
    let attr = libc::mount_attr { attr_set: attributes, attr_clr: 0, propagation, userns_fd: 0 };
    let flags = libc::AT_SYMLINK_NOFOLLOW | if recursive { libc::AT_RECURSIVE } else { 0 };
    let c_path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: the path and the structure live until the call returns, and its size is the one passed.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            libc::AT_FDCWD,
            c_path.as_ptr(),
            flags,
            &raw const attr,
            size_of::<libc::mount_attr>(),
        )
    };
    Errno::result(result).map(drop).with_context(|| {
        format!(
            "set attributes {attributes:#x}, propagation {propagation:#x} of {}",
            path.display()
        )
    })
}

/// What [`create_mountpoint`] made.
enum Created {
    Nothing,
    Directory(PathBuf),
    File(PathBuf),
}

fn create_mountpoint(source: &Path, destination: &Path) -> Result<Created> {
    let of = fs::metadata(source).with_context(|| format!("look at {}", source.display()))?;
    if destination.symlink_metadata().is_ok() {
        return Ok(Created::Nothing);
    }
    if of.is_dir() {
        fs::create_dir_all(destination)
            .with_context(|| format!("create directory {}", destination.display()))?;
        return Ok(Created::Directory(destination.to_owned()));
    }
    if let Some(parent) = destination.parent() {
        fs::create_dir_all(parent)
            .with_context(|| format!("create directory {}", parent.display()))?;
    }
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(destination)
        .with_context(|| format!("create file {}", destination.display()))?;
    Ok(Created::File(destination.to_owned()))
}

fn remove_mountpoint(created: Created) {
    let (path, removed) = match created {
        Created::Nothing => return,
        Created::Directory(path) => (path.clone(), fs::remove_dir(&path)),
        Created::File(path) => (path.clone(), fs::remove_file(&path)),
    };
    if let Err(error) = removed {
        log::warn!("remove {} again: {error}", path.display());
    }
}

/// Options of an overlay whose paths are relative to `base`.
struct Shortened {
    base: PathBuf,
    data: String,
}

/// Write the directories of an overlay relative to the deepest directory that all of them share.
fn shorten_overlay(data: &[String]) -> Result<Shortened> {
    const PATHS: [&str; 3] = ["lowerdir", "upperdir", "workdir"];
    let path_option = |word: &str| {
        word.split_once('=').map(|(key, _)| key).filter(|key| PATHS.contains(key)).is_some()
    };
    let all_paths = || {
        data.iter()
            .filter(|word| path_option(word))
            .flat_map(|word| word.split_once('=').map_or("", |(_, value)| value).split(':'))
    };
    let base = common_parent(all_paths().map(Path::new))
        .context("the overlay's directories share no parent to shorten their names against")?;
    let relative = |path: &str| {
        Path::new(path).strip_prefix(&base).map_or(path.to_owned(), |p| p.display().to_string())
    };
    let words: Vec<String> = data
        .iter()
        .map(|word| match word.split_once('=') {
            Some((key, value)) if PATHS.contains(&key) => {
                let paths: Vec<_> = value.split(':').map(relative).collect();
                format!("{key}={}", paths.join(":"))
            }
            _ => word.clone(),
        })
        .collect();
    let data = words.join(",");
    ensure!(
        data.len() <= MAX_OPTIONS,
        "{} bytes of options even when relative to {}, the kernel takes {MAX_OPTIONS}: too many layers",
        data.len(),
        base.display()
    );
    Ok(Shortened { base, data })
}

/// The deepest directory that holds every one of `paths`, all absolute.
fn common_parent<'a>(mut paths: impl Iterator<Item = &'a Path>) -> Option<PathBuf> {
    let mut common: Vec<Component<'a>> = paths.next()?.parent()?.components().collect();
    for path in paths {
        let same =
            common.iter().zip(path.parent()?.components()).take_while(|(a, b)| *a == b).count();
        common.truncate(same);
    }
    // The root alone shortens nothing; no component at all means that a path was relative.
    (common.len() > 1).then(|| common.iter().collect())
}

/// Mount an overlay from the directory that its layers share. The working directory belongs to the whole process, so a
/// thread that no longer shares it (CLONE_FS) does the mounting.
fn mount_overlay(source: &str, target: &Path, options: &Options) -> Result<()> {
    let Shortened { base, data } = shorten_overlay(&options.data)?;
    let target = fs::canonicalize(target)?;
    let work = || -> Result<()> {
        unshare(CloneFlags::CLONE_FS).context("take a working directory of my own")?;
        nix::unistd::fchdir(File::open(&base)?)
            .with_context(|| format!("change to {}", base.display()))?;
        nix::mount::mount(
            Some(source),
            &target,
            Some("overlay"),
            options.flags,
            Some(data.as_str()),
        )?;
        Ok(())
    };
    thread::scope(|scope| {
        thread::Builder::new()
            .name("ecr-mount".into())
            .spawn_scoped(scope, work)?
            .join()
            .unwrap_or_else(|_| Err(anyhow!("the mounting thread panicked")))
    })
}

#[cfg(test)]
#[path = "mount_tests.rs"]
mod tests;
