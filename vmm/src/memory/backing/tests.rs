// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

use std::fs;

use vm_memory::{Bytes, MemoryRegionAddress};

use super::*;

const MIB: u64 = 1 << 20;

fn ram() -> RamBacking {
    RamBacking { shared: false, hugepages: None, prealloc: false, path: None }
}

fn map(ram: &RamBacking, size: u64) -> GuestRegionMmap {
    let range = Range { base: 0, size };
    ram.open(&[range]).unwrap().map(range).unwrap()
}

/// What the kernel says of the mapping of `region`.
fn smaps(region: &GuestRegionMmap, field: &str) -> String {
    let all = fs::read_to_string("/proc/self/smaps").unwrap();
    let start = format!("{:x}-", region.as_ptr().addr());
    let mut lines = all.lines().skip_while(|line| !line.starts_with(&start));
    let line = lines.find(|line| line.starts_with(field)).unwrap();
    line[field.len()..].trim().to_owned()
}

#[test]
fn nothing_is_touched_before_the_guest_does() {
    for shared in [false, true] {
        let region = map(&RamBacking { shared, ..ram() }, 1024 * MIB);
        assert_eq!(smaps(&region, "Rss:"), "0 kB");
    }
}

#[test]
fn children_and_core_dumps_do_not_get_it_and_the_kernel_may_use_huge_pages() {
    for shared in [false, true] {
        let region = map(&RamBacking { shared, ..ram() }, MIB);
        let flags = smaps(&region, "VmFlags:");
        let has = |flag| flags.split(' ').any(|f| f == flag);
        assert!(has("dc") && has("dd"), "{flags}");
        if Path::new("/sys/kernel/mm/transparent_hugepage").exists() {
            assert!(has("hg"), "{flags}");
        }
    }
}

#[test]
fn preallocation_touches_every_page() {
    for shared in [false, true] {
        let region = map(&RamBacking { shared, ..ram() }, 7 * MIB);
        populate(&region).unwrap();
        assert_eq!(smaps(&region, "Rss:"), format!("{} kB", 7 * 1024));
    }
}

#[test]
fn regions_of_one_memfd_follow_each_other_and_its_size_is_fixed() {
    let ranges = [Range { base: 0, size: MIB }, Range { base: 1 << 32, size: 2 * MIB }];
    let mut backing = RamBacking { shared: true, ..ram() }.open(&ranges).unwrap();
    let regions: Vec<_> = ranges.iter().map(|range| backing.map(*range).unwrap()).collect();
    regions[1].write_obj(0x55u8, MemoryRegionAddress(3)).unwrap();
    let file = backing.file.unwrap();
    let mut byte = [0];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut byte, MIB + 3).unwrap();
    assert_eq!(byte, [0x55]);
    assert_eq!(regions[1].file_offset().unwrap().start(), MIB);
    assert_eq!(file.metadata().unwrap().len(), 3 * MIB);
    assert!(file.set_len(MIB).is_err() && file.set_len(4 * MIB).is_err());
}

#[test]
fn a_directory_gets_a_file_that_has_no_name() {
    let directory = tempfile::tempdir().unwrap();
    let path = Some(directory.path().to_owned());
    let region = map(&RamBacking { shared: true, path, ..ram() }, MIB);
    region.write_obj(1u8, MemoryRegionAddress(0)).unwrap();
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn a_file_is_made_longer_but_never_shorter() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let backing = RamBacking { shared: true, path: Some(file.path().to_owned()), ..ram() };
    for (size, expected) in [(2 * MIB, 2 * MIB), (MIB, 2 * MIB), (3 * MIB, 3 * MIB)] {
        map(&backing, size).write_obj(1u8, MemoryRegionAddress(size - 1)).unwrap();
        assert_eq!(file.as_file().metadata().unwrap().len(), expected);
    }
}

#[test]
fn more_than_the_host_can_have_is_refused_with_both_numbers() {
    let size = 1 << 50;
    let error = ram().open(&[Range { base: 0, size }]).unwrap_err();
    let MemoryError::TooMuch { present, .. } = error else { panic!("{error}") };
    let text = error.to_string();
    assert!(text.contains(&size.to_string()) && text.contains(&present.to_string()), "{text}");
}

#[test]
fn pieces_that_huge_pages_do_not_fill_are_refused() {
    let backing = RamBacking { hugepages: Some(1 << 30), ..ram() };
    let range = Range { base: 0, size: (1 << 30) + (1 << 29) };
    let error = backing.open(&[range]).unwrap_err().to_string();
    assert!(error.contains("0x40000000"), "{error}");
}

#[test]
fn what_is_no_image_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    let refused = |path: &Path| Backing::image(path).unwrap_err().to_string();
    assert!(refused(directory.path()).contains("not a regular file"));
    assert!(refused(&directory.path().join("none")).contains("none"));
    assert!(refused(file.path()).contains("0 bytes"));
    file.as_file().set_len(2 * MIB + 512).unwrap();
    assert!(refused(file.path()).contains("2097664 bytes"));
}
