// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Root file systems as the snapshotters give them, and volumes by `ctr`.

use std::fs;

use anyhow::{Result, ensure};
use ecr_tests::containerd::{Containerd, Runtime};

tests_on! {
    v1_6: V1_6, [a_plain_directory_is_a_root, binds_are_read_only_or_not];
    v1_7: V1_7, [
        a_plain_directory_is_a_root, binds_are_read_only_or_not, a_block_device_is_a_root,
        root_file_systems_can_be_mixed,
    ];
    v2: V2, [a_plain_directory_is_a_root, binds_are_read_only_or_not, a_block_device_is_a_root];
}

/// Writes, reads back, sees links and modes, and fills some space.
const USE_ROOT: &str = "set -e; echo data > /file; cat /file; mkdir /d; ln -s ../file /d/l; cat /d/l; \
                        chmod 640 /file; stat -c %a /file; dd if=/dev/zero of=/big bs=64k count=64 2>/dev/null; \
                        stat -c %s /big; rm -r /d /big /file; test -x /bin/busybox";
const USED_ROOT: &str = "data\ndata\n640\n4194304\n";

fn root_of(containerd: &Containerd, snapshotter: &str, id: &str) -> Result<()> {
    let options = ["--snapshotter", snapshotter];
    let said = containerd.run(Runtime::wanted(), &options, id, USE_ROOT)?.expect(0)?.text();
    ensure!(said == USED_ROOT, "{snapshotter}: {said}");
    Ok(())
}

/// Unpacks the image for `snapshotter`, too; only the default one has it.
fn unpack(containerd: &Containerd, snapshotter: &str) -> Result<()> {
    let archive = containerd.scratch().join("images.tar");
    ecr_tests::containerd::image::write_archive(&archive)?;
    let path = archive.display().to_string();
    let mut words = vec!["images", "import", "--snapshotter", snapshotter];
    if containerd.ctr(&["images", "import", "--help"])?.text().contains("--local") {
        words.push("--local"); // Else the transfer service unpacks it, and for its own snapshotter.
    }
    words.push(&path);
    containerd.ctr(&words)?.expect(0)?;
    fs::remove_file(archive)?;
    Ok(())
}

fn a_plain_directory_is_a_root(containerd: &mut Containerd) -> Result<()> {
    unpack(containerd, "native")?;
    root_of(containerd, "native", "t1")
}

fn a_block_device_is_a_root(containerd: &mut Containerd) -> Result<()> {
    unpack(containerd, "blockfile")?;
    root_of(containerd, "blockfile", "t1")?;
    if Runtime::wanted() == Runtime::Ecr {
        let options = ["--snapshotter", "blockfile"];
        let script = "grep ' / ' /proc/mounts";
        let said = containerd.run(Runtime::Ecr, &options, "t2", script)?.expect(0)?.text();
        ensure!(
            said.contains("ext4") && said.contains("/dev/"),
            "the root is no block device: {said}"
        );
    }
    Ok(())
}

fn root_file_systems_can_be_mixed(containerd: &mut Containerd) -> Result<()> {
    unpack(containerd, "native")?;
    unpack(containerd, "blockfile")?;
    for (n, snapshotter) in ["overlayfs", "native", "blockfile", "overlayfs"].iter().enumerate() {
        root_of(containerd, snapshotter, &format!("t{n}"))?;
    }
    Ok(())
}

fn binds_are_read_only_or_not(containerd: &mut Containerd) -> Result<()> {
    let files = containerd.scratch().join("files");
    fs::create_dir_all(&files)?;
    fs::write(files.join("file"), "from the host\n")?;
    let bind = |at: &str, option: &str| {
        format!("type=bind,src={},dst={at},options=rbind:{option}", files.display())
    };
    let (ro, rw) = (bind("/ro", "ro"), bind("/rw", "rw"));
    let options = ["--mount", ro.as_str(), "--mount", rw.as_str()];
    let script = "cat /ro/file; touch /ro/new 2>&1; echo back > /rw/new; cat /ro/new";
    let said = containerd.run(Runtime::wanted(), &options, "t1", script)?.expect(0)?.text();
    ensure!(said.starts_with("from the host\n"), "{said}");
    ensure!(said.contains("Read-only file system") && said.ends_with("back\n"), "{said}");
    ensure!(fs::read_to_string(files.join("new"))? == "back\n");
    Ok(())
}
