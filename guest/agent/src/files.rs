// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! `CopyFile`: files of the host for a guest without a share. They go below the agent's directory and nowhere else:
//! every path is resolved as if that were the root, and symbolic links cannot lead out of it (openat2(2)).
//!
//! A file comes in pieces. They are gathered under another name, and the last one puts the file in its place.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, bail};
use ecr_agent_protocol::agent::CopyFileRequest;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, open, openat, openat2, renameat};
use nix::sys::stat::{Mode, fchmod, mkdirat};
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchownat, symlinkat, unlinkat};

use crate::sandbox::RUN;

const IN_PARTS: &str = ".part";

/// Store what `request` brings.
pub fn copy(request: &CopyFileRequest) -> Result<()> {
    copy_below(Path::new(RUN), request).with_context(|| format!("copy to {:?}", request.path))
}

fn copy_below(root: &Path, request: &CopyFileRequest) -> Result<()> {
    let place = Place::of(root, &request.path)?;
    let parent = place.open_parent(root, Mode::from_bits_truncate(request.dir_mode & 0o7777))?;
    let (parent, name) = (parent.as_fd(), place.name.as_os_str());
    let mode = Mode::from_bits_truncate(request.file_mode & 0o7777);
    let owner = Owner::of(request);
    match request.file_mode & libc::S_IFMT {
        0 | libc::S_IFREG => copy_part(&parent, name, mode, &owner, request),
        libc::S_IFDIR => make_directory(&parent, name, mode, &owner),
        libc::S_IFLNK => make_link(&parent, name, &owner, OsStr::from_bytes(&request.data)),
        kind => bail!("files of type {kind:o} are not copied"),
    }
}

/// Where a path leads, below the root.
#[derive(Debug, PartialEq, Eq)]
struct Place {
    directories: PathBuf,
    name: OsString,
}

impl Place {
    fn of(root: &Path, path: &str) -> Result<Self> {
        let below = Path::new(path)
            .strip_prefix(root)
            .with_context(|| format!("the path has to be below {}", root.display()))?;
        if below.components().any(|part| !matches!(part, Component::Normal(_))) {
            bail!("the path has a step up in it");
        }
        match (below.parent(), below.file_name()) {
            (Some(directories), Some(name)) => {
                Ok(Place { directories: directories.to_owned(), name: name.to_owned() })
            }
            _ => bail!("the path names no file"),
        }
    }

    /// The directory of the file, which is made if it is not there.
    fn open_parent(&self, root: &Path, mode: Mode) -> Result<OwnedFd> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        fs::create_dir_all(root).with_context(|| format!("create {}", root.display()))?;
        let root =
            open(root, flags, Mode::empty()).with_context(|| format!("open {}", root.display()))?;
        let how = OpenHow::new()
            .flags(flags)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        let mut parent = root.try_clone().context("open the directory again")?;
        let mut path = PathBuf::new();
        for step in &self.directories {
            path.push(step);
            parent = match openat2(&root, &path, how) {
                Err(Errno::ENOENT) => {
                    match mkdirat(&parent, step, mode) {
                        Ok(()) | Err(Errno::EEXIST) => {}
                        Err(error) => {
                            return Err(error)
                                .with_context(|| format!("create directory {}", path.display()));
                        }
                    }
                    openat2(&root, &path, how)
                }
                opened => opened,
            }
            .with_context(|| format!("open directory {}", path.display()))?;
        }
        Ok(parent)
    }
}

struct Owner {
    uid: Option<Uid>,
    gid: Option<Gid>,
}

impl Owner {
    /// -1 leaves it as it is, as in chown(2).
    fn of(request: &CopyFileRequest) -> Self {
        Owner {
            uid: (request.uid != -1).then(|| Uid::from_raw(request.uid.cast_unsigned())),
            gid: (request.gid != -1).then(|| Gid::from_raw(request.gid.cast_unsigned())),
        }
    }

    fn give(&self, parent: &impl AsFd, name: &OsStr) -> Result<()> {
        fchownat(parent, name, self.uid, self.gid, AtFlags::AT_SYMLINK_NOFOLLOW)
            .context("set its owner")
    }
}

fn copy_part(
    parent: &impl AsFd,
    name: &OsStr,
    mode: Mode,
    owner: &Owner,
    request: &CopyFileRequest,
) -> Result<()> {
    let (size, offset) = (number(request.file_size, "size")?, number(request.offset, "offset")?);
    let end = offset.checked_add(request.data.len() as u64).filter(|&end| end <= size);
    let Some(_) = end else {
        bail!("{} bytes at {offset} are more than a file of {size}", request.data.len());
    };
    let part = with_suffix(name, IN_PARTS);
    let mut flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    if offset == 0 {
        // Of a copy that was given up.
        flags |= OFlag::O_TRUNC;
    }
    let private = Mode::S_IRUSR | Mode::S_IWUSR;
    let file = openat(parent, part.as_os_str(), flags, private).context("open it")?;
    let file = File::from(file);
    file.write_all_at(&request.data, offset).with_context(|| format!("write at {offset}"))?;
    if file.metadata().context("look at its size")?.len() < size {
        return Ok(());
    }
    owner.give(parent, &part)?;
    fchmod(&file, mode).with_context(|| format!("set its mode to {mode:?}"))?;
    renameat(parent, part.as_os_str(), parent, name).context("put it in its place")
}

fn number(number: i64, what: &str) -> Result<u64> {
    u64::try_from(number).with_context(|| format!("{what} {number}"))
}

fn with_suffix(name: &OsStr, suffix: &str) -> OsString {
    let mut name = name.to_owned();
    name.push(suffix);
    name
}

fn make_directory(parent: &impl AsFd, name: &OsStr, mode: Mode, owner: &Owner) -> Result<()> {
    match mkdirat(parent, name, mode) {
        Ok(()) | Err(Errno::EEXIST) => {}
        Err(error) => return Err(error).context("create the directory"),
    }
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let directory = openat(parent, name, flags, Mode::empty()).context("open the directory")?;
    owner.give(parent, name)?;
    fchmod(&directory, mode).with_context(|| format!("set its mode to {mode:?}"))
}

fn make_link(parent: &impl AsFd, name: &OsStr, owner: &Owner, to: &OsStr) -> Result<()> {
    if to.is_empty() {
        bail!("a symbolic link to nowhere");
    }
    let new = with_suffix(name, IN_PARTS);
    match unlinkat(parent, new.as_os_str(), UnlinkatFlags::NoRemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => {}
        Err(error) => return Err(error).context("remove the link of a copy that was given up"),
    }
    symlinkat(to, parent, new.as_os_str()).context("create the symbolic link")?;
    owner.give(parent, &new)?;
    renameat(parent, new.as_os_str(), parent, name).context("put the link in its place")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, symlink};

    struct Root(tempfile::TempDir);

    impl Root {
        fn new() -> Self {
            Root(tempfile::tempdir().unwrap())
        }

        fn path(&self, below: &str) -> PathBuf {
            self.0.path().join("root").join(below)
        }

        fn request(&self, path: &str, data: &str) -> CopyFileRequest {
            CopyFileRequest {
                path: self.path(path).to_str().unwrap().into(),
                file_size: data.len() as i64,
                file_mode: 0o640,
                dir_mode: 0o755,
                uid: -1,
                gid: -1,
                data: data.into(),
                ..Default::default()
            }
        }

        fn copy(&self, request: &CopyFileRequest) -> Result<()> {
            copy_below(&self.path(""), request)
        }
    }

    #[test]
    fn a_file_in_pieces_appears_with_the_last_one() {
        let root = Root::new();
        let whole = CopyFileRequest { file_size: 6, ..root.request("a/b/file", "abc") };
        root.copy(&whole).unwrap();
        assert!(!root.path("a/b/file").exists());
        root.copy(&CopyFileRequest { offset: 3, data: "def".into(), ..whole }).unwrap();
        assert_eq!(fs::read_to_string(root.path("a/b/file")).unwrap(), "abcdef");
        let metadata = fs::metadata(root.path("a/b/file")).unwrap();
        assert_eq!(metadata.mode() & 0o7777, 0o640);
        assert_eq!(fs::read_dir(root.path("a/b")).unwrap().count(), 1);

        root.copy(&root.request("a/b/file", "")).unwrap();
        assert_eq!(fs::read_to_string(root.path("a/b/file")).unwrap(), "");
    }

    #[test]
    fn directories_and_links() {
        let root = Root::new();
        let directory =
            CopyFileRequest { file_mode: libc::S_IFDIR | 0o1777, ..root.request("dir", "") };
        root.copy(&directory).unwrap();
        root.copy(&directory).unwrap();
        assert_eq!(fs::metadata(root.path("dir")).unwrap().mode() & 0o7777, 0o1777);
        for to in ["/somewhere", "elsewhere"] {
            let link = CopyFileRequest { file_mode: libc::S_IFLNK, ..root.request("dir/link", to) };
            root.copy(&link).unwrap();
            assert_eq!(fs::read_link(root.path("dir/link")).unwrap(), Path::new(to));
        }
        let fifo = CopyFileRequest { file_mode: libc::S_IFIFO, ..root.request("fifo", "") };
        assert!(root.copy(&fifo).is_err());
    }

    #[test]
    fn links_do_not_lead_out() {
        let root = Root::new();
        let outside = root.0.path().join("outside");
        fs::create_dir(&outside).unwrap();
        fs::create_dir_all(root.path("inside")).unwrap();
        symlink(&outside, root.path("absolute")).unwrap();
        symlink("../../outside", root.path("relative")).unwrap();
        symlink(outside.join("file"), root.path("file")).unwrap();
        // As if the root were "/": these directories do not exist there, and links are not replaced by directories.
        for path in ["absolute/x", "relative/x"] {
            assert!(root.copy(&root.request(path, "x")).is_err(), "{path}");
        }
        root.copy(&root.request("file", "x")).unwrap();
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
        assert!(fs::symlink_metadata(root.path("file")).unwrap().is_file());

        symlink("/inside", root.path("within")).unwrap();
        root.copy(&root.request("within/file", "x")).unwrap();
        assert!(root.path("inside/file").exists());
    }

    #[test]
    fn requests_that_make_no_sense() {
        let root = Root::new();
        let good = root.request("file", "abc");
        for wrong in [
            CopyFileRequest { path: "/etc/passwd".into(), ..good.clone() },
            CopyFileRequest { path: "file".into(), ..good.clone() },
            CopyFileRequest { path: root.path("").to_str().unwrap().into(), ..good.clone() },
            root.request("../outside", "x"),
            root.request("a/../../outside", "x"),
            CopyFileRequest { file_size: -1, ..good.clone() },
            CopyFileRequest { offset: -1, ..good.clone() },
            CopyFileRequest { offset: i64::MAX, ..good.clone() },
            CopyFileRequest { file_size: 2, ..good },
        ] {
            assert!(root.copy(&wrong).is_err(), "{wrong:?}");
        }
    }
}
