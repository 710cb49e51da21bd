// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Which file is read, and how files are merged.

use super::*;

#[test]
fn the_first_name_counts() {
    let site = Site::machine("default_vcpus = 2");
    for (name, vcpus) in [("annotation", 3), ("option", 4), ("environment", 5)] {
        site.write(&format!("{name}.toml"), &format!("[hypervisor.ecr]\nkernel = '@/kernel'\nimage = '@/image'\nvirtio_fs_daemon = 'x'\ndefault_vcpus = {vcpus}"));
    }
    let mut sources = site.sources();
    let vcpus = |sources: &Sources| load(sources).unwrap().hypervisor.default_vcpus;
    assert_eq!(vcpus(&sources), 2);
    sources.environment = Some(site.path("environment.toml"));
    assert_eq!(vcpus(&sources), 5);
    sources.task_option = Some(site.path("option.toml"));
    assert_eq!(vcpus(&sources), 4);
    sources.annotation = Some(site.path("annotation.toml"));
    assert_eq!(vcpus(&sources), 3);
    sources.annotation = Some(site.path("missing.toml"));
    let error = load(&sources).unwrap_err().to_string();
    assert_eq!(error, site.expand("file @/missing.toml does not exist"));
}

#[test]
fn without_any_file_the_places_are_named() {
    let mut sources = Site::new("").sources();
    sources.defaults = vec!["/no/such/1".into(), "/no/such/2".into()];
    let error = load(&sources).unwrap_err().to_string();
    assert!(error.starts_with("Cannot find usable config file"), "{error}");
    assert!(error.contains("/no/such/1, /no/such/2"), "{error}");
}

#[test]
fn broken_files_are_told_by_file_line_and_key() {
    for (text, expected) in [
        ("[runtime]\nenable_debug = \n", "configuration.toml:2: "),
        ("[runtime\n", "configuration.toml:1: "),
        (
            "\n[hypervisor.qemu]\ndefault_vcpus = 'two'",
            "configuration.toml:3: hypervisor.qemu.default_vcpus: expected a number of vCPUs, found string \"two\"",
        ),
        (
            "[hypervisor.qemu]\nenable_debug = 1",
            "configuration.toml:2: hypervisor.qemu.enable_debug: expected a boolean, found integer 1",
        ),
        ("[hypervisor.ecr]\nmemory_slots = -1", "expected a whole number from 0 to"),
        ("[hypervisor.ecr]\ndefault_maxmemory = 1.5", "expected a whole number, 0 or more"),
        ("[hypervisor.ecr]\npflashes = 'x'", "expected a list of strings, found string"),
        (
            "[hypervisor.ecr]\npflashes = [1]",
            "hypervisor.ecr.pflashes: expected a string, found integer 1",
        ),
        ("[agent.kata]\nenable_debug = true\nenable_debug = false", "configuration.toml:3: "),
        ("runtime = 3", "runtime: expected a table, found integer"),
        ("hypervisor = 3", "hypervisor: expected a table"),
        ("[hypervisor]\nqemu = 3", "hypervisor.qemu: expected a table"),
        ("[agent]\nkata = 3", "agent.kata: expected a table"),
    ] {
        let error = Site::new(text).error();
        assert!(error.contains(expected), "{text}: {error}");
    }
}

#[test]
fn drop_ins_replace_key_by_key_in_the_order_of_their_names() {
    let site = Site::machine(
        "default_vcpus = 2\nmemory_slots = 4\nvirtio_fs_extra_args = ['a', 'b']\n[runtime]\nenable_debug = true",
    );
    site.write("config.d/20", "[hypervisor.qemu]\ndefault_vcpus = 4\nvirtio_fs_extra_args = ['c']");
    site.write(
        "config.d/10",
        "[hypervisor.qemu]\ndefault_vcpus = 3\n[runtime]\nsandbox_cgroup_only = true",
    );
    site.write("config.d/directory/ignored", "garbage");
    let config = site.load();
    assert_eq!(config.hypervisor.default_vcpus, 4);
    assert_eq!(config.hypervisor.memory_slots, 4);
    assert_eq!(config.hypervisor.virtio_fs_extra_args, ["c"]);
    assert!(config.runtime.enable_debug && config.runtime.sandbox_cgroup_only);
}

#[test]
fn drop_ins_lie_beside_the_resolved_file() {
    let site = Site::machine("");
    site.write("elsewhere/config.d/10", "garbage");
    site.write("config.d/10", "[hypervisor.ecr]\ndefault_vcpus = 3");
    std::os::unix::fs::symlink("../configuration.toml", site.path("elsewhere/link.toml")).unwrap();
    let mut sources = site.sources();
    sources.task_option = Some(site.path("elsewhere/link.toml"));
    let config = load(&sources).unwrap();
    assert_eq!(config.hypervisor.default_vcpus, 3);
    assert_eq!(config.path, site.path("configuration.toml"));
}

#[test]
fn unknown_keys_are_errors_where_they_are_typing_mistakes() {
    let unknown = "no_such_key = 1";
    Site::machine(&format!("{unknown}\n[agent.kata]\n{unknown}\n[runtime]\n{unknown}\n[x]\ny = 1"))
        .load();
    for (text, refused) in [
        (format!("[hypervisor.qemu]\n{unknown}"), true),
        (format!("[agent.kata]\n{unknown}"), true),
        (format!("[runtime]\n{unknown}"), false),
        (format!("[factory]\n{unknown}\n[x]\ny = 1"), false),
    ] {
        let site = Site::machine("");
        site.write("config.d/1", &text);
        match load(&site.sources()) {
            Ok(_) => assert!(!refused, "{text}"),
            Err(error) => {
                let error = error.to_string();
                assert!(refused, "{error}");
                assert!(error.contains("config.d/1:2: "), "{error}");
                assert!(error.contains("key \"no_such_key\" not found"), "{error}");
            }
        }
    }
}

#[test]
fn both_names_of_the_hypervisor_are_one_table() {
    let site = Site::machine(
        "default_vcpus = 2\nmemory_slots = 3\n[hypervisor.clh]\ndefault_vcpus = 'nonsense'\n[hypervisor.ecr]\ndefault_vcpus = 4",
    );
    let config = site.load();
    assert_eq!((config.hypervisor.default_vcpus, config.hypervisor.memory_slots), (4, 3));
}

#[test]
fn every_key_is_read_with_its_own_kind_of_value() {
    let default = Config::default();
    for key in all_keys() {
        let mut config = Config::default();
        (key.set)(&mut config, &(key.get)(&default)).unwrap();
        assert_eq!((key.get)(&config), (key.get)(&default), "{}", key.name);
        let datetime: toml::Value =
            toml::from_str("a = 2020-01-01").map(|t: toml::Table| t["a"].clone()).unwrap();
        let error = (key.set)(&mut config, &datetime).unwrap_err();
        assert!(error.starts_with("expected "), "{}: {error}", key.name);
    }
}

#[test]
fn keys_of_all_versions_are_known() {
    let keys: Vec<_> = all_keys().map(|key| (key.table, key.name)).collect();
    let mut unique = keys.clone();
    unique.sort_unstable();
    unique.dedup();
    assert_eq!(unique.len(), keys.len());
    assert!(keys.len() > 140, "{}", keys.len());
}
