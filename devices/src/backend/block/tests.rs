// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

use std::fs;
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;

use tempfile::NamedTempFile;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::memory::GuestMemory;

const SIZE: u64 = 1 << 20;

fn image() -> NamedTempFile {
    let image = NamedTempFile::new().unwrap();
    image.as_file().set_len(SIZE).unwrap();
    image
}

fn memory() -> Arc<GuestMemory> {
    Arc::new(GuestMemory::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap())
}

fn transfer(memory: &Arc<GuestMemory>, pieces: &[(u64, u32)]) -> Transfer {
    let mut transfer = Transfer::new(Arc::clone(memory));
    for &(address, len) in pieces {
        transfer.push(GuestAddress(address), len).unwrap();
    }
    transfer
}

/// Run `test` with each engine that this host has.
fn with_each_engine(file: &BlockFile, test: impl Fn(&mut dyn BlockBackend)) {
    for engine in [IoEngine::Sync, IoEngine::Uring] {
        match backend(file, engine, 8) {
            Ok(mut backend) => {
                backend.start().unwrap();
                test(&mut *backend);
            }
            Err(error) => println!("skipped {engine:?}: {error}"),
        }
    }
}

/// Do one operation to its end.
fn run(backend: &mut dyn BlockBackend, operation: Operation) -> io::Result<()> {
    backend.queue(5, operation);
    loop {
        if let Some((tag, result)) = backend.complete().unwrap() {
            assert_eq!(tag, 5);
            assert!(backend.complete().unwrap().is_none());
            return result;
        }
        backend.wait().unwrap();
    }
}

#[test]
fn what_was_written_is_read_back() {
    for direct in [false, true] {
        let image = image();
        let file = match BlockFile::open(image.path(), direct, false) {
            Ok(file) => file,
            Err(error) => {
                println!("skipped direct={direct}: {error}");
                continue;
            }
        };
        with_each_engine(&file, |backend| {
            let memory = memory();
            memory.write_slice(&[0xa5; 4096], GuestAddress(0)).unwrap();
            // Aligned for direct I/O, and in every way not aligned.
            for (offset, at, cut) in [(8192, 0, 2048), (512, 0, 512), (8192, 1, 1000)] {
                let from = transfer(&memory, &[(at, cut), (at + u64::from(cut), 2048 - cut)]);
                run(backend, Operation::Write { offset, from, durable: offset == 512 }).unwrap();
                run(backend, Operation::Flush).unwrap();
                memory.write_slice(&[0; 2048], GuestAddress(0x8000)).unwrap();
                let into = transfer(&memory, &[(0x8000 + at, 2048)]);
                run(backend, Operation::Read { offset, into }).unwrap();
                let mut data = [0; 2047];
                memory.read_slice(&mut data, GuestAddress(0x8001)).unwrap();
                assert_eq!(data, [0xa5; 2047]);
            }
        });
        let mut data = [0; 2048];
        fs::File::open(image.path()).unwrap().read_exact_at(&mut data, 8192).unwrap();
        assert_eq!(data, [0xa5; 2048]);
    }
}

#[test]
fn reads_behind_the_end_fail() {
    let image = image();
    let file = BlockFile::open(image.path(), false, false).unwrap();
    image.as_file().set_len(4096).unwrap();
    with_each_engine(&file, |backend| {
        // Half of it is there.
        let into = transfer(&memory(), &[(0, 1024)]);
        let error = run(backend, Operation::Read { offset: 4096 - 512, into }).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    });
}

#[test]
fn a_host_error_is_an_error() {
    let image = image();
    let file = BlockFile::open(image.path(), false, true).unwrap();
    with_each_engine(&file, |backend| {
        let from = transfer(&memory(), &[(0, 512)]);
        run(backend, Operation::Write { offset: 0, from, durable: false }).unwrap_err();
        run(backend, Operation::Flush).unwrap();
    });
}

#[test]
fn discards_and_zeroes_give_zeros() {
    for operation in [
        || Operation::Discard { offset: 4096, len: 8192 },
        || Operation::WriteZeroes { offset: 4096, len: 8192, unmap: true },
        || Operation::WriteZeroes { offset: 4096, len: 8192, unmap: false },
    ] {
        let image = image();
        let file = BlockFile::open(image.path(), false, false).unwrap();
        with_each_engine(&file, |backend| {
            image.as_file().write_all_at(&[0xff; 16384], 0).unwrap();
            run(backend, operation()).unwrap();
            let mut data = [1; 16384];
            image.as_file().read_exact_at(&mut data, 0).unwrap();
            assert!(data[..4096].iter().chain(&data[12288..]).all(|byte| *byte == 0xff));
            assert!(data[4096..12288].iter().all(|byte| *byte == 0), "{:?}", operation());
        });
        assert_eq!(image.as_file().metadata().unwrap().len(), SIZE);
    }
}

#[test]
fn zeros_are_written_where_the_host_has_no_quicker_way() {
    let image = image();
    let file = BlockFile::open(image.path(), false, false).unwrap();
    image.as_file().write_all_at(&vec![0xff; SIZE as usize], 0).unwrap();
    file.write_zeroes_otherwise(512, SIZE - 1024).unwrap();
    let data = fs::read(image.path()).unwrap();
    assert!(data[512..SIZE as usize - 512].iter().all(|byte| *byte == 0));
    assert_eq!((data[511], data[SIZE as usize - 512]), (0xff, 0xff));
}

#[test]
fn a_discard_gives_space_back() {
    let image = image();
    image.as_file().write_all_at(&vec![0xff; SIZE as usize], 0).unwrap();
    image.as_file().sync_all().unwrap();
    let before = image.as_file().metadata().unwrap().blocks();
    let file = BlockFile::open(image.path(), false, false).unwrap();
    file.run(Operation::Discard { offset: 0, len: SIZE }).unwrap();
    assert!(image.as_file().metadata().unwrap().blocks() < before);
}

#[test]
fn many_operations_complete_with_their_own_tags() {
    let image = image();
    let file = BlockFile::open(image.path(), false, false).unwrap();
    with_each_engine(&file, |backend| {
        let memory = memory();
        for tag in 0..8 {
            memory.write_slice(&[tag as u8 + 1; 512], GuestAddress(u64::from(tag) * 512)).unwrap();
            let from = transfer(&memory, &[(u64::from(tag) * 512, 512)]);
            let offset = u64::from(tag) * 4096;
            backend.queue(tag, Operation::Write { offset, from, durable: false });
        }
        let mut tags = Vec::new();
        while tags.len() < 8 {
            backend.wait().unwrap();
            while let Some((tag, result)) = backend.complete().unwrap() {
                result.unwrap();
                tags.push(tag);
            }
        }
        tags.sort_unstable();
        assert_eq!(tags, [0, 1, 2, 3, 4, 5, 6, 7]);
        for tag in 0..8 {
            let mut data = [0; 512];
            image.as_file().read_exact_at(&mut data, tag * 4096).unwrap();
            assert_eq!(data, [tag as u8 + 1; 512]);
        }
    });
}

#[test]
fn a_backend_can_be_dropped_with_work_in_flight() {
    let image = image();
    let file = BlockFile::open(image.path(), false, false).unwrap();
    let memory = memory();
    with_each_engine(&file, |backend| {
        let into = transfer(&memory, &[(0, 0x10000)]);
        backend.queue(0, Operation::Read { offset: 0, into });
    });
    // The transfers held the memory; they are gone.
    assert_eq!(Arc::strong_count(&memory), 1);
}

#[test]
fn sizes_come_from_the_file() {
    let image = image();
    let file = BlockFile::open(image.path(), false, true).unwrap();
    assert_eq!((file.size(), file.logical_block_size(), file.readonly()), (SIZE, 512, true));
    assert!(file.physical_block_size().is_power_of_two());
}

fn refused(path: &Path) -> String {
    BlockFile::open(path, false, false).unwrap_err().to_string()
}

#[test]
fn files_that_are_no_disks_are_refused_in_words() {
    let directory = tempfile::tempdir().unwrap();
    assert!(refused(directory.path()).contains("is a directory; a disk is a raw image"));
    let missing = directory.path().join("missing.img");
    assert!(refused(&missing).contains("missing.img: No such file"));
    assert!(refused(Path::new("/dev/null")).contains("/dev/null is a character device"));

    let pipe = directory.path().join("pipe");
    let made = std::process::Command::new("mkfifo").arg(&pipe).status().unwrap();
    assert!(made.success());
    assert!(refused(&pipe).contains("is a pipe"));

    let mut odd = NamedTempFile::new().unwrap();
    assert!(refused(odd.path()).contains("has 0 bytes"));
    odd.write_all(&[0; 1000]).unwrap();
    let text = refused(odd.path());
    assert!(text.contains("has 1000 bytes, which is not a positive multiple of 512"), "{text}");
}
