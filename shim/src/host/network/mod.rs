// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! A pod's network: what is in its namespace is found, wired to taps, and described for the guest.
//!
//! [`attach`] and [`Network::detach`] block, and do their work in threads of their own inside the namespace. A tap lasts
//! as long as its descriptors, so that little is left when the process dies; the rest is taken away by [`cleanup`] from
//! the [`Record`] that was kept.
//!
//! Left out: physical interfaces (VFIO) and vhost-user; rate limits, which belong to the device.
//!
//! | module | subject |
//! |---|---|
//! | `scan` | what is there, and what the guest is told |
//! | `wire` | links and taps |
//! | `tap` | descriptors |
//! | `rtnl` | netlink |

mod rtnl;
mod scan;
mod tap;
mod wire;

use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use ecr_agent_protocol::types;
use ecr_vmm::config::{MacAddr, NetConfig};
use serde::{Deserialize, Serialize};

use crate::config::NetModel;
use crate::host::netns;
use rtnl::Rtnl;
pub use wire::Wire;

/// A network to be attached.
#[derive(Debug, Clone, Copy)]
pub struct NetworkRequest<'a> {
    /// The pod's network namespace.
    pub netns: &'a Path,
    /// How interfaces are wired.
    pub model: NetModel,
    /// Pairs of queues of each interface.
    pub queues: u16,
    /// Whether the host's kernel may serve the queues.
    pub vhost: bool,
}

/// A network that is attached. Dropping it closes the descriptors and leaves the namespace as it is.
#[derive(Debug)]
pub struct Network {
    netns: PathBuf,
    /// Interfaces, sorted by name.
    pub endpoints: Vec<Endpoint>,
}

/// An interface of the guest.
#[derive(Debug)]
pub struct Endpoint {
    /// Its name, in the namespace and in the guest.
    pub name: String,
    /// Its Ethernet address, by which the agent finds it.
    pub guest_mac: MacAddr,
    /// Its MTU.
    pub mtu: u32,
    /// The tap, once for each pair of queues.
    pub taps: Vec<OwnedFd>,
    /// vhost-net, likewise; empty: the process serves the queues.
    pub vhost: Vec<OwnedFd>,
    /// What the agent is told.
    pub interface: types::Interface,
    routes: Vec<types::Route>,
    neighbors: Vec<types::ARPNeighbor>,
    wire: Wire,
}

/// What is needed to take a network away when the process that attached it is gone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The network namespace.
    pub netns: PathBuf,
    /// Names of links, and what was done to them.
    pub links: Vec<(String, Wire)>,
}

/// Wire every interface of the namespace to a tap. When this fails, the namespace is as before.
pub fn attach(request: NetworkRequest<'_>) -> Result<Network> {
    let mut network = Network { netns: request.netns.to_owned(), endpoints: Vec::new() };
    if request.model == NetModel::None {
        return Ok(network);
    }
    ensure!(request.queues > 0, "a network interface needs at least one pair of queues");
    network.endpoints = in_netns(request.netns, async |rtnl| connect_all(rtnl, request).await)
        .context("attach the network")?;
    network.endpoints.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(network)
}

async fn connect_all(rtnl: &Rtnl, request: NetworkRequest<'_>) -> Result<Vec<Endpoint>> {
    let mut endpoints: Vec<Endpoint> = Vec::new();
    for (number, link) in scan::scan(rtnl).await?.into_iter().enumerate() {
        let name = link.name.clone();
        match connect(rtnl, link, number, request).await {
            Ok(endpoint) => endpoints.push(endpoint),
            Err(error) => {
                for endpoint in endpoints.iter().rev() {
                    undo(rtnl, &endpoint.name, &endpoint.wire).await;
                }
                return Err(error).with_context(|| format!("interface {name}"));
            }
        }
    }
    Ok(endpoints)
}

async fn connect(
    rtnl: &Rtnl,
    link: scan::Found,
    number: usize,
    request: NetworkRequest<'_>,
) -> Result<Endpoint> {
    let vhost = if request.vhost { tap::open_vhost(request.queues)? } else { Vec::new() };
    let (wire, taps) = wire::connect(rtnl, &link, number, request.model, request.queues).await?;
    let scan::Found { name, mac, mtu, interface, routes, neighbors, .. } = link;
    Ok(Endpoint { name, guest_mac: mac, mtu, taps, vhost, interface, routes, neighbors, wire })
}

async fn undo(rtnl: &Rtnl, name: &str, wire: &Wire) {
    if let Err(error) = wire::disconnect(rtnl, name, wire).await {
        log::warn!("detach interface {name}: {error:#}");
    }
}

/// Run `work` with a netlink connection in the namespace.
fn in_netns<T: Send>(path: &Path, work: impl AsyncFnOnce(&Rtnl) -> Result<T> + Send) -> Result<T> {
    netns::inside(path, || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()
            .context("make an event loop")?;
        runtime.block_on(async { work(&Rtnl::connect()?).await })
    })
}

impl Endpoint {
    /// The device for it. Its descriptors stay those of the endpoint.
    pub fn device(&self, id: impl Into<String>) -> NetConfig {
        let numbers = |fds: &[OwnedFd]| fds.iter().map(|fd| fd.as_raw_fd()).collect();
        NetConfig {
            id: id.into(),
            mac: self.guest_mac,
            mtu: u16::try_from(self.mtu).ok(),
            queue_size: NetConfig::default_queue_size(),
            taps: numbers(&self.taps),
            vhost: numbers(&self.vhost),
            tap: None,
        }
    }
}

impl Network {
    /// Interfaces as the agent is told of them.
    pub fn interfaces(&self) -> Vec<types::Interface> {
        self.endpoints.iter().map(|endpoint| endpoint.interface.clone()).collect()
    }

    /// Routes as the agent is told of them.
    pub fn routes(&self) -> Vec<types::Route> {
        self.endpoints.iter().flat_map(|endpoint| endpoint.routes.clone()).collect()
    }

    /// Neighbours as the agent is told of them.
    pub fn neighbors(&self) -> Vec<types::ARPNeighbor> {
        self.endpoints.iter().flat_map(|endpoint| endpoint.neighbors.clone()).collect()
    }

    /// Close our descriptors; the virtual machine has its own.
    pub fn close_descriptors(&mut self) {
        for endpoint in &mut self.endpoints {
            endpoint.taps.clear();
            endpoint.vhost.clear();
        }
    }

    /// What to keep for [`cleanup`].
    pub fn record(&self) -> Record {
        let links =
            self.endpoints.iter().map(|endpoint| (endpoint.name.clone(), endpoint.wire.clone()));
        Record { netns: self.netns.clone(), links: links.collect() }
    }

    /// Take away what [`attach`] added to the namespace. Fine when the namespace is gone, and when called again.
    pub fn detach(&mut self) -> Result<()> {
        self.close_descriptors();
        let record = self.record();
        self.endpoints.clear();
        cleanup(&record)
    }
}

/// Take away what a process that is gone has added to a namespace. What is gone already is no error.
pub fn cleanup(record: &Record) -> Result<()> {
    if record.links.is_empty() || netns::is_gone(&record.netns) {
        return Ok(());
    }
    in_netns(&record.netns, async |rtnl| {
        let mut result = Ok(());
        for (name, wire) in record.links.iter().rev() {
            // One that fails keeps none of the others.
            let done = wire::disconnect(rtnl, name, wire).await;
            result = result.and(done.with_context(|| format!("interface {name}")));
        }
        result
    })
    .context("detach the network")
}

#[cfg(test)]
mod tests;
