// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The container's root: mounts, devices, protected paths, and the way in.
//!
//! Everything is made from outside, below a handle of the root ([`Root`]), and the root is entered last, so that the
//! guest's `/proc` and `/dev` are at hand all the time.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use ecr_agent_protocol::oci::{Mount, Spec};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, SFlag, fstat};
use nix::unistd::{chdir, chroot, fchdir, pivot_root};

use super::device;
use super::mount::{Options, root_propagation};
use super::root::{Make, Root, fd_path, normal, write};
use super::terminal::Terminal;

/// A root file system that is being prepared.
pub struct Rootfs {
    root: Root,
    path: PathBuf,
}

impl Rootfs {
    /// Make the mount namespace's copy independent, and the root a mount of its own.
    pub fn prepare(spec: &Spec) -> Result<Self> {
        let path = PathBuf::from(&spec.root.get_or_default().path);
        // What happens in the container must not reach the guest; the other way is up to the specification.
        let name = spec.linux.get_or_default().rootfs_propagation.as_str();
        let outside = match root_propagation(name)? {
            Some(flag) if flag.contains(MsFlags::MS_PRIVATE) => MsFlags::MS_PRIVATE,
            _ => MsFlags::MS_SLAVE,
        };
        change("/".as_ref(), outside | MsFlags::MS_REC).context("set the propagation of /")?;
        let bind = MsFlags::MS_BIND | MsFlags::MS_REC;
        mount(Some(&path), &path, None::<&str>, bind, None::<&str>)
            .with_context(|| format!("mount the root file system {}", path.display()))?;
        Ok(Rootfs { root: Root::open(&path)?, path })
    }

    pub fn root(&self) -> &Root {
        &self.root
    }

    pub fn mount_all(&self, mounts: &[Mount]) -> Result<()> {
        for one in mounts {
            self.mount(one).with_context(|| {
                let Mount { source, destination, type_, options, .. } = one;
                format!("mount {source:?} ({type_}) to {destination:?} with options {options:?}")
            })?;
        }
        Ok(())
    }

    fn mount(&self, one: &Mount) -> Result<()> {
        let mut options = Options::parse(&one.options);
        let destination = Path::new(&one.destination);
        if one.type_ == "bind" {
            options.flags.0 |= MsFlags::MS_BIND;
        }
        let make = if options.is_bind() && !Path::new(&one.source).is_dir() {
            Make::File
        } else {
            Make::Directory
        };
        let existed = self.root.look(destination).is_ok();
        let target = self.root.make(destination, make)?;
        if options.is_bind() {
            options.bind(Path::new(&one.source), &fd_path(&target))?;
        } else {
            match one.type_.as_str() {
                "cgroup" | "cgroup2" => {
                    // Version 2 has no options that a container could ask for.
                    options.data.clear();
                    options.mount("cgroup", "cgroup2", &fd_path(&target))?;
                }
                "tmpfs" => {
                    keep_mode(&mut options, &target, existed)?;
                    options.mount(&one.source, "tmpfs", &fd_path(&target))?;
                }
                "" => bail!("the type is missing"),
                kind => options.mount(&one.source, kind, &fd_path(&target))?,
            }
        }
        // The handle is of what the mount covers; its path leads to the mount.
        options.restrict(self.root.look(destination)?)
    }

    /// Device nodes and links, unless `/dev` is somebody else's.
    pub fn make_devices(&self, spec: &Spec) -> Result<()> {
        let bound = spec.mounts.iter().any(|one| {
            normal(Path::new(&one.destination)) == Path::new("dev")
                && (one.type_ == "bind" || Options::parse(&one.options).is_bind())
        });
        if bound {
            return Ok(());
        }
        device::make_default(&self.root)?;
        for one in &spec.linux.get_or_default().devices {
            device::make(&self.root, one)?;
        }
        Ok(())
    }

    /// `/dev/console` is the terminal of the first process.
    pub fn bind_console(&self, terminal: &Terminal) -> Result<()> {
        let console = self.root.make(Path::new("/dev/console"), Make::File)?;
        let source = fd_path(terminal.slave());
        mount(Some(&source), &fd_path(&console), None::<&str>, MsFlags::MS_BIND, None::<&str>)
            .context("mount the terminal to /dev/console")
    }

    /// An image may name a working directory that it does not have.
    pub fn make_working_directory(&self, path: &str) -> Result<()> {
        if !path.is_empty() {
            self.root
                .make(Path::new(path), Make::Directory)
                .context("make the working directory")?;
        }
        Ok(())
    }

    /// Kernel parameters, read-only and masked paths, the read-only root.
    pub fn protect(&self, spec: &Spec) -> Result<()> {
        let linux = spec.linux.get_or_default();
        for (key, value) in &linux.sysctl {
            set_parameter(key, value)?;
        }
        for path in &linux.readonly_paths {
            let Some(target) = self.find(path)? else { continue };
            let mut options = Options::default();
            options.flags.0 = MsFlags::MS_BIND | MsFlags::MS_REC;
            let place = fd_path(&target);
            options.bind(&place, &place).with_context(|| format!("protect {path:?}"))?;
            // Whatever the mount there forbids stays forbidden.
            options.flags.0 |= MsFlags::MS_RDONLY | flags_of(&target)?;
            let mounted = self.root.look(Path::new(path))?;
            options.restrict(mounted).with_context(|| format!("protect {path:?}"))?;
        }
        for path in &linux.masked_paths {
            let Some(target) = self.find(path)? else { continue };
            mask(&target).with_context(|| format!("mask {path:?}"))?;
        }
        if spec.root.get_or_default().readonly {
            let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
            let flags = flags | flags_of(self.root.look(Path::new("/"))?)?;
            change(&self.root.path(), flags).context("make the root read-only")?;
        }
        Ok(())
    }

    fn find(&self, path: &str) -> Result<Option<OwnedFd>> {
        match self.root.look(Path::new(path)) {
            Ok(found) => Ok(Some(found)),
            Err(Errno::ENOENT | Errno::ENOTDIR) => Ok(None),
            Err(error) => Err(error).with_context(|| format!("open {path:?} in the container")),
        }
    }

    /// Make it the root of this process, and let go of everything outside.
    pub fn enter(self, propagation: &str) -> Result<()> {
        let old = nix::fcntl::open("/", OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())
            .context("open /")?;
        chdir(&self.path).context("enter the root file system")?;
        match pivot_root(".", ".") {
            Ok(()) => {
                fchdir(&old).context("find the old root")?;
                change(".".as_ref(), MsFlags::MS_SLAVE | MsFlags::MS_REC)
                    .context("let go of the old root")?;
                umount2(".", MntFlags::MNT_DETACH).context("let go of the old root")?;
            }
            // The initial RAM disk is the one root that cannot be exchanged: it is covered.
            Err(Errno::EINVAL) => self.cover()?,
            Err(error) => return Err(error).context("change the root"),
        }
        chdir("/").context("enter the new root")?;
        if let Some(flag) = root_propagation(propagation)? {
            change("/".as_ref(), flag).context("set the propagation of the root")?;
        }
        Ok(())
    }

    fn cover(&self) -> Result<()> {
        let table = fs::read_to_string("/proc/self/mountinfo").context("list the mounts")?;
        let below = |point: &str| Path::new(point).starts_with(&self.path);
        // Whoever gets behind the cover finds no kernel interfaces there.
        for point in table.lines().filter_map(kernel_interface).filter(|point| !below(point)) {
            umount2(point, MntFlags::MNT_DETACH).with_context(|| format!("unmount {point}"))?;
        }
        mount(Some(&self.path), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)
            .context("move the root file system to /")?;
        chroot(".").context("change the root")
    }
}

/// The mount point, if a line of `mountinfo` is of `proc` or `sysfs` (proc(5)).
fn kernel_interface(line: &str) -> Option<&str> {
    let (head, tail) = line.split_once(" - ")?;
    let kind = tail.split(' ').next()?;
    matches!(kind, "proc" | "sysfs").then(|| head.split(' ').nth(4)).flatten()
}

/// Change a mount without mounting anything.
fn change(target: &Path, flags: MsFlags) -> nix::Result<()> {
    mount(None::<&str>, target, None::<&str>, flags, None::<&str>)
}

/// What the mount that `target` lies on forbids already, as flags of mount(2). `relatime` is what mount(2) does unasked.
fn flags_of(target: impl AsFd) -> Result<MsFlags> {
    use nix::sys::statvfs::FsFlags;
    let present = nix::sys::statvfs::fstatvfs(target).context("look at the mount")?.flags();
    let pairs = [
        (FsFlags::ST_RDONLY, MsFlags::MS_RDONLY),
        (FsFlags::ST_NOSUID, MsFlags::MS_NOSUID),
        (FsFlags::ST_NODEV, MsFlags::MS_NODEV),
        (FsFlags::ST_NOEXEC, MsFlags::MS_NOEXEC),
        (FsFlags::ST_NOATIME, MsFlags::MS_NOATIME),
        (FsFlags::ST_NODIRATIME, MsFlags::MS_NODIRATIME),
    ];
    Ok(pairs
        .into_iter()
        .filter(|&(flag, _)| present.contains(flag))
        .map(|(_, flag)| flag)
        .collect())
}

/// A tmpfs over a directory of the image has that directory's mode, unless the specification says another one.
fn keep_mode(options: &mut Options, target: &OwnedFd, existed: bool) -> Result<()> {
    if existed && !options.data.iter().any(|option| option.starts_with("mode=")) {
        let mode = fstat(target).context("look at the directory")?.st_mode & 0o7777;
        options.data.push(format!("mode={mode:o}"));
    }
    Ok(())
}

/// Hide a directory behind an empty one, anything else behind `/dev/null`.
fn mask(target: &OwnedFd) -> Result<()> {
    let mode = fstat(target).context("look at it")?.st_mode;
    let place = fd_path(target);
    if SFlag::from_bits_truncate(mode) & SFlag::S_IFMT == SFlag::S_IFDIR {
        mount(Some("tmpfs"), &place, Some("tmpfs"), MsFlags::MS_RDONLY, Some("nr_inodes=1"))?;
    } else {
        mount(Some("/dev/null"), &place, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    }
    Ok(())
}

/// Set a kernel parameter of this process's namespaces. Dots separate, unless there are slashes (sysctl(8)).
fn set_parameter(key: &str, value: &str) -> Result<()> {
    let path = if key.contains('/') { key.to_string() } else { key.replace('.', "/") };
    if path.split('/').any(|part| part.is_empty() || part == "." || part == "..") {
        bail!("sysctl {key:?} is no name of a kernel parameter");
    }
    write(&format!("/proc/sys/{path}"), value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_kernel_parameters() {
        assert!(set_parameter("net/../../self/oom_score_adj", "0").is_err());
        assert!(set_parameter("..net", "0").is_err());
    }

    #[test]
    fn kernel_interfaces_in_the_mount_table() {
        let line = "22 27 0:21 / /proc rw,relatime shared:5 - proc proc rw";
        assert_eq!(kernel_interface(line), Some("/proc"));
        assert_eq!(kernel_interface("27 1 254:0 / / rw - ext4 /dev/vda rw"), None);
        assert_eq!(kernel_interface(""), None);
    }
}
