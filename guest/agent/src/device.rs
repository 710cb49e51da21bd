// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Device objects: devices of the virtual machine that a container gets to see.

use std::sync::Arc;

use anyhow::{Result, bail};
use ecr_agent_protocol::agent::Device;
use ecr_agent_protocol::oci::Spec;

use crate::sandbox::Sandbox;

/// Wait for each device and put the numbers it has in this guest into the spec's devices.
pub async fn devices_into_spec(
    _: &Arc<Sandbox>,
    devices: &[Device],
    _spec: &mut Spec,
) -> Result<()> {
    if let Some(device) = devices.first() {
        bail!(
            "device {:?} at {:?}: type {:?} is not supported",
            device.id,
            device.container_path,
            device.type_
        );
    }
    Ok(())
}
