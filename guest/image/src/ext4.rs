// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The root file system: made by e2fsprogs' `mke2fs`, filled by its `debugfs`, checked by its `e2fsck`, all three in
//! place behind the frame's [`crate::disk`] offset.
//!
//! `mke2fs -d` would be shorter, but takes order, owner and time from the build machine. Every feature, UUID and seed
//! is given, so that other versions and configurations of e2fsprogs make the same file system.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, bail};

use crate::manifest::{Entry, Kind, Manifest, OWNER, TIME};

const UUID: &str = "d1c7fd4e-1a0b-4c5e-8f4e-6f8a3b6f2c11";
const HASH_SEED: &str = "5f0c9d5a-93d6-4d0f-a6ab-0f2d7c1e8b42";
const LABEL: &str = "ecr-root";
/// `rootflags=data=ordered` is refused without a journal; 4 MiB is the smallest one.
const JOURNAL_MIB: u32 = 4;
const FEATURES: &str = "none,has_journal,ext_attr,dir_index,filetype,extent,64bit,flex_bg,sparse_super,large_file,\
                        huge_file,dir_nlink,extra_isize,metadata_csum";
const BLOCK: u64 = 4096;

/// Make a file system of `manifest` in the image file, from `offset` to `end`.
pub fn write(manifest: &Manifest, image: &Path, offset: u64, end: u64) -> Result<()> {
    make(image, offset, (end - offset) / BLOCK)?;
    // How the tools address a file system inside a file.
    let device = format!("{}?offset={offset}", image.display());
    fill(manifest, &device)?;
    check(&device)
}

/// A tool of e2fsprogs, with nothing from the build machine but the program.
fn tool(name: &str) -> Command {
    let mut command = Command::new(name);
    command
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .env("MKE2FS_CONFIG", "/dev/null")
        .env("E2FSPROGS_FAKE_TIME", TIME.to_string())
        .env("SOURCE_DATE_EPOCH", TIME.to_string())
        .env("LC_ALL", "C")
        .stdin(Stdio::null());
    command
}

fn run(command: &mut Command) -> Result<Output> {
    let output = command.output().with_context(|| {
        format!("run {} (Debian package e2fsprogs)", command.get_program().display())
    })?;
    Ok(output)
}

fn succeed(command: &mut Command) -> Result<()> {
    let output = run(command)?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        bail!("{}: {}\n{text}", command.get_program().display(), output.status);
    }
    Ok(())
}

fn make(image: &Path, offset: u64, blocks: u64) -> Result<()> {
    let extended = format!(
        "offset={offset},hash_seed={HASH_SEED},root_owner={OWNER}:{OWNER},nodiscard,lazy_itable_init=0,\
         lazy_journal_init=0"
    );
    let journal = format!("size={JOURNAL_MIB}");
    let block = BLOCK.to_string();
    succeed(
        tool("mke2fs")
            .args(["-q", "-F", "-t", "ext4", "-b", &block, "-I", "256", "-m", "0"])
            .args(["-O", FEATURES, "-L", LABEL, "-U", UUID, "-J", &journal, "-E", &extended])
            .arg(image)
            .arg(blocks.to_string()),
    )
}

/// `debugfs` goes on after a command that went wrong and exits with 0, but then says something on standard error,
/// where only its version belongs.
fn fill(manifest: &Manifest, device: &str) -> Result<()> {
    let mut debugfs = tool("debugfs")
        .args(["-w", device])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("run debugfs (Debian package e2fsprogs)")?;
    if let Some(mut commands) = debugfs.stdin.take() {
        commands.write_all(script(manifest).as_bytes()).context("tell debugfs what to do")?;
    }
    let output = debugfs.wait_with_output().context("wait for debugfs")?;
    let errors = String::from_utf8_lossy(&output.stderr);
    let mistakes: Vec<&str> =
        errors.lines().filter(|line| !line.starts_with("debugfs 1.")).collect();
    if !mistakes.is_empty() || !output.status.success() {
        bail!("debugfs: {}\n{}", output.status, mistakes.join("\n"));
    }
    Ok(())
}

fn script(manifest: &Manifest) -> String {
    let mut script = String::new();
    for Entry { path, mode, kind } in &manifest.entries {
        let (directory, name) = path.rsplit_once('/').unwrap_or(("", path));
        // New names are given relative to the directory that they go into.
        script.push_str(&format!("cd \"{directory}/\"\n"));
        let type_bits = match kind {
            Kind::Directory => {
                script.push_str(&format!("mkdir \"{name}\"\n"));
                0o040000
            }
            Kind::File { source } => {
                script.push_str(&format!("write \"{}\" \"{name}\"\n", source.display()));
                0o100000
            }
            Kind::Link { target } => {
                script.push_str(&format!("symlink \"{name}\" \"{target}\"\n"));
                0o120000
            }
            Kind::CharacterDevice { major, minor } => {
                script.push_str(&format!("mknod \"{name}\" c {major} {minor}\n"));
                0o020000
            }
        };
        script.push_str(&format!("set_inode_field \"{name}\" mode 0{:o}\n", type_bits | mode));
        for (field, value) in [("uid", OWNER), ("gid", OWNER)] {
            script.push_str(&format!("set_inode_field \"{name}\" {field} {value}\n"));
        }
        for field in ["atime", "ctime", "mtime", "crtime"] {
            script.push_str(&format!("set_inode_field \"{name}\" {field} @{TIME}\n"));
        }
    }
    script
}

/// Read-only: a file system that would need a repair is a mistake made here.
fn check(device: &str) -> Result<()> {
    succeed(tool("e2fsck").args(["-f", "-n", device])).context("the file system is not sound")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk;
    use std::fs;

    /// The same list gives the same image, whatever mode and time the source has; and the files are in it.
    #[test]
    fn the_same_bits_every_time() {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("source");
        let list = dir.path().join("list");
        let text = format!(
            "dir /d 0750\nfile /d/f 04755 {}\nlink /d/l f\nnode /n 0600 c 5 1\n",
            source.display()
        );
        fs::write(&list, text).unwrap();
        let build = |name: &str| {
            fs::write(&source, "hello".repeat(1000)).unwrap();
            let image = dir.path().join(name);
            let size = disk::image_size(5000);
            disk::create(&image, size).unwrap();
            write(&Manifest::read(&list).unwrap(), &image, disk::PARTITION, size).unwrap();
            image
        };
        if run(&mut tool("mke2fs")).is_err() {
            eprintln!("SKIPPED: no e2fsprogs");
            return;
        }
        let first = build("first");
        fs::set_permissions(&source, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(1100)); // Ext4 times in whole seconds.
        let second = build("second");
        assert!(fs::read(&first).unwrap() == fs::read(&second).unwrap(), "the images differ");

        let device = format!("{}?offset={}", first.display(), disk::PARTITION);
        let ask = |command: &str| {
            let output = run(tool("debugfs").args(["-R", command, &device])).unwrap();
            String::from_utf8(output.stdout).unwrap()
        };
        assert_eq!(ask("cat /d/f"), "hello".repeat(1000));
        let stat = ask("stat /d/f");
        assert!(stat.contains("Mode:  04755") && stat.contains("User:     0"), "{stat}");
        assert!(ask("stat /d/l").contains("Fast link dest: \"f\""));
        assert!(ask("stat /n").contains("Type: character special"));
        assert!(ask("stat /d").contains("Mode:  0750"));
    }

    #[test]
    fn a_file_that_is_not_there_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        let size = disk::image_size(0);
        disk::create(&image, size).unwrap();
        let manifest = Manifest {
            entries: vec![Entry {
                path: "/f".into(),
                mode: 0o644,
                kind: Kind::File { source: "/no/such/file".into() },
            }],
        };
        if run(&mut tool("mke2fs")).is_err() {
            eprintln!("SKIPPED: no e2fsprogs");
            return;
        }
        assert!(write(&manifest, &image, disk::PARTITION, size).is_err());
    }
}
