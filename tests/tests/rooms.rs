// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The walls of the house: which crate may depend on which, and which words stay in which room
//! (`docs/architecture.md`, "Rooms").

#![allow(clippy::unwrap_used)] // A failed step is a failed test.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Each of our crates and those of ours that it may use. `ecr-tests` may use all.
const MAY_USE: &[(&str, &[&str])] = &[
    ("ecr-arch", &[]),
    ("ecr-devices", &[]),
    ("ecr-vmm", &["ecr-arch", "ecr-devices"]),
    ("ecr-agent-protocol", &[]),
    ("ecr-agent", &["ecr-agent-protocol"]),
    ("ecr-image", &[]),
    ("ecr-shim", &["ecr-vmm", "ecr-agent-protocol"]),
    ("ecr-testbed", &[]),
];

/// Other people's crates and the crates of ours that may use them.
const ONLY_IN: &[(&str, &[&str])] = &[
    ("kvm-ioctls", &["ecr-vmm"]),
    ("kvm-bindings", &["ecr-vmm"]),
    ("tokio", &["ecr-agent", "ecr-agent-protocol", "ecr-shim", "ecr-tests"]),
];

/// Words of code and the only places where they may stand.
const WORDS: &[(&[&str], &[&str])] = &[
    (&["kvm_ioctls", "kvm_bindings", "KVM_"], &["vmm/src/hypervisor/kvm/", "vmm/tests/", "tests/"]),
    (
        &["qmp_capabilities", "CommandNotFound", "GenericError", "\"query-"],
        &["vmm/src/qmp/", "vmm/tests/", "tests/"],
    ),
    (&["katacontainers", "kataShared"], &["shim/", "guest/agent/", "tests/"]),
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// Direct dependencies of each crate of the workspace, those for tests left out.
fn dependencies() -> BTreeMap<String, BTreeSet<String>> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let package = |package: &serde_json::Value| {
        let dependencies = package["dependencies"].as_array().unwrap();
        let used = dependencies.iter().filter(|dependency| dependency["kind"] != "dev");
        let names = used.map(|dependency| dependency["name"].as_str().unwrap().to_owned());
        (package["name"].as_str().unwrap().to_owned(), names.collect())
    };
    metadata["packages"].as_array().unwrap().iter().map(package).collect()
}

#[test]
fn every_crate_uses_only_the_rooms_below_it() {
    let dependencies = dependencies();
    let ours: BTreeSet<&String> = dependencies.keys().collect();
    for (name, used) in &dependencies {
        if name == "ecr-tests" {
            continue;
        }
        let (_, allowed) = MAY_USE
            .iter()
            .find(|(known, _)| known == name)
            .unwrap_or_else(|| panic!("{name} is a new room: say here what it may use"));
        for other in used.iter().filter(|other| ours.contains(other)) {
            assert!(allowed.contains(&other.as_str()), "{name} must not depend on {other}");
        }
    }
}

#[test]
fn some_crates_are_for_some_rooms_only() {
    for (name, used) in dependencies() {
        for (foreign, allowed) in ONLY_IN {
            assert!(
                !used.contains(*foreign) || allowed.contains(&name.as_str()),
                "{name} must not depend on {foreign}: only {allowed:?} may"
            );
        }
    }
}

/// All Rust sources, relative to the root.
fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() && name != "target" && !name.starts_with('.') {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

#[test]
fn words_stay_in_their_rooms() {
    let root = root();
    let mut found = Vec::new();
    sources(&root, &mut found);
    assert!(found.len() > 20, "only {} sources found", found.len());
    for path in found {
        let relative = path.strip_prefix(&root).unwrap().to_string_lossy().into_owned();
        // This file names all words.
        if relative.ends_with("tests/rooms.rs") {
            continue;
        }
        let text = fs::read_to_string(&path).unwrap();
        for (words, rooms) in WORDS {
            if rooms.iter().any(|room| relative.starts_with(room)) {
                continue;
            }
            for (number, line) in text.lines().enumerate() {
                let code = line.split("//").next().unwrap_or_default();
                for word in *words {
                    assert!(
                        !code.contains(word),
                        "{relative}:{}: {word} belongs in {rooms:?}",
                        number + 1
                    );
                }
            }
        }
    }
}
