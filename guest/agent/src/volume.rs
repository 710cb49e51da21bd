// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! How full a volume is, and swap space on one.

use std::ffi::CString;
use std::path::Path;

use anyhow::{Context, Result};
use ecr_agent_protocol::csi::volume_usage::Unit;
use ecr_agent_protocol::csi::{VolumeCondition, VolumeStatsResponse, VolumeUsage};
use nix::errno::Errno;
use nix::sys::statvfs::statvfs;
use protobuf::MessageField;

use crate::device::{Disk, PciPath};
use crate::uevent::Uevents;

/// `GetVolumeStats`.
pub fn stats(path: &str) -> Result<VolumeStatsResponse> {
    let now = statvfs(path).with_context(|| format!("look at the file system of {path:?}"))?;
    let unit = now.fragment_size();
    let bytes = |blocks: u64| blocks.saturating_mul(unit);
    let usage = |unit: Unit, available: u64, total: u64, free: u64| VolumeUsage {
        available,
        total,
        used: total.saturating_sub(free),
        unit: unit.into(),
        ..Default::default()
    };
    Ok(VolumeStatsResponse {
        usage: vec![
            usage(
                Unit::BYTES,
                bytes(now.blocks_available()),
                bytes(now.blocks()),
                bytes(now.blocks_free()),
            ),
            usage(Unit::INODES, now.files_available(), now.files(), now.files_free()),
        ],
        volume_condition: MessageField::some(VolumeCondition {
            abnormal: false,
            message: "OK".into(),
            ..Default::default()
        }),
        ..Default::default()
    })
}

/// `AddSwap`: the disk at these slots of the PCI tree becomes swap space.
pub async fn add_swap_at(slots: &[u32], uevents: &Uevents) -> Result<()> {
    let disk = Disk::at_pci(&PciPath::from_slots(slots)?, uevents).await?;
    add_swap(&disk.node)
}

/// `AddSwapPath`: this device or file becomes swap space.
pub fn add_swap(path: &Path) -> Result<()> {
    let name = CString::new(path.as_os_str().as_encoded_bytes()).context("swap space")?;
    // SAFETY: the name is a string with a NUL at its end, which lives until the call returns.
    Errno::result(unsafe { libc::swapon(name.as_ptr(), 0) })
        .with_context(|| format!("use {} as swap space", path.display()))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_and_inodes_of_a_volume() {
        let dir = tempfile::tempdir().unwrap();
        let stats = stats(dir.path().to_str().unwrap()).unwrap();
        let units: Vec<_> =
            stats.usage.iter().map(|usage| usage.unit.enum_value().unwrap()).collect();
        assert_eq!(units, [Unit::BYTES, Unit::INODES]);
        assert!(stats.usage[0].total >= stats.usage[0].used);
        assert!(!stats.volume_condition.abnormal);
        assert!(super::stats("/no/such/volume").is_err());
    }

    #[test]
    fn what_is_no_swap_space() {
        let dir = tempfile::tempdir().unwrap();
        let error = add_swap(&dir.path().join("nothing")).unwrap_err().to_string();
        assert!(error.contains("nothing as swap space"), "{error}");
    }
}
