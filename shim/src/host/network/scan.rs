// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What is in a pod's network namespace, and what the guest has to be told of it.

use std::net::IpAddr;
use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use ecr_agent_protocol::types;
use ecr_vmm::config::MacAddr;
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{
    InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric,
    RouteProtocol, RouteType,
};

use super::rtnl::Rtnl;
use crate::error::{Error, Kind as ErrorKind};

/// The kind of a link, as far as it matters how it is wired to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// veth, macvlan or a tap: a link whose frames can be redirected, or that a macvtap can sit on.
    Pair,
    /// ipvlan: its address is that of the link below, so no macvtap can sit on it.
    IpVlan,
    /// A macvtap already: its device is the tap.
    MacVtap,
}

/// A link that the guest is to have.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) kind: Kind,
    pub(super) mac: MacAddr,
    pub(super) mtu: u32,
    pub(super) addresses: Vec<AddressMessage>,
    pub(super) interface: types::Interface,
    pub(super) routes: Vec<types::Route>,
    pub(super) neighbors: Vec<types::ARPNeighbor>,
}

/// The links with addresses, in their order. Loopback is the guest's own.
pub(super) async fn scan(rtnl: &Rtnl) -> Result<Vec<Found>> {
    let links = rtnl.links().await?;
    let addresses = rtnl.addresses().await?;
    let routes = rtnl.routes().await?;
    let neighbours = rtnl.neighbours().await?;
    let mut found = Vec::new();
    for link in &links {
        let index = link.header.index;
        let own: Vec<_> =
            addresses.iter().filter(|address| address.header.index == index).cloned().collect();
        if link.header.flags.contains(LinkFlags::Loopback) || own.is_empty() {
            continue;
        }
        let name = link_name(link)?;
        let context = || format!("interface {name}");
        let kind = kind(link).with_context(context)?;
        let link = Link { message: link, name: name.to_owned(), addresses: own };
        refuse_vhost_user(&link).with_context(context)?;
        found.push(link.describe(kind, &routes, &neighbours).with_context(context)?);
    }
    Ok(found)
}

fn link_name(link: &LinkMessage) -> Result<&str> {
    let name = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name.as_str()),
        _ => None,
    });
    name.with_context(|| format!("link {} has no name", link.header.index))
}

/// The kind of a link, or why it cannot be had in a guest.
fn kind(link: &LinkMessage) -> Result<Kind> {
    let unsupported = |text: String| Err(Error::new(ErrorKind::Unimplemented, text).into());
    let info = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => infos.iter().find_map(|info| match info {
            LinkInfo::Kind(kind) => Some(kind),
            _ => None,
        }),
        _ => None,
    });
    match info {
        Some(InfoKind::Veth | InfoKind::MacVlan) => Ok(Kind::Pair),
        Some(InfoKind::Tun) if link.header.link_layer_type == LinkLayerType::Ether => {
            Ok(Kind::Pair)
        }
        Some(InfoKind::IpVlan) => Ok(Kind::IpVlan),
        Some(InfoKind::MacVtap) => Ok(Kind::MacVtap),
        Some(kind) => unsupported(format!("Unsupported network interface: {kind}")),
        None => match parent_device(link) {
            Some(device) => {
                unsupported(format!("physical network interfaces ({device}) are not supported yet"))
            }
            None => unsupported("Unsupported network interface: device".into()),
        },
    }
}

/// The PCI device behind a link.
fn parent_device(link: &LinkMessage) -> Option<&str> {
    let on_pci = link
        .attributes
        .iter()
        .any(|attribute| matches!(attribute, LinkAttribute::ParentDevBusName(bus) if bus == "pci"));
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::ParentDevName(name) if on_pci => Some(name.as_str()),
        _ => None,
    })
}

/// A CNI plugin that offers vhost-user leaves a socket in a directory named after the address.
fn refuse_vhost_user(link: &Link<'_>) -> Result<()> {
    for address in link.addresses.iter().filter_map(ip) {
        let socket = format!("/tmp/vhostuser_{address}/vhu.sock");
        if Path::new(&socket).exists() {
            let text = format!("vhost-user network interfaces ({socket}) are not supported yet");
            bail!(Error::new(ErrorKind::Unimplemented, text));
        }
    }
    Ok(())
}

/// The address itself; of a point-to-point link the near end.
pub(super) fn ip(message: &AddressMessage) -> Option<IpAddr> {
    let find = |local: bool| {
        message.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Local(address) if local => Some(*address),
            AddressAttribute::Address(address) if !local => Some(*address),
            _ => None,
        })
    };
    find(true).or_else(|| find(false))
}

/// A link with what belongs to it.
struct Link<'a> {
    message: &'a LinkMessage,
    name: String,
    addresses: Vec<AddressMessage>,
}

impl Link<'_> {
    fn describe(
        self,
        kind: Kind,
        routes: &[RouteMessage],
        neighbours: &[NeighbourMessage],
    ) -> Result<Found> {
        let index = self.message.header.index;
        let mac = self.mac()?;
        let mtu = self.mtu()?;
        let interface = types::Interface {
            device: self.name.clone(),
            name: self.name.clone(),
            ip_addresses: self.addresses.iter().filter_map(ip_address).collect(),
            mtu: mtu.into(),
            hw_addr: mac.to_string(),
            raw_flags: (self.message.header.flags & LinkFlags::Noarp).bits(),
            ..Default::default()
        };
        let routes =
            routes.iter().filter_map(|message| route(message, index, &self.name)).collect();
        let neighbors =
            neighbours.iter().filter_map(|message| neighbor(message, index, &self.name)).collect();
        let Self { name, addresses, .. } = self;
        Ok(Found { index, name, kind, mac, mtu, addresses, interface, routes, neighbors })
    }

    fn mac(&self) -> Result<MacAddr> {
        let bytes = self.message.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::Address(bytes) => <[u8; 6]>::try_from(bytes.as_slice()).ok(),
            _ => None,
        });
        let mac = MacAddr(bytes.context("no Ethernet address")?);
        ensure!(mac.is_unicast(), "address {mac} is not one of a station");
        Ok(mac)
    }

    fn mtu(&self) -> Result<u32> {
        let mtu = self.message.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::Mtu(mtu) => Some(*mtu),
            _ => None,
        });
        mtu.context("no MTU")
    }
}

fn family(address: IpAddr) -> types::IPFamily {
    if address.is_ipv4() { types::IPFamily::V4 } else { types::IPFamily::V6 }
}

/// An address as the agent takes it: the prefix length is in `mask`.
fn ip_address(message: &AddressMessage) -> Option<types::IPAddress> {
    let address = ip(message).filter(|address| !address.is_loopback())?;
    Some(types::IPAddress {
        family: family(address).into(),
        address: address.to_string(),
        mask: message.header.prefix_len.to_string(),
        ..Default::default()
    })
}

fn route_ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some((*address).into()),
        RouteAddress::Inet6(address) => Some((*address).into()),
        _ => None,
    }
}

/// A route as the agent takes it. Those that the kernel derives from addresses it derives in the guest as well.
fn route(message: &RouteMessage, index: u32, device: &str) -> Option<types::Route> {
    let header = &message.header;
    let mut table = u32::from(header.table);
    let mut own = false;
    let mut route = types::Route {
        device: device.into(),
        scope: u8::from(header.scope).into(),
        flags: (header.flags & RouteFlags::Onlink).bits(),
        ..Default::default()
    };
    route.family = match header.address_family {
        netlink_packet_route::AddressFamily::Inet => types::IPFamily::V4,
        netlink_packet_route::AddressFamily::Inet6 => types::IPFamily::V6,
        _ => return None,
    }
    .into();
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(number) => table = *number,
            RouteAttribute::Oif(oif) => own = *oif == index,
            // A route to everywhere has no destination.
            RouteAttribute::Destination(address) if header.destination_prefix_length > 0 => {
                route.dest = format!("{}/{}", route_ip(address)?, header.destination_prefix_length);
            }
            RouteAttribute::Gateway(address) => route.gateway = route_ip(address)?.to_string(),
            RouteAttribute::PrefSource(address) => route.source = route_ip(address)?.to_string(),
            RouteAttribute::Metrics(metrics) => {
                route.mtu = metrics.iter().find_map(mtu_of).unwrap_or_default();
            }
            _ => {}
        }
    }
    let wanted = own
        && table == u32::from(RouteHeader::RT_TABLE_MAIN)
        && header.protocol != RouteProtocol::Kernel
        && header.kind == RouteType::Unicast
        && !header.flags.contains(RouteFlags::Cloned);
    wanted.then_some(route)
}

fn mtu_of(metric: &RouteMetric) -> Option<u32> {
    match metric {
        RouteMetric::Mtu(mtu) => Some(*mtu),
        _ => None,
    }
}

/// A neighbour as the agent takes it: those that somebody entered to stay.
fn neighbor(message: &NeighbourMessage, index: u32, device: &str) -> Option<types::ARPNeighbor> {
    let header = &message.header;
    if header.ifindex != index || header.state != NeighbourState::Permanent {
        return None;
    }
    let mut neighbor = types::ARPNeighbor {
        device: device.into(),
        state: u16::from(header.state).into(),
        flags: header.flags.bits().into(),
        ..Default::default()
    };
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(address) => {
                let address = match address {
                    NeighbourAddress::Inet(address) => IpAddr::from(*address),
                    NeighbourAddress::Inet6(address) => IpAddr::from(*address),
                    _ => return None,
                };
                neighbor.to_ip_address = Some(types::IPAddress {
                    family: family(address).into(),
                    address: address.to_string(),
                    ..Default::default()
                })
                .into();
            }
            NeighbourAttribute::LinkLayerAddress(bytes) => {
                neighbor.lladdr = MacAddr(bytes.as_slice().try_into().ok()?).to_string();
            }
            _ => {}
        }
    }
    neighbor.to_ip_address.is_some().then_some(neighbor)
}
