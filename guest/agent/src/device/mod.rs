// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Devices that the runtime plugged for a container: each is waited for, and its entry in the container's OCI
//! specification, which has the host's numbers, gets the guest's.
//!
//! Left out: directly assigned devices (`vfio*`), and those of other architectures.

mod block;
mod pci;

use std::collections::HashMap;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use ecr_agent_protocol::agent::Device;
use ecr_agent_protocol::oci::Spec;

pub use block::Disk;
pub use pci::PciPath;

use crate::sandbox::Sandbox;
use crate::uevent::Uevents;

/// How specifications write "block device".
const BLOCK: &str = "b";

/// The kinds of device that [`devices_into_spec`] knows.
pub const HANDLERS: [&str; 4] = ["blk", "mmioblk", "nvdimm", "scsi"];

/// Wait for every device, and put its numbers into `spec`: into the device's node, and into the rules for it.
pub async fn devices_into_spec(
    sandbox: &Arc<Sandbox>,
    devices: &[Device],
    spec: &mut Spec,
) -> Result<()> {
    let mut found = HashMap::new();
    for device in devices {
        let disk = find(device, &sandbox.uevents)
            .await
            .with_context(|| format!("device {:?} for {:?}", device.id, device.container_path))?;
        if found.insert(device.container_path.clone(), disk).is_some() {
            bail!("two devices are meant for {:?}", device.container_path);
        }
    }
    renumber(spec, &found)
}

async fn find(device: &Device, uevents: &Uevents) -> Result<Disk> {
    if device.container_path.is_empty() {
        bail!("its path in the container is missing");
    }
    let missing = |what: &str| format!("{what} is missing, which says where a {} is", device.type_);
    match device.type_.as_str() {
        "blk" if device.id.is_empty() => bail!(missing("the id")),
        "blk" => Disk::at_pci(&device.id.parse()?, uevents).await,
        "scsi" if device.id.is_empty() => bail!(missing("the id")),
        "scsi" => Disk::at_scsi(&device.id, uevents).await,
        "mmioblk" | "nvdimm" if device.vm_path.is_empty() => bail!(missing("the vm_path")),
        "mmioblk" | "nvdimm" => Disk::at_node(&device.vm_path, uevents).await,
        "" => bail!("its type is missing"),
        vfio if vfio.starts_with("vfio") => {
            bail!("devices of type {vfio} (direct assignment) are not supported by this agent")
        }
        other => bail!("type {other:?} is not known; known are {}", HANDLERS.join(", ")),
    }
}

/// Numbers of a block device, as specifications write them.
type Numbers = (i64, i64);

/// All at once: the numbers that one device has on the host may be those that another has in the guest.
fn renumber(spec: &mut Spec, found: &HashMap<String, Disk>) -> Result<()> {
    let linux = spec.linux.mut_or_insert_default();
    let mut changed: HashMap<Numbers, Numbers> = HashMap::new();
    for (path, disk) in found {
        let node = linux
            .devices
            .iter_mut()
            .find(|node| node.path == *path)
            .with_context(|| format!("Missing devices in OCI spec: {path:?}"))?;
        let new = (i64::from(disk.major), i64::from(disk.minor));
        changed.insert((node.major, node.minor), new);
        (node.major, node.minor) = new;
        node.type_ = BLOCK.into();
    }
    if let Some(resources) = linux.resources.as_mut() {
        for rule in resources.devices.iter_mut().filter(|rule| rule.type_ == BLOCK) {
            if let Some(&new) = changed.get(&(rule.major, rule.minor)) {
                (rule.major, rule.minor) = new;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use ecr_agent_protocol::oci::{Linux, LinuxDevice, LinuxDeviceCgroup, LinuxResources};
    use protobuf::MessageField;
    use std::path::PathBuf;

    use crate::sandbox::tests::sandbox;

    fn disk(major: u32, minor: u32) -> Disk {
        Disk { node: PathBuf::from("/dev/vda"), major, minor }
    }

    fn spec(nodes: &[(&str, i64, i64)]) -> Spec {
        let device = |&(path, major, minor): &(&str, i64, i64)| LinuxDevice {
            path: path.into(),
            type_: BLOCK.into(),
            major,
            minor,
            ..Default::default()
        };
        let rule = |&(_, major, minor): &(&str, i64, i64)| LinuxDeviceCgroup {
            type_: BLOCK.into(),
            major,
            minor,
            ..Default::default()
        };
        let resources =
            LinuxResources { devices: nodes.iter().map(rule).collect(), ..Default::default() };
        let linux = Linux {
            devices: nodes.iter().map(device).collect(),
            resources: MessageField::some(resources),
            ..Default::default()
        };
        Spec { linux: MessageField::some(linux), ..Default::default() }
    }

    fn numbers(spec: &Spec) -> (Vec<Numbers>, Vec<Numbers>) {
        let rules = &spec.linux.resources.devices;
        (
            spec.linux.devices.iter().map(|node| (node.major, node.minor)).collect(),
            rules.iter().map(|rule| (rule.major, rule.minor)).collect(),
        )
    }

    #[test]
    fn numbers_that_change_places_do_not_get_mixed_up() {
        let mut spec = spec(&[("/dev/a", 8, 0), ("/dev/b", 8, 16), ("/dev/c", 8, 32)]);
        let found = HashMap::from([
            ("/dev/a".to_string(), disk(8, 16)),
            ("/dev/b".to_string(), disk(8, 0)),
        ]);
        renumber(&mut spec, &found).unwrap();
        let expected = vec![(8, 16), (8, 0), (8, 32)];
        assert_eq!(numbers(&spec), (expected.clone(), expected));
    }

    #[test]
    fn a_device_that_the_specification_does_not_have() {
        let mut spec = spec(&[("/dev/a", 8, 0)]);
        let found = HashMap::from([("/dev/b".to_string(), disk(8, 16))]);
        let error = renumber(&mut spec, &found).unwrap_err().to_string();
        assert!(error.starts_with("Missing devices in OCI spec"), "{error}");
        assert!(renumber(&mut Spec::default(), &HashMap::new()).is_ok());
    }

    #[tokio::test(flavor = "current_thread")]
    async fn devices_that_make_no_sense() {
        let sandbox = sandbox();
        for (kind, id, vm_path, complaint) in [
            ("", "02/01", "", "its type is missing"),
            ("blk", "", "/dev/vda", "the id is missing"),
            ("blk", "nonsense", "", "PCI path"),
            ("scsi", "", "", "the id is missing"),
            ("scsi", "nonsense", "", "SCSI address"),
            ("nvdimm", "1", "", "the vm_path is missing"),
            ("nvdimm", "1", "/etc/passwd", "expected /dev/NAME"),
            ("vfio-pci-gk", "1", "", "not supported"),
            ("floppy", "1", "", "is not known"),
        ] {
            let device = Device {
                type_: kind.into(),
                id: id.into(),
                vm_path: vm_path.into(),
                container_path: "/dev/x".into(),
                ..Default::default()
            };
            let mut spec = spec(&[("/dev/x", 8, 0)]);
            let error = devices_into_spec(&sandbox, &[device], &mut spec).await.unwrap_err();
            assert!(format!("{error:#}").contains(complaint), "{error:#}");
        }
        let nowhere = Device { type_: "blk".into(), id: "02".into(), ..Default::default() };
        let error = find(&nowhere, &sandbox.uevents).await.unwrap_err().to_string();
        assert!(error.contains("path in the container"), "{error}");
    }
}
