// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Images made on the spot, without a registry: an OCI image layout in a tar archive, as `ctr images import` takes it.
//!
//! Both images have one layer, Debian's static busybox with a link for each of its commands. Nothing in an archive
//! depends on time, user or order of a directory, so the same busybox gives the same bytes and digests.
//! (OCI image specification 1.0: "Image Layout", "Image Manifest", "Image Configuration"; POSIX ustar.)

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// The image that containers run.
pub const BUSYBOX: &str = "localhost/busybox:dev";
/// The image that keeps a pod's sandbox.
pub const PAUSE: &str = "localhost/pause:dev";
/// Runs the shell script that follows.
pub const BUSYBOX_SHELL: [&str; 2] = ["/bin/sh", "-c"];

/// Sleeps until it is told to end. A shell, since the first process of a pid namespace ignores signals that it does
/// not handle.
const PAUSE_SCRIPT: &str = "trap 'exit 0' TERM INT; while :; do sleep 3600 & wait; done";

const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n";
const GROUP: &str = "root:x:0:\nnogroup:x:65534:\n";

/// Writes an archive with both images to `path`.
///
/// # Errors
/// There is no busybox (Debian: busybox-static), or the archive cannot be written.
pub fn write_archive(path: &Path) -> Result<()> {
    let layer = busybox_layer()?;
    let mut layout = Layout::default();
    let layer = layout.blob("application/vnd.oci.image.layer.v1.tar", &layer);
    layout.image(BUSYBOX, &layer, &json!(["/bin/sh"]));
    layout.image(PAUSE, &layer, &json!(["/bin/sh", "-c", PAUSE_SCRIPT]));
    fs::write(path, layout.archive()?).with_context(|| format!("write {}", path.display()))
}

fn busybox() -> Result<PathBuf> {
    ["/bin/busybox", "/usr/bin/busybox"]
        .into_iter()
        .map(PathBuf::from)
        .find(|path| path.exists())
        .context("there is no /bin/busybox (Debian: busybox-static)")
}

fn busybox_layer() -> Result<Vec<u8>> {
    let busybox = busybox()?;
    let output = Command::new(&busybox).arg("--list").output()?;
    ensure!(output.status.success(), "busybox --list: {}", output.status);
    let commands = String::from_utf8(output.stdout)?;
    let mut tar = Tar::default();
    for directory in ["bin", "dev", "etc", "proc", "root", "run", "sys", "tmp", "var"] {
        tar.directory(directory)?;
    }
    tar.file("bin/busybox", 0o755, &fs::read(&busybox)?)?;
    let mut commands: Vec<&str> = commands.lines().filter(|name| *name != "busybox").collect();
    commands.sort_unstable();
    for command in commands {
        tar.link(&format!("bin/{command}"), "busybox")?;
    }
    tar.file("etc/group", 0o644, GROUP.as_bytes())?;
    tar.file("etc/passwd", 0o644, PASSWD.as_bytes())?;
    Ok(tar.end())
}

/// An image layout that grows.
#[derive(Default)]
struct Layout {
    blobs: Vec<(String, Vec<u8>)>,
    manifests: Vec<Value>,
}

impl Layout {
    /// Adds a blob; returns its descriptor.
    fn blob(&mut self, media_type: &str, content: &[u8]) -> Value {
        let digest: String =
            Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect();
        let descriptor = json!({
            "mediaType": media_type, "digest": format!("sha256:{digest}"), "size": content.len(),
        });
        if !self.blobs.iter().any(|(name, _)| *name == digest) {
            self.blobs.push((digest, content.to_vec()));
        }
        descriptor
    }

    /// Adds an image of one uncompressed layer.
    fn image(&mut self, name: &str, layer: &Value, entry: &Value) {
        let architecture = match std::env::consts::ARCH {
            "aarch64" => "arm64",
            _ => "amd64",
        };
        let config = json!({
            "architecture": architecture, "os": "linux",
            "config": { "Cmd": entry, "Env": ["PATH=/bin"], "WorkingDir": "/" },
            "rootfs": { "type": "layers", "diff_ids": [layer["digest"]] },
        });
        let config =
            self.blob("application/vnd.oci.image.config.v1+json", config.to_string().as_bytes());
        let media_type = "application/vnd.oci.image.manifest.v1+json";
        let manifest = json!({
            "schemaVersion": 2, "mediaType": media_type, "config": config, "layers": [layer],
        });
        let mut manifest = self.blob(media_type, manifest.to_string().as_bytes());
        manifest["annotations"] = json!({ "io.containerd.image.name": name });
        self.manifests.push(manifest);
    }

    fn archive(self) -> Result<Vec<u8>> {
        let mut tar = Tar::default();
        tar.directory("blobs")?;
        tar.directory("blobs/sha256")?;
        for (digest, content) in &self.blobs {
            tar.file(&format!("blobs/sha256/{digest}"), 0o644, content)?;
        }
        let index = json!({ "schemaVersion": 2, "manifests": self.manifests });
        tar.file("index.json", 0o644, index.to_string().as_bytes())?;
        tar.file("oci-layout", 0o644, br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        Ok(tar.end())
    }
}

/// A ustar archive that grows; everything in it is root's and of the year 1970.
#[derive(Default)]
struct Tar(Vec<u8>);

impl Tar {
    const BLOCK: usize = 512;

    fn directory(&mut self, name: &str) -> Result<()> {
        self.header(&format!("{name}/"), b'5', 0o755, 0, "")
    }

    fn link(&mut self, name: &str, target: &str) -> Result<()> {
        self.header(name, b'2', 0o777, 0, target)
    }

    fn file(&mut self, name: &str, mode: u32, content: &[u8]) -> Result<()> {
        self.header(name, b'0', mode, content.len(), "")?;
        self.0.extend_from_slice(content);
        self.0.resize(self.0.len().next_multiple_of(Self::BLOCK), 0);
        Ok(())
    }

    fn header(&mut self, name: &str, kind: u8, mode: u32, size: usize, link: &str) -> Result<()> {
        ensure!(name.len() <= 100 && link.len() <= 100, "{name}: too long a name for ustar");
        let mut header = [0; Self::BLOCK];
        let mut put = |at: usize, text: &[u8]| header[at..at + text.len()].copy_from_slice(text);
        put(0, name.as_bytes());
        put(100, format!("{mode:07o}").as_bytes());
        put(108, b"0000000");
        put(116, b"0000000");
        put(124, format!("{size:011o}").as_bytes());
        put(136, b"00000000000");
        put(148, b"        "); // The checksum counts itself as blanks.
        put(156, &[kind]);
        put(157, link.as_bytes());
        put(257, b"ustar\x0000");
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        self.0.extend_from_slice(&header);
        Ok(())
    }

    fn end(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 2 * Self::BLOCK, 0);
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tar_reads_what_is_written() {
        let work = tempfile::tempdir().unwrap();
        let mut tar = Tar::default();
        tar.directory("d").unwrap();
        tar.file("d/f", 0o640, b"content").unwrap();
        tar.link("d/l", "f").unwrap();
        fs::write(work.path().join("a.tar"), tar.end()).unwrap();
        let status =
            Command::new("tar").args(["-xf", "a.tar"]).current_dir(&work).status().unwrap();
        assert!(status.success());
        assert_eq!(fs::read(work.path().join("d/l")).unwrap(), b"content");
    }

    #[test]
    fn a_layout_names_what_it_holds() {
        let mut layout = Layout::default();
        let layer = layout.blob("layer", b"x");
        layout.image("a", &layer, &json!(["/a"]));
        layout.image("b", &layer, &json!(["/b"]));
        assert_eq!(layout.blobs.len(), 5, "the layer is there once");
        for manifest in &layout.manifests {
            let digest = manifest["digest"].as_str().unwrap().trim_start_matches("sha256:");
            assert!(layout.blobs.iter().any(|(name, _)| name == digest));
        }
    }
}
