// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Configuration files and annotations, from text to effect.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::*;
use crate::error::Kind;

mod annotation;
mod document;

const HOST: HostFacts = HostFacts { cpus: 8, memory_mib: 16384 };

/// A directory with a configuration file and the files that it may name.
struct Site {
    directory: TempDir,
}

impl Site {
    /// `text` is the configuration file. `@` in it stands for the directory.
    fn new(text: &str) -> Self {
        let site = Self { directory: TempDir::new().unwrap() };
        for name in ["kernel", "image", "initrd", "virtiofsd"] {
            site.write(name, "content");
        }
        site.write("configuration.toml", text);
        site
    }

    /// A machine with an image, and `text` in the hypervisor's table.
    fn machine(text: &str) -> Self {
        Self::new(&format!(
            "[hypervisor.qemu]\nkernel = '@/kernel'\nimage = '@/image'\nvirtio_fs_daemon = '@/virtiofsd'\n{text}"
        ))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().canonicalize().unwrap().join(name)
    }

    fn expand(&self, text: &str) -> String {
        text.replace('@', self.path("").to_str().unwrap().trim_end_matches('/'))
    }

    fn write(&self, name: &str, text: &str) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, self.expand(text)).unwrap();
    }

    fn sources(&self) -> Sources {
        Sources {
            annotation: None,
            task_option: None,
            environment: None,
            defaults: vec![self.path("none.toml"), self.path("configuration.toml")],
            host: HOST,
        }
    }

    fn load(&self) -> Config {
        load(&self.sources()).unwrap()
    }

    fn error(&self) -> String {
        load(&self.sources()).unwrap_err().to_string()
    }

    fn annotated(&self, annotations: &[(&str, &str)]) -> Result<Config> {
        let annotations = annotations
            .iter()
            .map(|&(key, value)| (self.prefixed(key), self.expand(value)))
            .collect::<HashMap<_, _>>();
        Config::for_sandbox(&self.sources(), &annotations)
    }

    fn prefixed(&self, key: &str) -> String {
        if key.starts_with("io.") { key.into() } else { format!("io.katacontainers.config.{key}") }
    }
}

#[test]
fn the_shipped_file_is_usable_and_has_no_idle_key() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("configuration.toml");
    let sources = Sources { annotation: Some(path), ..Site::new("").sources() };
    let config = read(&sources).unwrap();
    assert_eq!(config.not_honoured(), [""; 0]);
    assert_eq!(config.hypervisor.image, Some("/usr/share/ecr/ecr-containers.img".into()));
}

#[test]
fn defaults_are_as_documented() {
    let config = Site::machine("").load();
    let machine = &config.hypervisor;
    assert_eq!((machine.default_vcpus, machine.default_maxvcpus), (1, 8));
    assert_eq!((machine.default_memory, machine.default_maxmemory), (2048, 16384));
    assert_eq!((machine.memory_slots, machine.default_bridges), (10, 1));
    assert_eq!(machine.entropy_source, Path::new("/dev/urandom"));
    assert_eq!(machine.machine_type, MACHINE_TYPE);
    assert_eq!(machine.virtio_fs_cache, VirtioFsCache::Never);
    assert_eq!(config.agent.dial_timeout, 30);
    assert_eq!(config.runtime.internetworking_model, NetModel::TcFilter);
    assert!(!config.runtime.sandbox_cgroup_only);
    assert_eq!(config.factory.template_path, Path::new("/run/vc/vm/template"));
    assert_eq!(config.not_honoured(), [""; 0]);
}

#[test]
fn numbers_are_clamped() {
    type Get = fn(&Config) -> u64;
    let cases: &[(&str, Get, u64)] = &[
        ("default_vcpus = 0", |c| c.hypervisor.default_vcpus.into(), 1),
        ("default_vcpus = -1", |c| c.hypervisor.default_vcpus.into(), 8),
        ("default_vcpus = 99", |c| c.hypervisor.default_vcpus.into(), 8),
        ("default_vcpus = 1.5", |c| c.hypervisor.default_vcpus.into(), 2),
        ("default_vcpus = 6\ndefault_maxvcpus = 4", |c| c.hypervisor.default_vcpus.into(), 4),
        ("default_maxvcpus = 99", |c| c.hypervisor.default_maxvcpus.into(), 8),
        ("default_memory = 255", |c| c.hypervisor.default_memory, 2048),
        ("default_memory = 256", |c| c.hypervisor.default_memory, 256),
        ("default_maxmemory = 99999", |c| c.hypervisor.default_maxmemory, 16384),
        ("default_maxmemory = 1024", |c| c.hypervisor.default_maxmemory, 2048),
        ("memory_slots = 0", |c| c.hypervisor.memory_slots.into(), 10),
        ("default_bridges = 0", |c| c.hypervisor.default_bridges.into(), 1),
        ("default_bridges = 9", |c| c.hypervisor.default_bridges.into(), 5),
        ("msize_9p = 0", |c| c.hypervisor.msize_9p.into(), 8192),
        (
            "net_rate_limiter_bw_one_time_burst = 5",
            |c| c.hypervisor.net_rate_limiter_bw_one_time_burst.try_into().unwrap(),
            0,
        ),
        ("[agent.kata]\ndial_timeout = 0", |c| c.agent.dial_timeout.into(), 30),
    ];
    for &(text, get, expected) in cases {
        assert_eq!(get(&Site::machine(text).load()), expected, "{text}");
    }
}

#[test]
fn what_cannot_work_is_refused() {
    let cases: &[(&str, &str)] = &[
        ("initrd = '@/initrd'", "having both an image and an initrd defined"),
        ("shared_fs = 'nfs'", "Invalid hypervisor shared file system nfs specified"),
        ("block_device_driver = 'ide'", "Invalid hypervisor block storage driver ide specified"),
        ("block_device_aio = 'fast'", "Invalid hypervisor block storage I/O mechanism fast"),
        ("machine_type = 'pc'", "unrecognised machinetype: pc"),
        ("enable_vhost_user_store = true", "Vhost-user-blk/scsi is enabled without HugePages"),
        ("pcie_root_port = 17", "pcie_root_port = 17 is more than 16"),
        ("indep_iothreads = 51", "indep_iothreads = 51 is more than 50"),
        ("block_device_logical_sector_size = 513", "expected 0 or a power of two"),
        (
            "block_device_logical_sector_size = 4096\nblock_device_physical_sector_size = 512",
            "is more than block_device_physical_sector_size",
        ),
        ("hot_plug_vfio = 'root-port'\ncold_plug_vfio = 'root-port'", "exclude each other"),
        ("virtio_fs_queue_size = 100", "no size of a queue"),
        ("virtio_fs_tag = 'a-tag-of-more-than-thirty-six-bytes-is-none'", "is no tag"),
        ("[factory]\nenable_template = true", "enable_template requires an initrd image"),
        ("[runtime]\ninternetworking_model = 'x'", "Unknown type x"),
        ("[runtime]\ndisable_new_netns = true", "only works with 'none' internetworking_model"),
        ("[runtime]\nexperimental = ['warp']", "Unsupported experimental feature \"warp\""),
        ("[runtime]\nsandbox_bind_mounts = ['/no/such']", "file /no/such does not exist"),
        ("[runtime]\nsandbox_bind_mounts = ['@/kernel', '@/./kernel']", "two paths end in kernel"),
    ];
    for &(text, expected) in cases {
        let error = Site::machine(text).error();
        assert!(error.contains(expected), "{text}: {error}");
    }
    let error = Site::new("[hypervisor.qemu]\nkernel = '@/kernel'\nimage = '@/image'").error();
    assert!(error.contains("cannot enable virtio-fs without daemon path in configuration file"));
    let error = Site::new("[hypervisor.qemu]\nkernel = '@/kernel'").error();
    assert!(error.contains("image or initrd must be defined"), "{error}");
}

#[test]
fn assets_must_be_there_and_have_a_size() {
    let base = "[hypervisor.qemu]\nvirtio_fs_daemon = 'x'\n";
    let site = Site::new(&format!("{base}kernel = '@/nothing'\nimage = '@/image'"));
    let error = site.error();
    assert!(error.contains(&site.expand("file @/nothing does not exist")), "{error}");
    assert!(error.contains("configuration.toml:3"), "{error}");

    let site = Site::new(&format!("{base}kernel = '@/kernel'\nimage = '@/empty'"));
    site.write("empty", "");
    assert!(site.error().contains(&site.expand("image \"@/empty\" is empty")), "{}", site.error());

    let site =
        Site::new(&format!("{base}kernel = '@/kernel'\ninitrd = '@/initrd'\ndefault_memory = 256"));
    let initrd = fs::File::create(site.path("initrd")).unwrap();
    initrd.set_len(256 << 20).unwrap();
    assert!(site.error().contains("VM memory (256MB) <= size of initrd"), "{}", site.error());
}

#[test]
fn symbolic_links_are_resolved() {
    let site = Site::machine("");
    fs::remove_file(site.path("kernel")).unwrap();
    site.write("kernel-6.1", "content");
    std::os::unix::fs::symlink("kernel-6.1", site.path("kernel")).unwrap();
    assert_eq!(site.load().hypervisor.kernel, site.path("kernel-6.1"));
}

#[test]
fn what_has_no_effect_is_reported_with_its_origin() {
    let config = Site::machine("rootless = true\ncpu_features = 'pmu=off'\npath = '/usr/bin/qemu'\nblock_device_driver = 'virtio-scsi'\nenable_virtio_mem = false").load();
    let lines = config.not_honoured();
    assert_eq!(lines.len(), 2, "{lines:?}");
    assert!(
        lines[0]
            .contains("hypervisor.ecr.block_device_driver = \"virtio-scsi\" is not honoured yet")
    );
    assert!(lines[1].contains("hypervisor.ecr.rootless = true is not honoured yet"), "{lines:?}");
    assert!(lines[1].contains("configuration.toml:5"), "{lines:?}");
}

#[test]
fn kernel_parameters_are_in_order() {
    let text = "kernel_params = 'a=1 b'\nenable_debug = true\ndefault_maxvcpus = 3\n\
                [agent.kata]\nenable_debug = true\nenable_tracing = true\ncontainer_pipe_size = 9\ndebug_console_enabled = true";
    let config = Site::machine(text).load();
    let line = kernel_cmdline(&config, Root::Nvdimm);
    let expected = "root=/dev/pmem0p1 rootflags=dax,data=ordered,errors=remount-ro ro rootfstype=ext4 \
         console=hvc0 console=hvc1 debug systemd.show_status=true systemd.log_level=debug panic=1 nr_cpus=3 \
         systemd.unit=kata-containers.target systemd.mask=systemd-networkd.service \
         systemd.mask=systemd-networkd.socket agent.log=debug agent.trace=true agent.container_pipe_size=9 \
         agent.debug_console agent.debug_console_vport=1026 a=1 b";
    assert!(line.trim_end_matches(" fips=1").ends_with(expected), "{line}");
    if cfg!(target_arch = "x86_64") {
        assert!(
            line.starts_with(
                "tsc=reliable no_timer_check rcupdate.rcu_expedited=1 i8042.direct=1 "
            )
        );
        assert!(line.contains("net.ifnames=0 pci=lastbus=0 root="), "{line}");
    }

    let config =
        Site::machine("use_legacy_serial = true\nblock_device_driver = 'virtio-scsi'").load();
    let line = kernel_cmdline(&config, Root::VirtioBlk);
    assert!(line.contains(" root=/dev/vda1 rootflags=data=ordered,errors=remount-ro ro rootfstype=ext4 console=ttyS0 quiet systemd.show_status=false panic=1 nr_cpus=8 systemd"));
    assert!(line.contains("scsi_mod.scan=none"), "{line}");
    let line = kernel_cmdline(&config, Root::Initrd);
    assert!(!line.contains("root=") && !line.contains("systemd.unit"), "{line}");
}

#[test]
fn a_machine_is_sized_by_what_its_containers_will_ask_for() {
    let annotations = HashMap::from(
        [
            ("io.kubernetes.cri.sandbox-cpu-period", "100000"),
            ("io.kubernetes.cri.sandbox-cpu-quota", "250000"),
            ("io.kubernetes.cri.sandbox-memory", "1073741824"),
        ]
        .map(|(key, value)| (key.to_owned(), value.to_owned())),
    );
    let requested = requested_by_annotations(&annotations);
    assert_eq!(requested, Sizing { vcpus: 3, memory_mib: 1024 });
    let dynamic = Site::machine("").load();
    assert_eq!(dynamic.boot_size(requested), Sizing { vcpus: 1, memory_mib: 2048 });
    let fixed = Site::machine("[runtime]\nstatic_sandbox_resource_mgmt = true").load();
    assert_eq!(fixed.boot_size(requested), Sizing { vcpus: 4, memory_mib: 3072 });
    let much = Sizing { vcpus: 99, memory_mib: 999_999 };
    assert_eq!(fixed.boot_size(much), Sizing { vcpus: 8, memory_mib: 16384 });

    let odd = |quota: &str| {
        let mut annotations = annotations.clone();
        annotations.insert("io.kubernetes.cri.sandbox-cpu-quota".into(), quota.into());
        requested_by_annotations(&annotations).vcpus
    };
    assert_eq!((odd("-1"), odd("x"), odd("0"), odd("1")), (0, 0, 0, 1));
    assert_eq!(requested_by_annotations(&HashMap::new()), Sizing::default());

    let resources: oci_spec::runtime::LinuxResources = serde_json::from_str(
        r#"{"cpu":{"quota":150000,"period":100000},"memory":{"limit":3145728}}"#,
    )
    .unwrap();
    assert_eq!(requested_by_resources(&resources), Sizing { vcpus: 2, memory_mib: 3 });
}

#[test]
fn the_effective_configuration_tells_origins() {
    let site = Site::machine(
        "default_vcpus = 99\nenable_annotations = ['enable_debug', 'default_memory']",
    );
    site.write("config.d/10-debug", "[agent.kata]\nenable_debug = true\n");
    let config = site.annotated(&[("hypervisor.default_memory", "512")]).unwrap();
    let text = config.describe(false);
    for line in [
        "# @/configuration.toml\n",
        "kernel = \"@/kernel\" # @/configuration.toml:2\n",
        "default_vcpus = 8 # @/configuration.toml:5; asked for: 99\n",
        "default_memory = 512 # annotation io.katacontainers.config.hypervisor.default_memory\n",
        "\n[agent.kata]\nenable_debug = true # @/config.d/10-debug:2\n",
    ] {
        assert!(text.contains(&site.expand(line)), "{line}:\n{text}");
    }
    assert!(!text.contains("memory_slots"));
    let text = config.describe(true);
    assert!(text.contains("memory_slots = 10 # default\n"), "{text}");
    // What is printed is a configuration file again.
    let again = Site::new(&text);
    assert_eq!(again.load().hypervisor, config.hypervisor);
}

/// How `docs/configuration.md` begins the row of a key.
#[cfg(target_arch = "x86_64")]
fn reference_row(key: &Key, default: &Config) -> String {
    let effect = match key.honoured {
        Honoured::Yes => "yes".to_owned(),
        Honoured::No => "not yet".to_owned(),
        Honoured::Moot => "none needed".to_owned(),
        Honoured::Only(words) => {
            let words: Vec<_> = words.iter().map(|word| format!("`{word:?}`")).collect();
            format!("only {}", words.join(", "))
        }
    };
    format!("| `{}` | `{}` | {effect} |", key.name, (key.get)(default))
}

/// The reference shows the defaults of x86_64.
#[cfg(target_arch = "x86_64")]
#[test]
fn the_reference_is_true() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/configuration.md");
    let reference = fs::read_to_string(path).unwrap();
    let default = Config::default();
    let missing: Vec<_> = all_keys()
        .map(|key| reference_row(key, &default))
        .filter(|row| !reference.lines().any(|line| line.starts_with(row)))
        .collect();
    assert!(missing.is_empty(), "docs/configuration.md lacks\n{}", missing.join("\n"));
}

#[test]
fn errors_of_configuration_blame_the_caller() {
    let site = Site::machine("machine_type = 'pc'");
    assert_eq!(load(&site.sources()).unwrap_err().kind(), Kind::InvalidArgument);
}
