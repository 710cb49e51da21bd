// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The calls for the sandbox and the guest it runs in: network, CPUs and memory, time, files, measurements.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use ecr_agent_protocol::agent as msg;
use ecr_agent_protocol::csi::VolumeStatsResponse;
use ecr_agent_protocol::types::Interface;
use protobuf::MessageField;
use protobuf::well_known_types::empty::Empty;
use ttrpc::Result;

use super::{VERSION, internal, unimplemented};
use crate::sandbox::Sandbox;

/// Where the kernel shows its memory blocks.
const MEMORY: &str = "/sys/devices/system/memory";

pub async fn get_guest_details(
    _: &Arc<Sandbox>,
    request: msg::GuestDetailsRequest,
) -> Result<msg::GuestDetailsResponse> {
    let mut response = msg::GuestDetailsResponse {
        agent_details: MessageField::some(msg::AgentDetails {
            version: VERSION.into(),
            init_daemon: std::process::id() == 1,
            ..Default::default()
        }),
        ..Default::default()
    };
    if request.mem_block_size {
        response.mem_block_size_bytes = memory_block_size(Path::new(MEMORY))
            .with_context(|| format!("read the memory block size below {MEMORY}"))
            .map_err(internal)?;
    }
    if request.mem_hotplug_probe {
        response.support_mem_hotplug_probe = Path::new(MEMORY).join("probe").exists();
    }
    Ok(response)
}

/// Bytes per memory block; 0 where the kernel has no memory hotplug.
fn memory_block_size(memory: &Path) -> io::Result<u64> {
    match fs::read_to_string(memory.join("block_size_bytes")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
        text => u64::from_str_radix(text?.trim(), 16).map_err(io::Error::other),
    }
}

pub async fn create_sandbox(_: &Arc<Sandbox>, _: msg::CreateSandboxRequest) -> Result<Empty> {
    unimplemented("CreateSandbox")
}

pub async fn destroy_sandbox(_: &Arc<Sandbox>, _: msg::DestroySandboxRequest) -> Result<Empty> {
    unimplemented("DestroySandbox")
}

pub async fn update_ephemeral_mounts(
    _: &Arc<Sandbox>,
    _: msg::UpdateEphemeralMountsRequest,
) -> Result<Empty> {
    unimplemented("UpdateEphemeralMounts")
}

pub async fn remove_stale_virtiofs_share_mounts(
    _: &Arc<Sandbox>,
    _: msg::RemoveStaleVirtiofsShareMountsRequest,
) -> Result<Empty> {
    unimplemented("RemoveStaleVirtiofsShareMounts")
}

pub async fn get_diagnostic_data(
    _: &Arc<Sandbox>,
    _: msg::GetDiagnosticDataRequest,
) -> Result<msg::GetDiagnosticDataResponse> {
    unimplemented("GetDiagnosticData")
}

pub async fn update_interface(
    _: &Arc<Sandbox>,
    _: msg::UpdateInterfaceRequest,
) -> Result<Interface> {
    unimplemented("UpdateInterface")
}

pub async fn update_routes(_: &Arc<Sandbox>, _: msg::UpdateRoutesRequest) -> Result<msg::Routes> {
    unimplemented("UpdateRoutes")
}

pub async fn list_interfaces(
    _: &Arc<Sandbox>,
    _: msg::ListInterfacesRequest,
) -> Result<msg::Interfaces> {
    unimplemented("ListInterfaces")
}

pub async fn list_routes(_: &Arc<Sandbox>, _: msg::ListRoutesRequest) -> Result<msg::Routes> {
    unimplemented("ListRoutes")
}

pub async fn add_arp_neighbors(_: &Arc<Sandbox>, _: msg::AddARPNeighborsRequest) -> Result<Empty> {
    unimplemented("AddARPNeighbors")
}

pub async fn get_ip_tables(
    _: &Arc<Sandbox>,
    _: msg::GetIPTablesRequest,
) -> Result<msg::GetIPTablesResponse> {
    unimplemented("GetIPTables")
}

pub async fn set_ip_tables(
    _: &Arc<Sandbox>,
    _: msg::SetIPTablesRequest,
) -> Result<msg::SetIPTablesResponse> {
    unimplemented("SetIPTables")
}

pub async fn get_metrics(_: &Arc<Sandbox>, _: msg::GetMetricsRequest) -> Result<msg::Metrics> {
    unimplemented("GetMetrics")
}

pub async fn mem_agent_memcg_set(_: &Arc<Sandbox>, _: msg::MemAgentMemcgConfig) -> Result<Empty> {
    unimplemented("MemAgentMemcgSet")
}

pub async fn mem_agent_compact_set(
    _: &Arc<Sandbox>,
    _: msg::MemAgentCompactConfig,
) -> Result<Empty> {
    unimplemented("MemAgentCompactSet")
}

pub async fn online_cpu_mem(_: &Arc<Sandbox>, _: msg::OnlineCPUMemRequest) -> Result<Empty> {
    unimplemented("OnlineCPUMem")
}

pub async fn reseed_random_dev(_: &Arc<Sandbox>, _: msg::ReseedRandomDevRequest) -> Result<Empty> {
    unimplemented("ReseedRandomDev")
}

pub async fn mem_hotplug_by_probe(
    _: &Arc<Sandbox>,
    _: msg::MemHotplugByProbeRequest,
) -> Result<Empty> {
    unimplemented("MemHotplugByProbe")
}

pub async fn set_guest_date_time(
    _: &Arc<Sandbox>,
    _: msg::SetGuestDateTimeRequest,
) -> Result<Empty> {
    unimplemented("SetGuestDateTime")
}

pub async fn copy_file(_: &Arc<Sandbox>, _: msg::CopyFileRequest) -> Result<Empty> {
    unimplemented("CopyFile")
}

pub async fn add_swap(_: &Arc<Sandbox>, _: msg::AddSwapRequest) -> Result<Empty> {
    unimplemented("AddSwap")
}

pub async fn add_swap_path(_: &Arc<Sandbox>, _: msg::AddSwapPathRequest) -> Result<Empty> {
    unimplemented("AddSwapPath")
}

pub async fn get_volume_stats(
    _: &Arc<Sandbox>,
    _: msg::VolumeStatsRequest,
) -> Result<VolumeStatsResponse> {
    unimplemented("GetVolumeStats")
}

pub async fn resize_volume(_: &Arc<Sandbox>, _: msg::ResizeVolumeRequest) -> Result<Empty> {
    unimplemented("ResizeVolume")
}

pub async fn set_policy(_: &Arc<Sandbox>, _: msg::SetPolicyRequest) -> Result<Empty> {
    unimplemented("SetPolicy")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_block_size_is_hexadecimal() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(memory_block_size(dir.path()).unwrap(), 0);
        fs::write(dir.path().join("block_size_bytes"), "8000000\n").unwrap();
        assert_eq!(memory_block_size(dir.path()).unwrap(), 128 << 20);
        fs::write(dir.path().join("block_size_bytes"), "many\n").unwrap();
        assert!(memory_block_size(dir.path()).is_err());
    }
}
