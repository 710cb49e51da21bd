// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

use super::*;

/// Run `test` as a thread with mounts of its own, so that nothing it mounts is seen or stays. Skips without root.
fn with_own_mounts(test: impl FnOnce(&Path) + Send) {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIPPED: mounting needs root");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().canonicalize().unwrap();
    thread::scope(|scope| {
        let work = || {
            unshare(CloneFlags::CLONE_NEWNS).unwrap();
            propagate(Path::new("/"), MsFlags::MS_PRIVATE | MsFlags::MS_REC).unwrap();
            // Overlay's upper directory may not lie on another overlay, which the machine's /tmp may be.
            let tmpfs = Mount { kind: "tmpfs".into(), source: "tmpfs".into(), options: vec![] };
            mount_all(&[tmpfs], &path).unwrap();
            test(&path);
        };
        scope.spawn(work).join().unwrap();
    });
}

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

#[test]
fn option_words_become_flags_and_the_rest_is_the_file_systems() {
    let options =
        Options::parse(&words("rbind ro nosuid noatime atime rprivate size=1m mode=755")).unwrap();
    assert_eq!(
        options.flags,
        MsFlags::MS_BIND | MsFlags::MS_REC | MsFlags::MS_RDONLY | MsFlags::MS_NOSUID
    );
    assert_eq!(options.propagation, MsFlags::MS_PRIVATE | MsFlags::MS_REC);
    assert_eq!(options.data, ["size=1m", "mode=755"]);
    let error = Options::parse(&words("ro loop")).unwrap_err();
    assert!(error.to_string().contains("option loop"), "{error}");
}

#[test]
fn mounts_come_off_in_the_reverse_of_how_they_went_on() {
    let entry = |point: &str| Entry {
        root: "/".into(),
        point: point.into(),
        kind: String::new(),
        source: point.into(),
        options: String::new(),
    };
    let entries: Vec<_> = ["/", "/a", "/a/b", "/ab", "/a/b/c", "/a", "/a/d"].map(entry).into();
    let order = mounted_below(&entries, Path::new("/a"));
    assert_eq!(order, ["/a/b/c", "/a/d", "/a/b", "/a", "/a"].map(PathBuf::from));
}

#[test]
fn the_deepest_shared_directory() {
    let common = |paths: &[&str]| common_parent(paths.iter().map(Path::new));
    assert_eq!(common(&["/s/1/fs", "/s/2/fs", "/s/1/work"]), Some("/s".into()));
    assert_eq!(common(&["/s/1/fs", "/s/1/work"]), Some("/s/1".into()));
    assert_eq!(common(&["/s/1", "/t/1"]), None);
    assert_eq!(common(&["s/1", "/t/1"]), None);
    assert_eq!(common(&[]), None);
}

#[test]
fn an_overlays_paths_are_shortened_and_its_other_options_stay() {
    let data =
        words("index=off lowerdir=/v/s/12/fs:/v/s/1/fs upperdir=/v/s/13/fs workdir=/v/s/13/work");
    let short = shorten_overlay(&data).unwrap();
    assert_eq!(short.base, PathBuf::from("/v/s"));
    assert_eq!(short.data, "index=off,lowerdir=12/fs:1/fs,upperdir=13/fs,workdir=13/work");
    let many: Vec<String> = (0..2000).map(|n| format!("/v/s/{n}/fs")).collect();
    let error = shorten_overlay(&[format!("lowerdir={}", many.join(":"))]).err().unwrap();
    assert!(error.to_string().contains("too many layers"), "{error}");
}

#[test]
fn a_read_only_bind_makes_its_mount_point_and_keeps_the_sources_flags() {
    with_own_mounts(|dir| {
        let source = dir.join("source");
        fs::create_dir(&source).unwrap();
        let options = words("nosuid nodev");
        mount_all(&[Mount { kind: "tmpfs".into(), source: "tmpfs".into(), options }], &source)
            .unwrap();
        fs::write(source.join("file"), "x").unwrap();
        let copy = dir.join("made/on/the/way");
        bind(&source, &copy, Flags { read_only: true, ..Flags::default() }).unwrap();
        assert_eq!(fs::read(copy.join("file")).unwrap(), b"x");
        let error = fs::write(copy.join("file"), "y").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EROFS));
        let flags = nix::sys::statvfs::statvfs(&copy).unwrap().flags();
        assert!(flags.contains(nix::sys::statvfs::FsFlags::ST_NOSUID), "{flags:?}");

        let file = dir.join("file-target");
        bind(&source.join("file"), &file, Flags::default()).unwrap();
        assert!(is_mounted(&file).unwrap());
        assert_eq!(fs::read(&file).unwrap(), b"x");
    });
}

#[test]
fn a_recursive_read_only_bind_reaches_the_mounts_below() {
    with_own_mounts(|dir| {
        let (source, copy) = (dir.join("source"), dir.join("copy"));
        fs::create_dir_all(source.join("inner")).unwrap();
        let tmpfs = Mount { kind: "tmpfs".into(), source: "tmpfs".into(), options: vec![] };
        mount_all(&[tmpfs], &source.join("inner")).unwrap();
        bind(&source, &copy, Flags { read_only: true, recursive: true, propagation: None })
            .unwrap();
        let error = fs::write(copy.join("inner/file"), "y").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EROFS));
        fs::write(source.join("inner/file"), "y").unwrap();
    });
}

#[test]
fn a_slave_copy_sees_later_mounts_of_its_source() {
    with_own_mounts(|dir| {
        let (source, copy) = (dir.join("source"), dir.join("copy"));
        fs::create_dir(&source).unwrap();
        bind(
            &source,
            &source,
            Flags { propagation: Some(Propagation::Shared), ..Flags::default() },
        )
        .unwrap();
        let slave =
            Flags { read_only: true, propagation: Some(Propagation::Slave), recursive: false };
        bind(&source, &copy, slave).unwrap();
        let inner = source.join("inner");
        fs::create_dir(&inner).unwrap();
        bind(dir, &inner, Flags::default()).unwrap();
        assert!(is_mounted(&copy.join("inner")).unwrap());
        unmount_below(&source).unwrap();
        assert!(!is_mounted(&copy.join("inner")).unwrap());
        assert!(is_mounted(&copy).unwrap());
    });
}

#[test]
fn a_bind_of_nothing_leaves_nothing() {
    with_own_mounts(|dir| {
        let error = bind(&dir.join("missing"), &dir.join("target"), Flags::default()).unwrap_err();
        assert!(format!("{error:#}").contains("missing"), "{error:#}");
        assert!(!dir.join("target").exists());
    });
}

#[test]
fn a_failing_mount_takes_those_before_it_along() {
    with_own_mounts(|dir| {
        let target = dir.join("target");
        fs::create_dir(&target).unwrap();
        let good =
            Mount { kind: "tmpfs".into(), source: "tmpfs".into(), options: words("size=1m") };
        let bad = Mount { kind: "nofs".into(), source: "nothing".into(), options: vec![] };
        let error = mount_all(&[good, bad], &target).unwrap_err();
        assert!(format!("{error:#}").contains("mount nofs nothing on"), "{error:#}");
        assert!(!is_mounted(&target).unwrap());
    });
}

#[test]
fn everything_below_a_prefix_is_unmounted_however_it_is_piled() {
    with_own_mounts(|dir| {
        let root = dir.join("root");
        fs::create_dir(&root).unwrap();
        let tmpfs = || Mount { kind: "tmpfs".into(), source: "tmpfs".into(), options: vec![] };
        mount_all(&[tmpfs(), tmpfs()], &root).unwrap();
        fs::create_dir_all(root.join("a b/c")).unwrap();
        mount_all(&[tmpfs()], &root.join("a b")).unwrap();
        let _open = File::create(root.join("a b/open")).unwrap();
        let neighbour = dir.join("root-not");
        fs::create_dir(&neighbour).unwrap();
        mount_all(&[tmpfs()], &neighbour).unwrap();
        unmount_below(&root).unwrap();
        assert!(!is_mounted(&root).unwrap());
        assert!(fs::read_dir(&root).unwrap().next().is_none());
        assert!(is_mounted(&neighbour).unwrap());
        unmount_below(&dir.join("never/was")).unwrap();
    });
}

#[test]
fn an_overlay_of_more_layers_than_a_page_of_options_holds() {
    with_own_mounts(|dir| {
        let snapshots = dir.join("io.containerd.snapshotter.v1.overlayfs/snapshots");
        let lower: Vec<String> = (0..120)
            .map(|n| {
                let layer = snapshots.join(n.to_string()).join("fs");
                fs::create_dir_all(&layer).unwrap();
                fs::write(layer.join(format!("file{n}")), n.to_string()).unwrap();
                layer.display().to_string()
            })
            .collect();
        for name in ["u/fs", "u/work"] {
            fs::create_dir_all(snapshots.join(name)).unwrap();
        }
        let options = vec![
            format!("workdir={}", snapshots.join("u/work").display()),
            format!("upperdir={}", snapshots.join("u/fs").display()),
            format!("lowerdir={}", lower.join(":")),
        ];
        assert!(options.join(",").len() > MAX_OPTIONS);
        let target = dir.join("rootfs");
        fs::create_dir(&target).unwrap();
        let before = std::env::current_dir().unwrap();
        let overlay = Mount { kind: "overlay".into(), source: "overlay".into(), options };
        mount_all(&[overlay], &target).unwrap();
        assert_eq!(fs::read(target.join("file0")).unwrap(), b"0");
        assert_eq!(fs::read(target.join("file119")).unwrap(), b"119");
        fs::write(target.join("new"), "x").unwrap();
        assert_eq!(fs::read(snapshots.join("u/fs/new")).unwrap(), b"x");
        assert_eq!(std::env::current_dir().unwrap(), before);
    });
}
