// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! containerd's configuration for tests, in the two formats that it has had: version 2 up to containerd 1.7, version
//! 3 since 2.0.

use std::path::{Path, PathBuf};

use super::Version;
use super::image::PAUSE;
use crate::place::{KERNEL, Place};

/// Where everything of one containerd is.
#[derive(Debug, Clone)]
pub struct Paths {
    /// All below is in it.
    pub directory: PathBuf,
    /// What containerd keeps.
    pub root: PathBuf,
    /// What containerd keeps while it runs.
    pub state: PathBuf,
    /// Its socket.
    pub socket: PathBuf,
    /// Our configuration.
    pub ecr: PathBuf,
    /// CNI's configuration.
    pub cni: PathBuf,
    /// An empty ext4 file system, which the blockfile snapshotter copies.
    pub empty_ext4: PathBuf,
}

impl Paths {
    /// All below `directory`.
    #[must_use]
    pub fn below(directory: &Path) -> Self {
        Self {
            directory: directory.to_owned(),
            root: directory.join("root"),
            state: directory.join("state"),
            socket: directory.join("containerd.sock"),
            ecr: directory.join("configuration.toml"),
            cni: directory.join("cni"),
            empty_ext4: directory.join("empty.ext4"),
        }
    }
}

/// Debian's CNI plugins.
pub const CNI_PLUGINS: &str = "/usr/lib/cni";

/// The network of the tests' pods: a bridge on the host, which is its gateway.
#[must_use]
pub fn network(bridge: &str, paths: &Paths) -> String {
    let leases = paths.directory.join("leases").display().to_string();
    format!(
        r#"{{
  "cniVersion": "0.4.0", "name": "ecr-tests",
  "plugins": [{{
    "type": "bridge", "bridge": "{bridge}", "isGateway": true, "hairpinMode": true,
    "ipam": {{ "type": "host-local", "dataDir": "{leases}",
               "ranges": [[{{ "subnet": "198.18.77.0/24" }}]], "routes": [{{ "dst": "0.0.0.0/0" }}] }}
  }}]
}}
"#
    )
}

/// Seconds that an agent has: for ten guests that boot at once on an emulated host of one processor.
pub const DIAL_TIMEOUT: u32 = 480;

/// What a user reads, so that it is tested.
const DOCUMENTATION: &str = include_str!("../../../docs/containerd.md");
/// Where `tools/dev install` puts our configuration.
const INSTALLED: &str = "/etc/ecr/configuration.toml";

/// Where Debian has virtiofsd.
const VIRTIOFSD: &str = "/usr/libexec/virtiofsd";

/// Our own configuration: the built guest, as small as it may be; virtiofsd, as handed in, or Debian's. `more` is put
/// in place of a line that sets the same key, or added to the table `[hypervisor.ecr]`.
#[must_use]
pub fn ecr(place: &Place, more: &[&str]) -> String {
    let handed_in = place.file("virtiofsd");
    let daemon = if handed_in.exists() { handed_in } else { PathBuf::from(VIRTIOFSD) };
    let daemon = daemon.display();
    let (kernel, image) = (place.guest(KERNEL), place.guest("rootfs.img"));
    let lines = [
        format!("kernel = \"{}\"", kernel.display()),
        format!("image = \"{}\"", image.display()),
        "default_vcpus = 1".to_owned(),
        "default_memory = 256".to_owned(),
        "shared_fs = \"virtio-fs\"".to_owned(),
        format!("virtio_fs_daemon = \"{daemon}\""),
        format!("valid_virtio_fs_daemon_paths = [\"{daemon}\"]"),
        "virtio_fs_cache = \"auto\"".to_owned(),
        "block_device_driver = \"virtio-blk\"".to_owned(),
        "enable_annotations = [\"default_memory\", \"default_vcpus\"]".to_owned(),
    ];
    let key = |line: &str| line.split('=').next().unwrap_or_default().trim().to_owned();
    let kept = lines.iter().filter(|line| !more.iter().any(|other| key(other) == key(line)));
    let machine: Vec<&str> = kept.map(String::as_str).chain(more.iter().copied()).collect();
    format!(
        r#"[hypervisor.ecr]
{}
[agent.kata]
dial_timeout = {DIAL_TIMEOUT}
[runtime]
internetworking_model = "tcfilter"
sandbox_cgroup_only = true
enable_debug = {}
"#,
        machine.join("\n"),
        std::env::var("ECR_TEST_LOG").is_ok_and(|level| level == "debug")
    )
}

/// containerd's own configuration.
#[must_use]
pub fn containerd(version: Version, paths: &Paths) -> String {
    let show = |path: &Path| path.display().to_string();
    let (root, state, socket) = (show(&paths.root), show(&paths.state), show(&paths.socket));
    let (opt, blocks) = (show(&paths.directory.join("opt")), show(&paths.root.join("blocks")));
    let (scratch, cni, ecr) = (show(&paths.empty_ext4), show(&paths.cni), show(&paths.ecr));
    let disabled = r#"disabled_plugins = [
  "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs",
  "io.containerd.snapshotter.v1.erofs", "io.containerd.differ.v1.erofs",
  "io.containerd.internal.v1.tracing", "io.containerd.tracing.processor.v1.otlp",
]"#;
    let blockfile = match version {
        Version::V1_6 => String::new(),
        _ => format!(
            r#"[plugins."io.containerd.snapshotter.v1.blockfile"]
root_path = "{blocks}"
scratch_file = "{scratch}"
fs_type = "ext4"
mount_options = []
"#
        ),
    };
    let common = format!(
        r#"root = "{root}"
state = "{state}"
{disabled}
[grpc]
address = "{socket}"
[plugins."io.containerd.internal.v1.opt"]
path = "{opt}"
{blockfile}"#
    );
    let ours = documented(version, &ecr);
    let runtimes = |plugin: &str| {
        format!(
            r#"[plugins."{plugin}".containerd]
default_runtime_name = "runc"
[plugins."{plugin}".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
{ours}"#
        )
    };
    match version {
        Version::V1_6 | Version::V1_7 => {
            let cri = "io.containerd.grpc.v1.cri";
            let runtimes = runtimes(cri);
            format!(
                r#"version = 2
{common}[plugins."{cri}"]
sandbox_image = "{PAUSE}"
restrict_oom_score_adj = true
netns_mounts_under_state_dir = true
[plugins."{cri}".cni]
bin_dir = "{CNI_PLUGINS}"
conf_dir = "{cni}"
{runtimes}"#
            )
        }
        Version::V2 => {
            let (images, cri) = ("io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime");
            let runtimes = runtimes(cri);
            format!(
                r#"version = 3
{common}[plugins."{images}".pinned_images]
sandbox = "{PAUSE}"
[plugins."io.containerd.nri.v1.nri"]
disable = true
[plugins."{cri}"]
restrict_oom_score_adj = true
netns_mounts_under_state_dir = true
[plugins."{cri}".cni]
bin_dirs = ["{CNI_PLUGINS}"]
conf_dir = "{cni}"
{runtimes}"#
            )
        }
    }
}

/// The tables that the documentation adds to containerd's configuration, with our configuration file in them.
fn documented(version: Version, ecr: &str) -> String {
    let format = match version {
        Version::V1_6 | Version::V1_7 => "# version = 2\n",
        Version::V2 => "# version = 3\n",
    };
    let tables = DOCUMENTATION
        .split_once(format)
        .and_then(|(_, rest)| rest.split_once("```"))
        .map(|(tables, _)| tables)
        .unwrap_or_default();
    assert!(tables.contains(INSTALLED), "docs/containerd.md has no tables under {format:?}");
    tables.replace(INSTALLED, ecr)
}
