// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Storage objects: "make it appear at this mount point".

use std::sync::Arc;

use anyhow::{Result, bail};
use ecr_agent_protocol::agent::Storage;

use crate::sandbox::Sandbox;

/// Make `storages` for `container` appear, in order; returns their mount points for [`remove_storages`]. A failure
/// leaves none of them behind.
pub async fn add_storages(
    _: &Arc<Sandbox>,
    storages: &[Storage],
    container: &str,
) -> Result<Vec<String>> {
    if let Some(storage) = storages.first() {
        bail!(
            "storage {:?} of container {container}: driver {:?} is not supported",
            storage.mount_point,
            storage.driver
        );
    }
    Ok(Vec::new())
}

/// One user less for each of `mount_points`; what nobody uses any more is unmounted. Goes on after an error and returns
/// the first one.
pub async fn remove_storages(_: &Arc<Sandbox>, _mount_points: &[String]) -> Result<()> {
    Ok(())
}
