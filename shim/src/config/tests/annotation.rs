// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What annotations may change.

use super::*;

/// A machine whose every annotation is let in.
fn open(text: &str) -> Site {
    Site::machine(&format!("enable_annotations = ['.*']\n{text}"))
}

fn error(site: &Site, key: &str, value: &str) -> String {
    site.annotated(&[(key, value)]).unwrap_err().to_string()
}

#[test]
fn the_gate_is_an_unanchored_expression() {
    let site = Site::machine("enable_annotations = ['kernel', '^default_v.*s$', '(']");
    assert_eq!(
        error(&site, "hypervisor.enable_iommu", "true"),
        "annotation io.katacontainers.config.hypervisor.enable_iommu is not enabled"
    );
    let config = site
        .annotated(&[("hypervisor.default_vcpus", "2"), ("hypervisor.kernel_params", "x")])
        .unwrap();
    assert_eq!(config.hypervisor.default_vcpus, 2);
    assert_eq!(config.hypervisor.kernel_params, "x");
    // Even what nobody knows must be let in; agent and runtime need no leave.
    assert!(error(&site, "hypervisor.whatever", "").contains("is not enabled"));
    assert!(site.annotated(&[("runtime.whatever", ""), ("agent.whatever", "")]).is_ok());
    assert!(Site::machine("").annotated(&[("runtime.disable_guest_seccomp", "true")]).is_ok());
}

#[test]
fn booleans_and_numbers_are_read_as_go_does() {
    let site = open("");
    for (text, value) in [("1", true), ("t", true), ("TRUE", true), ("F", false), ("False", false)]
    {
        let config = site.annotated(&[("hypervisor.enable_hugepages", text)]).unwrap();
        assert_eq!(config.hypervisor.enable_hugepages, value, "{text}");
    }
    let full = "io.katacontainers.config.hypervisor.";
    for text in ["", "yes", "tRUE", " true"] {
        assert_eq!(
            error(&site, "hypervisor.enable_hugepages", text),
            format!(
                "Error parsing annotation for {full}enable_hugepages: Please specify boolean value 'true|false'"
            )
        );
    }
    for text in ["", "-1", "+1", "0x10", "1.5", "99999999999999999999"] {
        assert_eq!(
            error(&site, "hypervisor.default_vcpus", text),
            format!(
                "Error parsing annotation for {full}default_vcpus: Please specify positive numeric value"
            )
        );
    }
}

#[test]
fn sizes_are_measured_by_the_host() {
    let site = open("");
    let cases = [
        (
            "default_vcpus",
            "9",
            "Number of cpus 9 specified in annotation default_vcpus is greater than",
        ),
        (
            "default_max_vcpus",
            "9",
            "Number of cpus 9 in annotation default_maxvcpus is greater than",
        ),
        (
            "default_memory",
            "255",
            "Memory specified in annotation io.katacontainers.config.hypervisor.default_memory is less than minimum required 256",
        ),
        ("msize_9p", "0", "Please specify positive numeric value"),
    ];
    for (key, value, expected) in cases {
        let error = error(&site, &format!("hypervisor.{key}"), value);
        assert!(error.contains(expected), "{key}: {error}");
    }
    let config = site
        .annotated(&[
            ("hypervisor.default_vcpus", "8"),
            ("hypervisor.default_max_vcpus", "8"),
            ("hypervisor.default_memory", "256"),
            ("hypervisor.memory_slots", "0"),
            ("hypervisor.machine_type", ""),
        ])
        .unwrap();
    let machine = &config.hypervisor;
    assert_eq!((machine.default_vcpus, machine.default_memory, machine.memory_slots), (8, 256, 10));
}

#[test]
fn paths_are_those_that_a_pattern_stands_for() {
    let site = open(
        "valid_virtio_fs_daemon_paths = ['@/virtio*']\nvalid_entropy_sources = ['/dev/urandom', '', '[']",
    );
    let config = site.annotated(&[("hypervisor.virtio_fs_daemon", "@/virtiofsd")]).unwrap();
    assert_eq!(config.hypervisor.virtio_fs_daemon, Some(site.path("virtiofsd")));
    for (key, what) in [
        ("path", "hypervisor"),
        ("jailer_path", "jailer"),
        ("ctlpath", "hypervisor control"),
        ("virtio_fs_daemon", "virtiofs daemon"),
        ("vhost_user_store_path", "vhost store path"),
        ("entropy_source", "entropy source"),
        ("file_mem_backend", "file_mem_backend value"),
    ] {
        let error = error(&site, &format!("hypervisor.{key}"), "/bin/sh");
        assert_eq!(error, format!("{what} /bin/sh required from annotation is not valid"));
    }
    // Expanded on the host: what is not there is not allowed.
    assert!(error(&site, "hypervisor.virtio_fs_daemon", "@/virtiofs2").contains("is not valid"));
}

#[test]
fn assets_are_absolute_and_have_the_right_hash() {
    let site = open("");
    site.write("other", "abc");
    // FIPS 180-4's example.
    let hash = "ddaf35a193617abacc417349ae20413112e6fa4e89a97ea20a9eeee64b55d39a\
                2192992a274fc1a836ba3c23a3feebbd454d4423643ce80e2a9ac94fa54ca49f";
    let config = site
        .annotated(&[("hypervisor.kernel", "@/other"), ("hypervisor.kernel_hash", hash)])
        .unwrap();
    assert_eq!(config.hypervisor.kernel, site.path("other"));
    assert_eq!(error(&site, "hypervisor.kernel", "other"), "other is not an absolute path");
    assert!(error(&site, "hypervisor.kernel", "@/missing").contains("does not exist"));
    let wrong = [("hypervisor.kernel", "@/kernel"), ("hypervisor.kernel_hash", hash)];
    let refused = site.annotated(&wrong).unwrap_err().to_string();
    assert!(refused.contains("Invalid hash for"), "{refused}");
    let kind = ("io.katacontainers.asset_hash_type", "md5");
    let refused = site.annotated(&[wrong[0], wrong[1], kind]).unwrap_err().to_string();
    assert!(refused.contains("Invalid hash type md5"), "{refused}");
}

#[test]
fn an_initrd_takes_the_place_of_the_image() {
    let config = open("").annotated(&[("hypervisor.initrd", "@/initrd")]).unwrap();
    assert_eq!(config.hypervisor.image, None);
    assert!(config.hypervisor.initrd.is_some());
    let both = [("hypervisor.initrd", "@/initrd"), ("hypervisor.image", "@/image")];
    assert!(
        open("").annotated(&both).unwrap_err().to_string().contains("both an image and an initrd")
    );
}

#[test]
fn some_are_added_to_what_is_configured() {
    let site = open("kernel_params = 'a=1'\nvirtio_fs_extra_args = ['x']");
    let config = site
        .annotated(&[
            ("hypervisor.kernel_params", "b=2"),
            ("hypervisor.virtio_fs_extra_args", r#"["y", "z"]"#),
        ])
        .unwrap();
    assert_eq!(config.hypervisor.kernel_params, "a=1 b=2");
    assert_eq!(config.hypervisor.virtio_fs_extra_args, ["x", "y", "z"]);
    assert!(error(&site, "hypervisor.virtio_fs_extra_args", "y").contains("JSON list"));
}

#[test]
fn runtime_and_agent_are_changed_too() {
    let site = Site::machine("[agent.kata]\nkernel_modules = ['old']");
    let config = site
        .annotated(&[
            ("agent.kernel_modules", "e1000e InterruptThrottleRate=3000;i915 enable_ppgtt=0;"),
            ("agent.container_pipe_size", "4096"),
            ("runtime.sandbox_cgroup_only", "true"),
            ("runtime.internetworking_model", "none"),
            ("runtime.disable_new_netns", "true"),
            ("runtime.experimental", ""),
            ("io.katacontainers.enable_vcpus_pinning", "true"),
        ])
        .unwrap();
    assert_eq!(
        config.agent.kernel_modules,
        ["e1000e InterruptThrottleRate=3000", "i915 enable_ppgtt=0"]
    );
    assert_eq!(config.agent.container_pipe_size, 4096);
    assert!(config.runtime.sandbox_cgroup_only && config.runtime.enable_vcpus_pinning);
    assert_eq!(config.runtime.internetworking_model, NetModel::None);
    assert!(
        error(&site, "runtime.internetworking_model", "bridge").contains("Unknown type bridge")
    );
    assert!(
        error(&site, "runtime.experimental", "a b").contains("Unsupported experimental feature")
    );
    assert!(error(&site, "runtime.disable_new_netns", "1").contains("only works with 'none'"));
    assert!(error(&site, "agent.container_pipe_size", "4294967296").contains("whole number"));
}

#[test]
fn every_rule_has_a_key() {
    for (rules, table) in [
        (super::super::annotations::HYPERVISOR_RULES, Table::Hypervisor),
        (super::super::annotations::RUNTIME_RULES, Table::Runtime),
        (super::super::annotations::AGENT_RULES, Table::Agent),
    ] {
        for (name, _) in rules {
            let renamed = super::super::annotations::RENAMED.iter().find(|(from, _)| from == name);
            assert!(table.key(renamed.map_or(name, |(_, to)| to)).is_some(), "{name}");
        }
    }
}

#[test]
fn an_annotation_names_the_file() {
    let site = Site::machine("default_vcpus = 2");
    site.write("mine.toml", "[hypervisor.ecr]\nkernel = '@/kernel'\nimage = '@/image'\nvirtio_fs_daemon = 'x'\ndefault_vcpus = 3");
    let path = site.path("mine.toml").display().to_string();
    let annotations = HashMap::from([("io.katacontainers.config_path".to_owned(), path)]);
    let sources = Sources {
        host: HOST,
        ..Sources::of_sandbox(&annotations, Some(&site.path("configuration.toml"))).unwrap()
    };
    let config = Config::for_sandbox(&sources, &annotations).unwrap();
    assert_eq!(config.hypervisor.default_vcpus, 3);
}
