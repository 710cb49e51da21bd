// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

use std::io;

use super::*;
use crate::boot::{Source, le32, le64, put};
use crate::layout::MIB;
use e820::E820Kind;
use proptest::prelude::*;

struct Bytes(Vec<u8>);

impl ReadAt for Bytes {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let at = usize::try_from(offset).unwrap_or(usize::MAX);
        let end = at.checked_add(buf.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        buf.copy_from_slice(self.0.get(at..end).ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.0.len() as u64)
    }
}

const MAP: &[E820Entry] = &[E820Entry { range: Range::new(0, 64 * MIB), kind: E820Kind::Ram }];

fn request(kernel: &Bytes) -> BootRequest<'_> {
    BootRequest {
        kernel,
        initrd_size: None,
        cmdline: "console=hvc0",
        low_ram: Range::new(0, 64 * MIB),
        memory_map: MAP,
        rsdp: 0xE_0000,
    }
}

/// A bzImage of one setup sector and `body` bytes, preferring 16 MiB.
fn bzimage(body: usize) -> Bytes {
    let mut image = vec![0; 1024 + body];
    image[0x1F1] = 1;
    image[0x201] = 0x66;
    put(&mut image, 0x202, b"HdrS");
    put(&mut image, 0x206, &0x020Fu16.to_le_bytes());
    put(&mut image, 0x22C, &0x7FFF_FFFFu32.to_le_bytes());
    put(&mut image, 0x230, &(2 * MIB as u32).to_le_bytes());
    put(&mut image, 0x236, &1u16.to_le_bytes());
    put(&mut image, 0x238, &2047u32.to_le_bytes());
    put(&mut image, 0x258, &(16 * MIB).to_le_bytes());
    put(&mut image, 0x260, &(8 * MIB as u32).to_le_bytes());
    Bytes(image)
}

/// An ELF kernel of one segment at 16 MiB with its PVH note.
fn elf(segment: usize) -> Bytes {
    let mut image = vec![0; 0x200 + segment];
    put(&mut image, 0, b"\x7fELF\x02\x01\x01");
    put(&mut image, 18, &62u16.to_le_bytes());
    put(&mut image, 32, &64u64.to_le_bytes());
    put(&mut image, 54, &56u16.to_le_bytes());
    put(&mut image, 56, &2u16.to_le_bytes());
    for (at, kind, offset, address, size) in
        [(64, 1u32, 0x200u64, 16 * MIB, segment as u64), (120, 4, 0x100, 0, 24)]
    {
        put(&mut image, at, &kind.to_le_bytes());
        put(&mut image, at + 8, &offset.to_le_bytes());
        put(&mut image, at + 24, &address.to_le_bytes());
        put(&mut image, at + 32, &size.to_le_bytes());
        put(&mut image, at + 40, &(size * 2).to_le_bytes());
    }
    for (at, value) in [(0x100, 4u32), (0x104, 8), (0x108, 18), (0x110, 0x0100_0040)] {
        put(&mut image, at, &value.to_le_bytes());
    }
    put(&mut image, 0x10C, b"Xen\0");
    Bytes(image)
}

fn bytes_at(plan: &BootPlan, address: u64) -> &[u8] {
    plan.loads
        .iter()
        .find_map(|load| match &load.source {
            Source::Bytes(bytes) if load.address == address => Some(bytes.as_slice()),
            _ => None,
        })
        .unwrap()
}

fn file_load(plan: &BootPlan, wanted: BootFile) -> (u64, u64, u64) {
    plan.loads
        .iter()
        .find_map(|load| match load.source {
            Source::File { file, offset, size } if file == wanted => {
                Some((load.address, offset, size))
            }
            _ => None,
        })
        .unwrap()
}

#[test]
fn a_bzimage_starts_at_its_64_bit_entry_with_its_parameters() {
    let kernel = bzimage(3 * MIB as usize);
    let plan = plan(&BootRequest { initrd_size: Some(5000), ..request(&kernel) }).unwrap();
    assert_eq!(file_load(&plan, BootFile::Kernel), (16 * MIB, 1024, 3 * MIB));
    assert_eq!((plan.regs.rip, plan.regs.rsi), (16 * MIB + 0x200, place::ZERO_PAGE));
    let params = bytes_at(&plan, place::ZERO_PAGE);
    assert_eq!((params[0x210], params[0x1E8]), (0xFF, 1));
    assert_eq!(le64(params, 0x70), 0xE_0000);
    assert_eq!(u64::from(le32(params, 0x228)), place::CMDLINE);
    // As high as memory allows, on a page.
    let (initrd, _, size) = file_load(&plan, BootFile::Initrd);
    assert_eq!((initrd, size), (64 * MIB - 8192, 5000));
    assert_eq!((u64::from(le32(params, 0x218)), le32(params, 0x21C)), (initrd, 5000));
    assert_eq!(bytes_at(&plan, place::CMDLINE), b"console=hvc0\0");
}

#[test]
fn a_bzimage_needs_the_memory_that_it_unpacks_itself_into() {
    let kernel = bzimage(MIB as usize);
    let enough = BootRequest { low_ram: Range::new(0, 24 * MIB), ..request(&kernel) };
    assert_eq!(file_load(&plan(&enough).unwrap(), BootFile::Kernel).0, 16 * MIB);
    // It would fit at 2 MiB, but would move itself to 16 MiB.
    let small = BootRequest { low_ram: Range::new(0, 24 * MIB - 1), ..request(&kernel) };
    assert!(matches!(
        plan(&small),
        Err(BootError::TooLarge { what: "the kernel", base: 0x100_0000, end: 0x180_0000, .. })
    ));
}

#[test]
fn an_elf_kernel_starts_at_its_pvh_note() {
    let kernel = elf(MIB as usize);
    let plan = plan(&BootRequest { initrd_size: Some(4096), ..request(&kernel) }).unwrap();
    assert_eq!(file_load(&plan, BootFile::Kernel), (16 * MIB, 0x200, MIB));
    assert_eq!((plan.regs.rip, plan.regs.rbx), (0x0100_0040, place::START_INFO));
    assert_eq!(plan.regs.cr0 & 0x8000_0001, 1, "protected mode, no paging");
    let info = bytes_at(&plan, place::START_INFO);
    assert_eq!((le32(info, 0), le32(info, 4), le32(info, 12)), (START_MAGIC, 1, 1));
    let modules = usize::try_from(le64(info, 16) - place::START_INFO).unwrap();
    assert_eq!((le64(info, modules), le64(info, modules + 8)), (64 * MIB - 4096, 4096));
    let map = usize::try_from(le64(info, 40) - place::START_INFO).unwrap();
    assert_eq!((le64(info, map + 8), le32(info, map + 16), le32(info, 48)), (64 * MIB, 1, 1));
}

const START_MAGIC: u32 = 0x336E_C578;

#[test]
fn what_is_no_kernel_is_refused_with_a_reason() {
    let mut no_note = elf(4096);
    no_note.0[0x108] = 17;
    let mut astray = elf(4096);
    put(&mut astray.0, 0x110, &0x0200_0000u32.to_le_bytes());
    let mut arm = vec![0; 4096];
    put(&mut arm, 56, b"ARMd");
    let mut old = bzimage(4096);
    old.0[0x206] = 0x0B;
    for (kernel, reason) in [
        (Bytes(vec![]), "empty"),
        (Bytes(vec![0; 10]), "neither"),
        (Bytes(vec![0x1F, 0x8B, 8]), "gzip"),
        (Bytes(b"070701".to_vec()), "--initrd"),
        (Bytes(arm), "aarch64"),
        (no_note, "CONFIG_PVH"),
        (astray, "outside"),
        (old, "64-bit entry"),
        (Bytes(bzimage(0).0), "truncated"),
        (Bytes(bzimage(0).0[..0x230].to_vec()), "truncated"),
        (Bytes(elf(4096).0[..0x800].to_vec()), "truncated"),
        (Bytes(elf(4096).0[..40].to_vec()), "truncated"),
    ] {
        let error = plan(&request(&kernel)).unwrap_err().to_string();
        assert!(error.contains(reason), "{error:?} does not say {reason:?}");
    }
}

#[test]
fn an_empty_initrd_is_refused() {
    for kernel in [bzimage(MIB as usize), elf(MIB as usize)] {
        let empty = BootRequest { initrd_size: Some(0), ..request(&kernel) };
        assert!(matches!(plan(&empty), Err(BootError::EmptyInitrd)));
    }
}

#[test]
fn an_initrd_that_reaches_the_kernel_is_refused() {
    for kernel in [bzimage(MIB as usize), elf(MIB as usize)] {
        let too_large = BootRequest { initrd_size: Some(47 * MIB), ..request(&kernel) };
        assert!(matches!(plan(&too_large), Err(BootError::InitrdTooLarge { .. })));
    }
}

#[test]
fn a_command_line_is_never_cut() {
    let long = "x".repeat(2048);
    for kernel in [bzimage(4096), elf(4096)] {
        let refused = plan(&BootRequest { cmdline: &long, ..request(&kernel) });
        assert!(matches!(refused, Err(BootError::CmdlineTooLong { length: 2048, limit: 2047 })));
        plan(&BootRequest { cmdline: &long[1..], ..request(&kernel) }).unwrap();
    }
}

proptest! {
    #[test]
    fn damaged_kernels_never_panic(
        elf_kernel: bool, damage in prop::collection::vec((0usize..0x400, any::<u8>()), 1..16),
    ) {
        let mut kernel = if elf_kernel { elf(4096) } else { bzimage(4096) };
        for (at, value) in damage {
            kernel.0[at] = value;
        }
        let _ = plan(&BootRequest { initrd_size: Some(4096), ..request(&kernel) });
    }
}
