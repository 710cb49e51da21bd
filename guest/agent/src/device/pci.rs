// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Where a PCI device is: paths such as `02/01`, slot by slot from the root bus down, and the place in sysfs that they
//! lead to.
//!
//! A path cannot name a bus number, because the guest chooses those. Left out: paths that begin below another root
//! bus than number 0, which only directly assigned devices have.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result, bail};

/// x86, and arm64 with ACPI.
const ROOT_BUS: &str = "devices/pci0000:00";
/// arm64 with a device tree: `devices/platform/<node>.pcie/pci0000:00`.
const PLATFORM: &str = "devices/platform";
/// Deeper than any tree of bridges: a path has no reason to be longer.
const DEEPEST: usize = 16;

const SLOTS: u8 = 32;
const FUNCTIONS: u8 = 8;

/// A way from the root bus to a function of a device: one step for each bridge, and the last one for the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PciPath(Vec<Step>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Step {
    slot: u8,
    function: u8,
}

impl PciPath {
    /// From slot numbers, each of function 0.
    pub fn from_slots(slots: &[u32]) -> Result<Self> {
        let text = slots.iter().map(|slot| format!("{slot:02x}")).collect::<Vec<_>>().join("/");
        text.parse()
    }

    /// The device's directory in sysfs, which is mounted at `sys`.
    pub fn find(&self, sys: &Path) -> Result<PathBuf> {
        let mut device = root_bus(sys)?;
        let mut bus = "0000:00".to_string();
        for (index, Step { slot, function }) in self.0.iter().enumerate() {
            if index > 0 {
                bus = only_bus(&device)?;
            }
            device.push(format!("{bus}:{slot:02x}.{function}"));
            if !device.exists() {
                bail!("{} is not there", device.display());
            }
        }
        Ok(device)
    }
}

impl FromStr for PciPath {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let steps = text
            .split('/')
            .map(step)
            .collect::<Option<Vec<_>>>()
            .filter(|steps| steps.len() <= DEEPEST);
        steps.map(PciPath).with_context(|| {
            format!("PCI path {text:?}: expected slots in hexadecimal from the root bus down, such as 02/01")
        })
    }
}

impl fmt::Display for PciPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, Step { slot, function }) in self.0.iter().enumerate() {
            let separator = if index > 0 { "/" } else { "" };
            write!(f, "{separator}{slot:02x}")?;
            if *function > 0 {
                write!(f, ".{function}")?;
            }
        }
        Ok(())
    }
}

/// `SS` or `SS.F`.
fn step(text: &str) -> Option<Step> {
    let (slot, function) = text.split_once('.').unwrap_or((text, "0"));
    let number = |digits: &str, end| {
        let plain = (1..=2).contains(&digits.len()) && !digits.starts_with('+');
        u8::from_str_radix(digits, 16).ok().filter(|&number| plain && number < end)
    };
    Some(Step { slot: number(slot, SLOTS)?, function: number(function, FUNCTIONS)? })
}

fn root_bus(sys: &Path) -> Result<PathBuf> {
    let usual = sys.join(ROOT_BUS);
    if usual.exists() {
        return Ok(usual);
    }
    let platform = fs::read_dir(sys.join(PLATFORM)).into_iter().flatten().flatten();
    platform
        .filter(|entry| entry.file_name().to_string_lossy().ends_with(".pcie"))
        .map(|entry| entry.path().join("pci0000:00"))
        .find(|bus| bus.exists())
        .with_context(|| format!("there is no PCI root bus below {}", sys.display()))
}

/// `DDDD:BB` of the bus behind `bridge`.
fn only_bus(bridge: &Path) -> Result<String> {
    let directory = bridge.join("pci_bus");
    let buses: Vec<_> = fs::read_dir(&directory)
        .with_context(|| format!("look for the bus behind {}: is it a bridge?", bridge.display()))?
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    match buses.as_slice() {
        [bus] => Ok(bus.clone()),
        _ => bail!("{} has {} entries instead of one", directory.display(), buses.len()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_read_and_written() {
        for text in ["02/01", "02", "1f/1e/00", "02/01.7"] {
            assert_eq!(text.parse::<PciPath>().unwrap().to_string(), text);
        }
        assert_eq!("2/1.0".parse::<PciPath>().unwrap().to_string(), "02/01");
        assert_eq!(PciPath::from_slots(&[2, 30]).unwrap().to_string(), "02/1e");
    }

    #[test]
    fn what_is_no_path() {
        let long = ["01"; DEEPEST + 1].join("/");
        for text in ["", "/", "02/", "/02", "20", "02/01.8", "02/01.", "+2", "002", "../..", &long]
        {
            let error = text.parse::<PciPath>().unwrap_err().to_string();
            assert!(error.contains(&format!("{text:?}")), "{error}");
        }
        assert!(PciPath::from_slots(&[]).is_err());
        assert!(PciPath::from_slots(&[2, 32]).is_err());
        assert!(PciPath::from_slots(&[u32::MAX]).is_err());
    }

    #[test]
    fn bridges_are_walked_by_the_buses_behind_them() {
        let sys = tempfile::tempdir().unwrap();
        let path: PciPath = "02/01".parse().unwrap();
        let missing = |path: &PciPath| path.find(sys.path()).unwrap_err().to_string();
        assert!(missing(&path).contains("no PCI root bus"));

        let bridge = sys.path().join("devices/pci0000:00/0000:00:02.0");
        fs::create_dir_all(&bridge).unwrap();
        assert!(missing(&path).contains("is it a bridge?"));
        fs::create_dir_all(bridge.join("pci_bus/0000:05")).unwrap();
        assert!(missing(&path).contains("0000:05:01.0 is not there"));
        fs::create_dir(bridge.join("0000:05:01.0")).unwrap();
        assert_eq!(path.find(sys.path()).unwrap(), bridge.join("0000:05:01.0"));
        assert_eq!("02".parse::<PciPath>().unwrap().find(sys.path()).unwrap(), bridge);

        fs::create_dir_all(bridge.join("pci_bus/0000:06")).unwrap();
        assert!(missing(&path).contains("2 entries"));
    }

    #[test]
    fn the_root_bus_of_a_device_tree_is_a_platform_device() {
        let sys = tempfile::tempdir().unwrap();
        let device = sys.path().join("devices/platform/4010000000.pcie/pci0000:00/0000:00:03.0");
        fs::create_dir_all(&device).unwrap();
        fs::create_dir_all(sys.path().join("devices/platform/serial")).unwrap();
        assert_eq!("03".parse::<PciPath>().unwrap().find(sys.path()).unwrap(), device);
    }
}
