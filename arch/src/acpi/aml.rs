// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Pieces of AML (ACPI 6.5, chapters 19 and 20).

use acpi_tables::aml::{Device, EISAName, IO, Name, ResourceTemplate};
use acpi_tables::{Aml, AmlSink};

use super::to_bytes;
use crate::layout::Range;

/// AML that is encoded already, so that it outlives the values it was made from.
pub(in crate::acpi) struct Encoded(pub(in crate::acpi) Vec<u8>);

impl Aml for Encoded {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

pub(in crate::acpi) fn encoded(aml: &dyn Aml) -> Encoded {
    Encoded(to_bytes(aml))
}

pub(in crate::acpi) fn name(path: &str, value: &dyn Aml) -> Encoded {
    encoded(&Name::new(path.into(), value))
}

pub(in crate::acpi) fn device(path: &str, children: &[Encoded]) -> Encoded {
    encoded(&Device::new(path.into(), references(children)))
}

pub(in crate::acpi) fn resources(children: &[Encoded]) -> Encoded {
    name("_CRS", &ResourceTemplate::new(references(children)))
}

pub(in crate::acpi) fn references(children: &[Encoded]) -> Vec<&dyn Aml> {
    children.iter().map(|child| child as &dyn Aml).collect()
}

pub(in crate::acpi) fn hardware_id(hid: &'static str) -> Encoded {
    if hid.starts_with("PNP") { name("_HID", &EISAName::new(hid)) } else { name("_HID", &hid) }
}

pub(in crate::acpi) fn io_ports(ports: Range) -> Encoded {
    let size = u8::try_from(ports.size).unwrap_or(u8::MAX);
    encoded(&IO::new(low16(ports.base), low16(ports.base), 1, size))
}

pub(in crate::acpi) fn low16(port: u64) -> u16 {
    u16::try_from(port).unwrap_or(u16::MAX)
}

pub(in crate::acpi) fn low32(address: u64) -> u32 {
    u32::try_from(address).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hardware_ids_are_compressed_where_eisa_knows_them() {
        assert_eq!(
            hardware_id("PNP0A08").0,
            [8, b'_', b'H', b'I', b'D', 0x0C, 0x41, 0xD0, 0x0A, 0x08]
        );
        assert!(hardware_id("QEMU0001").0.ends_with(b"QEMU0001\0"));
    }
}
