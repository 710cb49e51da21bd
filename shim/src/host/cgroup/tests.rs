// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Against this host's cgroups, whichever version it has, with a helper process in them and never the tests' own.

use super::*;
use crate::host::mountinfo;
use crate::host::spawn::{Child, SpawnRequest, spawn};
use std::sync::mpsc;
use std::thread;

/// The hierarchies to try, each with a word for it. On a hybrid host that is both versions.
fn hierarchies() -> Vec<(&'static str, Hierarchies)> {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIPPED: cgroups need root");
        return vec![];
    }
    let mut all = vec![];
    match Hierarchies::detect() {
        Ok(hierarchies @ Hierarchies::V1(_)) => all.push(("v1", hierarchies)),
        Ok(hierarchies) => all.push(("v2", hierarchies)),
        Err(error) => eprintln!("SKIPPED: {error:#}"),
    }
    let unified = mountinfo::read().unwrap().into_iter().find(|mount| mount.kind == "cgroup2");
    if let (Some(("v1", _)), Some(mount)) = (all.first(), unified) {
        all.push(("v2", Hierarchies::V2(mount.point)));
    }
    all
}

fn sleeper() -> Child {
    let args = vec!["60".into()];
    spawn(SpawnRequest { program: "/bin/sleep", args, ..Default::default() }).unwrap()
}

fn cgroups_of(process: &str) -> String {
    fs::read_to_string(format!("/proc/{process}/cgroup")).unwrap()
}

fn exists(hierarchies: &Hierarchies, path: &Path) -> bool {
    hierarchies.directory("cpu", path).unwrap().exists()
}

#[test]
fn the_whole_sandbox_in_one_cgroup() {
    for (version, hierarchies) in hierarchies() {
        let top = format!("/ecr-test-whole-{version}-{}", process::id());
        let cgroups_path = PathBuf::from(&top).join("pod/c1");
        let request =
            Request { sandbox_id: "c1", cgroups_path: &cgroups_path, sandbox_cgroup_only: true };
        let cgroups = SandboxCgroups::create_in(hierarchies.clone(), &request, false).unwrap();
        assert!(!cgroups.wants_threads());
        assert_eq!(cgroups.record().sandbox_made_from.as_deref(), Some(Path::new(&top)));
        let child = sleeper();
        cgroups.add_process(child.id()).unwrap();
        let inside = cgroups_of(&child.id().to_string());
        assert!(inside.contains(&format!("{top}/pod/kata_c1")), "{inside}");
        cgroups.add_vcpu_threads(&[child.id()]).unwrap();

        // From the record, as after the death of the shim, and with the process still running.
        let text = serde_json::to_string(cgroups.record()).unwrap();
        let again = SandboxCgroups {
            hierarchies: hierarchies.clone(),
            record: serde_json::from_str(&text).unwrap(),
        };
        again.delete().unwrap();
        assert!(!exists(&hierarchies, Path::new(&top)));
        assert!(!cgroups_of(&child.id().to_string()).contains(&top));
        cgroups.delete().unwrap();
    }
}

#[test]
fn threads_in_one_cgroup_and_the_rest_in_another() {
    let Some((_, v1 @ Hierarchies::V1(_))) = hierarchies().into_iter().next() else {
        eprintln!("SKIPPED: threads are moved in cgroup v1 only, which this host has not");
        return;
    };
    let id = format!("ecr-test-threads-{}", process::id());
    let cgroups_path = PathBuf::from("/").join(&id).join("c1");
    let request =
        Request { sandbox_id: &id, cgroups_path: &cgroups_path, sandbox_cgroup_only: false };
    let cgroups = SandboxCgroups::create_in(v1.clone(), &request, false).unwrap();
    assert!(cgroups.wants_threads());
    let child = sleeper();
    cgroups.add_process(child.id()).unwrap();
    let inside = cgroups_of(&child.id().to_string());
    assert!(
        inside
            .lines()
            .any(|line| line.contains("cpu") && line.ends_with(&format!("/kata_overhead/{id}"))),
        "{inside}"
    );

    let (to_thread, wait) = mpsc::channel::<()>();
    let (to_test, told) = mpsc::channel();
    let vcpu = thread::spawn(move || {
        to_test.send(nix::unistd::gettid().as_raw().unsigned_abs()).unwrap();
        wait.recv().ok();
    });
    let tid = told.recv().unwrap();
    cgroups.add_vcpu_threads(&[tid]).unwrap();
    let own = cgroups_of("self");
    let inside = cgroups_of(&format!("self/task/{tid}"));
    let moved =
        |text: &str| text.lines().filter(|line| line.ends_with(&format!("/{id}/kata_c1"))).count();
    assert_eq!((moved(&own), moved(&inside) > 0), (0, true), "{inside}");
    assert!(
        !inside.lines().any(|line| line.contains(":memory:") && line.contains(&id)),
        "{inside}"
    );

    cgroups.delete().unwrap();
    assert_eq!(moved(&cgroups_of(&format!("self/task/{tid}"))), 0);
    assert!(!exists(&v1, Path::new(&format!("/{id}"))));
    assert!(!exists(&v1, &path::overhead(&id)));
    drop(to_thread);
    vcpu.join().unwrap();
    // A thread that is gone by now, in cgroups that are: neither is an error.
    cgroups.add_vcpu_threads(&[tid]).unwrap();
}

#[test]
fn cpusets_are_united_and_given_back() {
    for (version, hierarchies) in hierarchies() {
        let top = format!("/ecr-test-cpuset-{version}-{}", process::id());
        let cgroups_path = PathBuf::from(&top).join("c1");
        let request =
            Request { sandbox_id: "c1", cgroups_path: &cgroups_path, sandbox_cgroup_only: true };
        let cgroups = SandboxCgroups::create_in(hierarchies.clone(), &request, false).unwrap();
        let file =
            hierarchies.directory("cpuset", &cgroups.record().sandbox).unwrap().join("cpuset.cpus");
        let updated = cgroups.update_cpuset([("0", ""), ("", "0"), ("0", "")]);
        if file.exists() {
            updated.unwrap();
            assert_eq!(fs::read_to_string(&file).unwrap().trim(), "0");
            let all = fs::read_to_string(&file).unwrap();
            cgroups.update_cpuset([("", "")]).unwrap();
            assert!(
                !file.exists()
                    || version == "v2"
                    || fs::read_to_string(&file).unwrap().len() >= all.len()
            );
            let error = format!("{:#}", cgroups.update_cpuset([("9999", "")]).unwrap_err());
            assert!(error.contains("9999"), "{error}");
        } else {
            eprintln!("SKIPPED: no cpuset controller in {version}");
            updated.unwrap();
        }
        cgroups.delete().unwrap();
        assert!(!exists(&hierarchies, Path::new(&top)));
    }
}

#[test]
fn devices_are_withheld_but_those_of_a_sandbox() {
    let Some((_, v1 @ Hierarchies::V1(_))) = hierarchies().into_iter().next() else {
        eprintln!("SKIPPED: the list of devices is of cgroup v1, which this host has not");
        return;
    };
    let top = format!("/ecr-test-devices-{}", process::id());
    let cgroups_path = PathBuf::from(&top).join("c1");
    let request =
        Request { sandbox_id: "c1", cgroups_path: &cgroups_path, sandbox_cgroup_only: true };
    let cgroups = SandboxCgroups::create_in(v1, &request, false).unwrap();
    let list = || {
        let directory = cgroups.devices().unwrap();
        fs::read_to_string(directory.join("devices.list")).unwrap()
    };
    assert!(list().contains("c 1:3 rwm") && list().contains("c 136:* rwm"), "{}", list());
    assert!(!list().contains("a *:*") && !list().contains("c 1:11 "), "{}", list());
    let kmsg = Path::new("/dev/kmsg");
    if kmsg.exists() {
        cgroups.allow_device(kmsg).unwrap();
        assert!(list().contains("c 1:11 rwm"), "{}", list());
        cgroups.deny_device(kmsg).unwrap();
        // Making the node stays allowed, as for all.
        assert!(!list().contains("c 1:11 rw"), "{}", list());
    }
    cgroups.delete().unwrap();
}

#[test]
fn a_path_of_systemds_without_systemd_is_made_where_it_would_be() {
    for (version, hierarchies) in hierarchies() {
        let slice = format!("ecrtest{version}{}", process::id());
        let cgroups_path = PathBuf::from(format!("{slice}.slice:cri-containerd:c1"));
        let request =
            Request { sandbox_id: "c1", cgroups_path: &cgroups_path, sandbox_cgroup_only: true };
        let cgroups = SandboxCgroups::create_in(hierarchies.clone(), &request, false).unwrap();
        let path = format!("/{slice}.slice/cri-containerd-c1.scope");
        assert!(exists(&hierarchies, Path::new(&path)));
        assert_eq!(cgroups.record().scope, None);
        cgroups.delete().unwrap();
        assert!(!exists(&hierarchies, Path::new(&format!("/{slice}.slice"))));
    }
}

#[test]
fn a_cgroup_that_was_there_before_stays() {
    for (version, hierarchies) in hierarchies() {
        let top = PathBuf::from(format!("/ecr-test-parent-{version}-{}", process::id()));
        hierarchies.create(&top).unwrap();
        let cgroups_path = top.join("c1");
        let request =
            Request { sandbox_id: "c1", cgroups_path: &cgroups_path, sandbox_cgroup_only: true };
        let cgroups = SandboxCgroups::create_in(hierarchies.clone(), &request, false).unwrap();
        cgroups.delete().unwrap();
        assert!(exists(&hierarchies, &top));
        hierarchies.remove(&top, None).unwrap();
    }
}
