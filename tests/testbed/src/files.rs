// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The files that a command is given: our binaries, guest kernels, images.
//!
//! `--files NAME=PATH` makes PATH, a file or a directory, appear as NAME in the directory that `ECR_FILES` names.
//! On this machine that directory holds symbolic links. For the emulated host it becomes a read-only ext4 disk,
//! made anew for each boot: neither of Debian's cloud kernels has 9p, and writing 300 MB takes half a second.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result, ensure};

use crate::tool;

/// Where the emulated host mounts the files.
pub const FILES_DIRECTORY: &str = "/files";
/// The variable that names the directory.
pub const FILES_VARIABLE: &str = "ECR_FILES";
/// Set in an emulated host: what runs there is many times slower than on hardware.
pub const EMULATED_VARIABLE: &str = "ECR_EMULATED";
/// Where commands in the emulated host leave files to collect.
pub const COLLECT_DIRECTORY: &str = "/var/collect";
/// The variable that names the directory to leave files in.
pub const COLLECT_VARIABLE: &str = "ECR_COLLECT";

/// One `NAME=PATH`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GivenFile {
    /// Its name in the directory of files.
    pub name: String,
    /// Where it is on this machine, absolute.
    pub path: PathBuf,
}

impl GivenFile {
    /// `path` under `name`.
    ///
    /// # Errors
    /// `name` is not one plain path component, or there is nothing at `path`.
    pub fn new(name: &str, path: &Path) -> Result<Self> {
        ensure!(
            !name.is_empty() && name != "." && name != ".." && !name.contains('/'),
            "`{name}` cannot be the name of a file: give one path component"
        );
        let path =
            fs::canonicalize(path).with_context(|| format!("looking for {}", path.display()))?;
        Ok(Self { name: name.to_owned(), path })
    }
}

impl FromStr for GivenFile {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (name, path) = text.split_once('=').context("a file is given as NAME=PATH")?;
        Self::new(name, Path::new(path))
    }
}

/// Puts a symbolic link to each file into `directory`.
///
/// # Errors
/// Two files have one name, or the directory cannot be written.
pub fn link(files: &[GivenFile], directory: &Path) -> Result<()> {
    for file in files {
        symlink(&file.path, directory.join(&file.name))
            .with_context(|| format!("giving {} the name `{}`", file.path.display(), file.name))?;
    }
    Ok(())
}

/// Makes `disk`, an ext4 image of the files. `scratch` is an empty directory on the same file system.
///
/// # Errors
/// A file cannot be read, two have one name, or `mke2fs` failed.
pub fn make_disk(files: &[GivenFile], scratch: &Path, disk: &Path) -> Result<()> {
    for file in files {
        let to = scratch.join(&file.name);
        ensure!(!to.exists(), "two files have the name `{}`", file.name);
        place(&file.path, &to)
            .with_context(|| format!("giving {} the name `{}`", file.path.display(), file.name))?;
    }
    make_ext4(scratch, disk, Space::ForContent)
}

/// A hard link where that is possible, else a copy; directories with all that is below them.
fn place(from: &Path, to: &Path) -> Result<()> {
    if from.is_dir() {
        fs::create_dir(to)?;
        for entry in fs::read_dir(from)? {
            let entry = entry?;
            place(&entry.path(), &to.join(entry.file_name()))?;
        }
        return Ok(());
    }
    // A link's target need not be on the disk, so follow it.
    let from = fs::canonicalize(from)?;
    if fs::hard_link(&from, to).is_err() {
        fs::copy(&from, to)?;
    }
    Ok(())
}

/// How large to make a file system.
#[derive(Debug, Clone, Copy)]
pub enum Space {
    /// Just enough.
    ForContent,
    /// Enough, and this many free bytes.
    AndFree(u64),
}

/// Makes `image` an ext4 file system with the contents of `directory`, all owned by root if we are not.
///
/// # Errors
/// `mke2fs` is missing or failed.
pub fn make_ext4(directory: &Path, image: &Path, space: Space) -> Result<()> {
    const BLOCK: u64 = 4096;
    let (blocks, inodes) = usage(directory)?;
    let free = match space {
        Space::ForContent => 0,
        Space::AndFree(bytes) => bytes / BLOCK,
    };
    let inodes = inodes + 64 + free / 16;
    // Extent blocks, group descriptors and bitmaps are well below 1 in 64; inodes take 256 bytes.
    let total = blocks + blocks / 64 + free + inodes * 256 / BLOCK + 1024;
    let root = rustix::process::geteuid().is_root();
    let mut command = tool::command(if root { "mke2fs" } else { "unshare" });
    if !root {
        command.args(["--map-root-user", "mke2fs"]); // Our files are root's in there.
    }
    command
        .args(["-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0"])
        .args(["-O", "^has_journal,^resize_inode", "-E", "lazy_itable_init=1,nodiscard"])
        .args(["-N", &inodes.to_string(), "-d"])
        .args([directory, image])
        .arg(total.to_string());
    tool::run(&mut command, "e2fsprogs")
}

/// Blocks of 4 KiB and inodes below `directory`.
fn usage(directory: &Path) -> Result<(u64, u64)> {
    let mut total = (0, 0);
    for entry in
        fs::read_dir(directory).with_context(|| format!("reading {}", directory.display()))?
    {
        let entry = entry?;
        let metadata = entry.metadata()?;
        let (blocks, inodes) = if metadata.is_dir() {
            usage(&entry.path())?
        } else {
            (metadata.blocks().div_ceil(8), 0)
        };
        // One more block for a directory's own entries, or for a file's tail.
        total = (total.0 + blocks + 1, total.1 + inodes + 1);
    }
    Ok(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_one_component() {
        let here = tempfile::tempdir().unwrap();
        let path = here.path().display();
        assert_eq!(format!("a={path}").parse::<GivenFile>().unwrap().name, "a");
        for bad in [
            format!("a/b={path}"),
            format!("..={path}"),
            format!("={path}"),
            "a".into(),
            "a=/no/such".into(),
        ] {
            bad.parse::<GivenFile>().unwrap_err();
        }
    }

    #[test]
    fn a_disk_holds_trees_and_what_links_point_to() {
        let work = tempfile::tempdir().unwrap();
        let (tree, scratch) = (work.path().join("tree"), work.path().join("scratch"));
        fs::create_dir_all(tree.join("below")).unwrap();
        fs::create_dir(&scratch).unwrap();
        fs::write(tree.join("below/file"), vec![7; 100_000]).unwrap();
        symlink(tree.join("below/file"), tree.join("link")).unwrap();

        let disk = work.path().join("disk");
        make_disk(&[GivenFile::new("guest", &tree).unwrap()], &scratch, &disk).unwrap();

        let read = |name: &str| {
            tool::command("debugfs")
                .args(["-R", &format!("cat {name}")])
                .arg(&disk)
                .output()
                .unwrap()
                .stdout
        };
        assert_eq!(read("guest/below/file"), vec![7; 100_000]);
        assert_eq!(read("guest/link"), vec![7; 100_000]);
    }

    #[test]
    fn two_files_of_one_name_are_refused() {
        let work = tempfile::tempdir().unwrap();
        let scratch = work.path().join("scratch");
        fs::create_dir(&scratch).unwrap();
        fs::write(work.path().join("f"), "x").unwrap();
        let file = GivenFile::new("f", &work.path().join("f")).unwrap();
        let error =
            make_disk(&[file.clone(), file], &scratch, &work.path().join("disk")).unwrap_err();
        assert!(error.to_string().contains("`f`"), "{error}");
    }
}
