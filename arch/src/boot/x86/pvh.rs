// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! ELF kernels with a PVH entry: Xen `docs/misc/pvh.pandoc` and `xen/include/public/arch-x86/hvm/start_info.h`;
//! ELF-64 Object File Format.

use super::{
    BootError, BootFile, BootPlan, BootRequest, CMDLINE_MAX, Load, PAGE, cmdline, initrd, place,
    read,
};
use crate::boot::{Source, le16, le32, le64};
use crate::x86::regs::{self, BootRegs};

/// Offsets in the file header, its identification and its values.
mod ehdr {
    pub(super) const SIZE: usize = 64;
    pub(super) const CLASS: usize = 4;
    pub(super) const CLASS_64: u8 = 2;
    pub(super) const DATA: usize = 5;
    pub(super) const DATA_LSB: u8 = 1;
    pub(super) const MACHINE: usize = 18;
    pub(super) const MACHINE_X86_64: u16 = 62;
    pub(super) const PHOFF: usize = 32;
    pub(super) const PHENTSIZE: usize = 54;
    pub(super) const PHNUM: usize = 56;
}

/// Offsets in a program header, and its types.
mod phdr {
    pub(super) const SIZE: usize = 56;
    pub(super) const TYPE: usize = 0;
    pub(super) const TYPE_LOAD: u32 = 1;
    pub(super) const TYPE_NOTE: u32 = 4;
    pub(super) const OFFSET: usize = 8;
    pub(super) const PADDR: usize = 24;
    pub(super) const FILESZ: usize = 32;
    pub(super) const MEMSZ: usize = 40;
}

/// `XEN_ELFNOTE_PHYS32_ENTRY`.
const NOTE_PHYS32_ENTRY: u32 = 18;
/// Kernels have a handful of segments and a few hundred bytes of notes.
const SEGMENTS_MAX: u16 = 64;
const NOTES_MAX: u64 = 64 * 1024;

const START_INFO_MAGIC: u32 = 0x336E_C578;
const START_INFO_VERSION: u32 = 1;
const START_INFO_SIZE: u64 = 56;
const MODULE_SIZE: u64 = 32;

pub(super) fn plan(request: &BootRequest<'_>) -> Result<BootPlan, BootError> {
    let mut head = [0; ehdr::SIZE];
    read(request.kernel, "the ELF header", 0, &mut head)?;
    if head[ehdr::CLASS] != ehdr::CLASS_64
        || head[ehdr::DATA] != ehdr::DATA_LSB
        || le16(&head, ehdr::MACHINE) != ehdr::MACHINE_X86_64
    {
        return Err(BootError::NotAKernel("it is an ELF file, but not for x86_64".into()));
    }
    let (mut loads, mut end, mut entry) = (Vec::new(), 0, None);
    for header in program_headers(request, &head)? {
        match le32(&header, phdr::TYPE) {
            phdr::TYPE_LOAD => end = end.max(segment(request, &header, &mut loads)?),
            phdr::TYPE_NOTE if entry.is_none() => entry = find_entry(request, &header)?,
            _ => {}
        }
    }
    let entry = entry.ok_or_else(|| {
        BootError::NotAKernel("the ELF file has no PVH entry note (Linux: CONFIG_PVH)".into())
    })?;
    if !loads.iter().any(|load| contains(load, entry)) {
        return Err(BootError::NotAKernel(format!(
            "its PVH entry point {entry:#x} lies outside of what it loads"
        )));
    }
    loads.push(cmdline(request, CMDLINE_MAX)?);
    let module = initrd(request, end.next_multiple_of(PAGE), request.low_ram.end())?;
    let info = start_info(request, module.as_ref().map(|(load, size)| (load.address, *size)));
    loads.extend(module.map(|(load, _)| load));
    loads.push(Load::bytes("the PVH start info", place::START_INFO, info));
    loads.push(Load::bytes("the descriptor table", place::GDT, regs::gdt_bytes(&regs::GDT_32)));
    let regs =
        BootRegs { rip: entry, rbx: place::START_INFO, ..BootRegs::protected_mode(place::GDT) };
    Ok(BootPlan { loads, regs })
}

/// Whether a segment covers `address` with bytes of the file.
fn contains(load: &Load, address: u64) -> bool {
    match load.source {
        Source::File { size, .. } => (load.address..load.address + size).contains(&address),
        Source::Bytes(_) => false,
    }
}

fn program_headers(
    request: &BootRequest<'_>,
    head: &[u8; ehdr::SIZE],
) -> Result<Vec<[u8; phdr::SIZE]>, BootError> {
    let count = le16(head, ehdr::PHNUM);
    if usize::from(le16(head, ehdr::PHENTSIZE)) != phdr::SIZE || count > SEGMENTS_MAX {
        return Err(BootError::NotAKernel(format!(
            "the ELF header announces {count} program headers of {} bytes",
            le16(head, ehdr::PHENTSIZE)
        )));
    }
    let mut table = vec![[0; phdr::SIZE]; count.into()];
    let bytes = table.as_flattened_mut();
    read(request.kernel, "the program headers", le64(head, ehdr::PHOFF), bytes)?;
    Ok(table)
}

/// Add a segment to `loads`; returns where its memory ends.
fn segment(
    request: &BootRequest<'_>,
    header: &[u8; phdr::SIZE],
    loads: &mut Vec<Load>,
) -> Result<u64, BootError> {
    let (offset, base) = (le64(header, phdr::OFFSET), le64(header, phdr::PADDR));
    let (in_file, in_memory) = (le64(header, phdr::FILESZ), le64(header, phdr::MEMSZ));
    let ram_end = request.low_ram.end();
    let end = base.saturating_add(in_memory.max(in_file));
    if end > ram_end {
        return Err(BootError::TooLarge { what: "the kernel", base, end, ram_end });
    }
    if in_memory != 0 && base < place::HIGH_MEMORY {
        return Err(BootError::NotAKernel(format!(
            "a segment wants to be loaded at {base:#x}, below 1 MiB"
        )));
    }
    let size =
        request.kernel.size().map_err(|source| BootError::Read { what: "the size", source })?;
    if offset.checked_add(in_file).is_none_or(|end| end > size) {
        return Err(BootError::NotAKernel(
            "it ends inside a segment: the file is truncated".into(),
        ));
    }
    if in_file != 0 {
        loads.push(Load::file(BootFile::Kernel, base, offset, in_file));
    }
    Ok(end)
}

/// The PVH entry point, if it stands in this note segment.
fn find_entry(
    request: &BootRequest<'_>,
    header: &[u8; phdr::SIZE],
) -> Result<Option<u64>, BootError> {
    let size = le64(header, phdr::FILESZ).min(NOTES_MAX);
    let mut notes = vec![0; usize::try_from(size).unwrap_or(0)];
    read(request.kernel, "the notes", le64(header, phdr::OFFSET), &mut notes)?;
    let mut rest = notes.as_slice();
    while let Some((fields, body)) = rest.split_at_checked(12) {
        let padded = |at| (le32(fields, at) as usize).next_multiple_of(4);
        let (name_size, value_size) = (le32(fields, 0) as usize, le32(fields, 4) as usize);
        let (Some(name), Some(value)) =
            (body.get(..name_size), body.get(padded(0)..).and_then(|b| b.get(..value_size)))
        else {
            break;
        };
        if name == b"Xen\0" && le32(fields, 8) == NOTE_PHYS32_ENTRY {
            match value_size {
                4 => return Ok(Some(le32(value, 0).into())),
                8 => return Ok(Some(le64(value, 0))),
                _ => {}
            }
        }
        rest = body.get(padded(0) + padded(4)..).unwrap_or_default();
    }
    Ok(None)
}

/// `hvm_start_info`, followed by the module list and the memory map.
fn start_info(request: &BootRequest<'_>, module: Option<(u64, u64)>) -> Vec<u8> {
    let modules = place::START_INFO + START_INFO_SIZE;
    let memory_map = modules + MODULE_SIZE;
    let entries = u32::try_from(request.memory_map.len()).unwrap_or(u32::MAX);
    let mut info = Vec::with_capacity(256);
    for field in [START_INFO_MAGIC, START_INFO_VERSION, 0, u32::from(module.is_some())] {
        info.extend(field.to_le_bytes());
    }
    for field in [modules, place::CMDLINE, request.rsdp, memory_map] {
        info.extend(field.to_le_bytes());
    }
    for field in [entries, 0] {
        info.extend(field.to_le_bytes());
    }
    let (address, size) = module.unwrap_or_default();
    for field in [address, size, 0, 0] {
        info.extend(field.to_le_bytes());
    }
    for entry in request.memory_map {
        info.extend(entry.range.base.to_le_bytes());
        info.extend(entry.range.size.to_le_bytes());
        info.extend((entry.kind as u32).to_le_bytes());
        info.extend(0u32.to_le_bytes());
    }
    info
}
