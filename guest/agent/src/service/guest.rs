// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The calls for the sandbox and the guest it runs in: network, CPUs and memory, time, files, measurements.

use std::path::Path;
use std::sync::Arc;

use ecr_agent_protocol::agent as msg;
use ecr_agent_protocol::csi::VolumeStatsResponse;
use ecr_agent_protocol::types::Interface;
use protobuf::MessageField;
use protobuf::well_known_types::empty::Empty;
use ttrpc::{Code, Result};

use super::{VERSION, internal, status, unimplemented};
use crate::network::BadRequest;
use crate::sandbox::{SHARED, Sandbox};
use crate::{
    clock, device, entropy, files, hotplug, metrics, mounts, network, setup, storage, volume,
};

/// INVALID_ARGUMENT for what the caller could have known, else INTERNAL.
fn refused(error: anyhow::Error) -> ttrpc::Error {
    match error.downcast_ref::<BadRequest>() {
        Some(_) => status(Code::INVALID_ARGUMENT, format!("{error:#}")),
        None => internal(error),
    }
}

fn missing(what: &str) -> ttrpc::Error {
    status(Code::INVALID_ARGUMENT, format!("{what} is missing"))
}

/// The outcome of a call that returns nothing.
fn done(outcome: anyhow::Result<()>) -> Result<Empty> {
    outcome.map(|()| Empty::new()).map_err(refused)
}

/// `work` in a thread of its own, for what may take a while: other calls go on.
async fn aside<T: Send + 'static>(
    work: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(internal)?.map_err(refused)
}

pub async fn get_guest_details(
    _: &Arc<Sandbox>,
    request: msg::GuestDetailsRequest,
) -> Result<msg::GuestDetailsResponse> {
    let names = |names: &[&str]| names.iter().map(|&name| name.into()).collect();
    let mut response = msg::GuestDetailsResponse {
        agent_details: MessageField::some(msg::AgentDetails {
            version: VERSION.into(),
            init_daemon: std::process::id() == 1,
            device_handlers: names(&device::HANDLERS),
            storage_handlers: names(&storage::HANDLERS),
            supports_seccomp: true,
            ..Default::default()
        }),
        ..Default::default()
    };
    if request.mem_block_size {
        response.mem_block_size_bytes = hotplug::memory_block_size().map_err(internal)?;
    }
    if request.mem_hotplug_probe {
        response.support_mem_hotplug_probe = hotplug::can_probe_memory();
    }
    Ok(response)
}

pub async fn create_sandbox(
    sandbox: &Arc<Sandbox>,
    request: msg::CreateSandboxRequest,
) -> Result<Empty> {
    done(setup::create(sandbox, &request).await)
}

/// The guest powers off once the answer is on its way.
pub async fn destroy_sandbox(
    sandbox: &Arc<Sandbox>,
    _: msg::DestroySandboxRequest,
) -> Result<Empty> {
    crate::container::lifecycle::remove_all(sandbox).await;
    sandbox.stop();
    Ok(Empty::new())
}

pub async fn update_ephemeral_mounts(
    sandbox: &Arc<Sandbox>,
    request: msg::UpdateEphemeralMountsRequest,
) -> Result<Empty> {
    done(storage::update_ephemeral(sandbox, &request.storages))
}

/// A look at each mount makes the share's server drop what it keeps for those that are gone.
pub async fn remove_stale_virtiofs_share_mounts(
    _: &Arc<Sandbox>,
    _: msg::RemoveStaleVirtiofsShareMountsRequest,
) -> Result<Empty> {
    aside(|| {
        for path in mounts::mounted().iter().filter(|path| path.starts_with(SHARED)) {
            if let Err(error) = std::fs::metadata(path) {
                log::debug!("look at {}: {error}", path.display());
            }
        }
        Ok(Empty::new())
    })
    .await
}

pub async fn get_diagnostic_data(
    sandbox: &Arc<Sandbox>,
    request: msg::GetDiagnosticDataRequest,
) -> Result<msg::GetDiagnosticDataResponse> {
    let container = sandbox.containers.get(&request.container_id)?;
    let data = aside(move || Ok(container.diagnostic(&request.log_type)?)).await?;
    Ok(msg::GetDiagnosticDataResponse { data, ..Default::default() })
}

/// The answer is the request's interface.
pub async fn update_interface(
    sandbox: &Arc<Sandbox>,
    request: msg::UpdateInterfaceRequest,
) -> Result<Interface> {
    let wanted = request.interface.into_option().ok_or_else(|| missing("the interface"))?;
    network::update_interface(&wanted, &sandbox.uevents).await.map_err(refused)?;
    Ok(wanted)
}

pub async fn update_routes(
    _: &Arc<Sandbox>,
    request: msg::UpdateRoutesRequest,
) -> Result<msg::Routes> {
    let wanted = request.routes.into_option().ok_or_else(|| missing("the list of routes"))?;
    let routes = network::update_routes(&wanted.routes).await.map_err(refused)?;
    Ok(msg::Routes { routes, ..Default::default() })
}

pub async fn list_interfaces(
    _: &Arc<Sandbox>,
    _: msg::ListInterfacesRequest,
) -> Result<msg::Interfaces> {
    let interfaces = network::list_interfaces().await.map_err(internal)?;
    Ok(msg::Interfaces { interfaces, ..Default::default() })
}

pub async fn list_routes(_: &Arc<Sandbox>, _: msg::ListRoutesRequest) -> Result<msg::Routes> {
    let routes = network::list_routes().await.map_err(internal)?;
    Ok(msg::Routes { routes, ..Default::default() })
}

pub async fn add_arp_neighbors(
    _: &Arc<Sandbox>,
    request: msg::AddARPNeighborsRequest,
) -> Result<Empty> {
    let wanted =
        request.neighbors.into_option().ok_or_else(|| missing("the list of neighbours"))?;
    done(network::add_neighbours(&wanted.arp_neighbors).await)
}

pub async fn get_ip_tables(
    sandbox: &Arc<Sandbox>,
    request: msg::GetIPTablesRequest,
) -> Result<msg::GetIPTablesResponse> {
    let data = network::get_tables(request.is_ipv6, &sandbox.reaper).await.map_err(internal)?;
    Ok(msg::GetIPTablesResponse { data, ..Default::default() })
}

pub async fn set_ip_tables(
    sandbox: &Arc<Sandbox>,
    request: msg::SetIPTablesRequest,
) -> Result<msg::SetIPTablesResponse> {
    let data = network::set_tables(request.is_ipv6, request.data, &sandbox.reaper)
        .await
        .map_err(internal)?;
    Ok(msg::SetIPTablesResponse { data, ..Default::default() })
}

pub async fn get_metrics(_: &Arc<Sandbox>, _: msg::GetMetricsRequest) -> Result<msg::Metrics> {
    Ok(msg::Metrics { metrics: metrics::text(), ..Default::default() })
}

/// As Kata's agent answers unless it was asked to have one.
const NO_MEMORY_AGENT: &str = "mem-agent is disabled";

pub async fn mem_agent_memcg_set(_: &Arc<Sandbox>, _: msg::MemAgentMemcgConfig) -> Result<Empty> {
    Err(status(Code::INTERNAL, NO_MEMORY_AGENT))
}

pub async fn mem_agent_compact_set(
    _: &Arc<Sandbox>,
    _: msg::MemAgentCompactConfig,
) -> Result<Empty> {
    Err(status(Code::INTERNAL, NO_MEMORY_AGENT))
}

/// `nb_cpus` is how many are to be online in all.
pub async fn online_cpu_mem(_: &Arc<Sandbox>, request: msg::OnlineCPUMemRequest) -> Result<Empty> {
    done(hotplug::put_all_online(request.nb_cpus, !request.cpu_only).await)
}

pub async fn reseed_random_dev(
    _: &Arc<Sandbox>,
    request: msg::ReseedRandomDevRequest,
) -> Result<Empty> {
    done(entropy::add(&request.data))
}

pub async fn mem_hotplug_by_probe(
    _: &Arc<Sandbox>,
    request: msg::MemHotplugByProbeRequest,
) -> Result<Empty> {
    aside(move || hotplug::probe_memory(&request.mem_hotplug_probe_addr)).await?;
    Ok(Empty::new())
}

pub async fn set_guest_date_time(
    _: &Arc<Sandbox>,
    request: msg::SetGuestDateTimeRequest,
) -> Result<Empty> {
    done(clock::set(request.sec, request.usec))
}

pub async fn copy_file(_: &Arc<Sandbox>, request: msg::CopyFileRequest) -> Result<Empty> {
    aside(move || files::copy(&request)).await?;
    Ok(Empty::new())
}

pub async fn add_swap(sandbox: &Arc<Sandbox>, request: msg::AddSwapRequest) -> Result<Empty> {
    done(volume::add_swap_at(&request.pci_path, &sandbox.uevents).await)
}

pub async fn add_swap_path(_: &Arc<Sandbox>, request: msg::AddSwapPathRequest) -> Result<Empty> {
    aside(move || volume::add_swap(Path::new(&request.path))).await?;
    Ok(Empty::new())
}

pub async fn get_volume_stats(
    _: &Arc<Sandbox>,
    request: msg::VolumeStatsRequest,
) -> Result<VolumeStatsResponse> {
    aside(move || volume::stats(&request.volume_guest_path)).await
}

pub async fn resize_volume(_: &Arc<Sandbox>, _: msg::ResizeVolumeRequest) -> Result<Empty> {
    unimplemented("ResizeVolume")
}

pub async fn set_policy(_: &Arc<Sandbox>, _: msg::SetPolicyRequest) -> Result<Empty> {
    unimplemented("SetPolicy")
}
