// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The memory map that a PC's firmware hands over (ACPI 6.5, section 15, INT 15h E820h).

use crate::layout::Range;
use crate::layout::q35::{ACPI_TABLES, ECAM, LEGACY_HOLE, Q35Map};

/// What a range is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum E820Kind {
    /// RAM.
    Ram = 1,
    /// Not to be used.
    Reserved = 2,
}

/// One range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct E820Entry {
    /// Where.
    pub range: Range,
    /// What.
    pub kind: E820Kind,
}

/// The extended BIOS data area at the end of the first 640 KiB: Linux expects it to be reserved.
const EBDA: Range = Range::new(0x9_FC00, 0x400);

/// The memory map of a q35 machine. ECAM is reserved in it, or Linux would not trust MCFG.
pub fn q35(map: &Q35Map) -> Vec<E820Entry> {
    let ram = |base, end| E820Entry { range: Range::new(base, end - base), kind: E820Kind::Ram };
    let reserved = |range| E820Entry { range, kind: E820Kind::Reserved };
    let low_end = map.low_ram.end();
    let mut entries = vec![ram(0, low_end.min(EBDA.base))];
    entries.extend([reserved(EBDA), reserved(ACPI_TABLES)]);
    if low_end > LEGACY_HOLE.end() {
        entries.push(ram(LEGACY_HOLE.end(), low_end));
    }
    entries.push(reserved(ECAM));
    if map.high_ram.size != 0 {
        entries.push(ram(map.high_ram.base, map.high_ram.end()));
    }
    entries
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::q35::Request;
    use crate::layout::{GIB, MIB};

    #[test]
    fn ram_goes_around_the_legacy_hole_and_the_32_bit_devices() {
        let request =
            Request { ram: 4 * GIB, max_ram: 4 * GIB, address_bits: 40, ..Request::default() };
        let entries = q35(&Q35Map::new(&request).unwrap());
        let ram: Vec<_> =
            entries.iter().filter(|e| e.kind == E820Kind::Ram).map(|e| e.range).collect();
        assert_eq!(
            ram,
            [Range::new(0, 0x9_FC00), Range::new(MIB, 2 * GIB - MIB), Range::new(4 * GIB, 2 * GIB)]
        );
        assert!(entries.iter().any(|e| e.range == ECAM && e.kind == E820Kind::Reserved));
        for pair in entries.windows(2) {
            assert!(pair[0].range.end() <= pair[1].range.base, "ascending and disjoint");
        }
    }
}
