// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Routes of the main table.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context, Result, bail};
use ecr_agent_protocol::types::{IPFamily, Route};
use futures_util::TryStreamExt;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric,
    RouteProtocol, RouteType,
};
use nix::errno::Errno;
use rtnetlink::RouteMessageBuilder;

use super::link::{Link, family, named};
use super::{BadRequest, Netlink, errno, explain, parse_ip, parse_prefix};

const LOOPBACK: &str = "lo";

/// Replace all routes but the kernel's own and the loopback link's by `wanted`; returns what there is then.
pub async fn update_routes(wanted: &[Route]) -> Result<Vec<Route>> {
    let netlink = Netlink::open()?;
    let links = netlink.links().await?;
    let mut plans = wanted
        .iter()
        .map(|route| {
            plan(route, &links).with_context(|| {
                format!(
                    "route to {:?} through {:?} on {:?}",
                    route.dest, route.gateway, route.device
                )
            })
        })
        .collect::<Result<Vec<_>>>()
        .map_err(|error| BadRequest(format!("{error:#}")))?;
    // The way to a gateway has to be there before a route goes through it.
    plans.sort_by_key(has_gateway);

    let loopback = links.iter().find(|link| link.name == LOOPBACK).map(|link| link.index);
    for route in netlink.routes().await? {
        let ours = route.header.protocol != RouteProtocol::Kernel
            && (loopback.is_none() || out(&route) != loopback);
        if ours {
            netlink.remove_route(route).await?;
        }
    }
    for (plan, route) in plans.into_iter().map(|plan| (plan.clone(), described(&plan, &links))) {
        netlink.add_route(plan).await.with_context(|| {
            format!(
                "add the route to {:?} through {:?} on {:?}",
                route.dest, route.gateway, route.device
            )
        })?;
    }
    netlink.described_routes(&links).await
}

/// The routes of the main table.
pub async fn list_routes() -> Result<Vec<Route>> {
    let netlink = Netlink::open()?;
    let links = netlink.links().await?;
    netlink.described_routes(&links).await
}

impl Netlink {
    /// Those of the main table that lead somewhere.
    async fn routes(&self) -> Result<Vec<RouteMessage>> {
        let mut routes = Vec::new();
        let dumps = [
            RouteMessageBuilder::<Ipv4Addr>::new().build(),
            RouteMessageBuilder::<Ipv6Addr>::new().build(),
        ];
        for dump in dumps {
            let found = self.handle.route().get(dump).execute().try_collect::<Vec<_>>().await;
            routes.extend(found.map_err(|error| explain(&error)).context("list the routes")?);
        }
        routes.retain(|route| {
            route.header.table == RouteHeader::RT_TABLE_MAIN
                && route.header.kind == RouteType::Unicast
        });
        Ok(routes)
    }

    async fn described_routes(&self, links: &[Link]) -> Result<Vec<Route>> {
        Ok(self.routes().await?.iter().map(|route| described(route, links)).collect())
    }

    async fn remove_route(&self, route: RouteMessage) -> Result<()> {
        match self.handle.route().del(route).execute().await {
            // It went with another one.
            Err(error) if errno(&error) == Some(Errno::ESRCH) => Ok(()),
            done => done.map_err(|error| explain(&error)).context("remove a route"),
        }
    }

    async fn add_route(&self, route: RouteMessage) -> Result<()> {
        match self.handle.route().add(route).execute().await {
            Err(error) if errno(&error) == Some(Errno::EEXIST) => Ok(()),
            done => done.map_err(|error| explain(&error)),
        }
    }
}

/// `wanted` as the kernel takes it.
fn plan(wanted: &Route, links: &[Link]) -> Result<RouteMessage> {
    let gateway = optional(&wanted.gateway, parse_ip)?;
    let source = optional(&wanted.source, |text| Ok(parse_prefix(text)?.0))?;
    let destination = match wanted.dest.as_str() {
        "" | "default" => None,
        text => Some(parse_prefix(text)?),
    };
    let v6 = match (destination, gateway, source) {
        (Some((address, _)), ..) | (None, Some(address), _) | (None, None, Some(address)) => {
            address.is_ipv6()
        }
        (None, None, None) => wanted.family.enum_value() == Ok(IPFamily::V6),
    };
    if [gateway, source].into_iter().flatten().any(|address| address.is_ipv6() != v6) {
        bail!("IPv4 and IPv6 are mixed");
    }
    let any = if v6 { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
    let (address, length) = destination.unwrap_or((any, 0));

    let mut route = RouteMessage::default();
    route.header.address_family = if v6 { AddressFamily::Inet6 } else { AddressFamily::Inet };
    route.header.table = RouteHeader::RT_TABLE_MAIN;
    route.header.kind = RouteType::Unicast;
    route.header.protocol = RouteProtocol::Boot;
    route.header.scope =
        u8::try_from(wanted.scope).with_context(|| format!("scope {}", wanted.scope))?.into();
    route.header.flags = RouteFlags::from_bits_retain(wanted.flags) & RouteFlags::Onlink;
    route.header.destination_prefix_length = length;
    let mut push = |attribute| route.attributes.push(attribute);
    if length > 0 {
        push(RouteAttribute::Destination(masked(address, length).into()));
    }
    if let Some(gateway) = gateway {
        push(RouteAttribute::Gateway(gateway.into()));
    }
    if let Some(source) = source {
        push(RouteAttribute::PrefSource(source.into()));
    }
    if !wanted.device.is_empty() {
        push(RouteAttribute::Oif(named(links, &wanted.device)?.index));
    } else if gateway.is_none() {
        bail!("it has neither a gateway nor a device");
    }
    if wanted.mtu > 0 {
        push(RouteAttribute::Metrics(vec![RouteMetric::Mtu(wanted.mtu)]));
    }
    Ok(route)
}

fn optional<T>(text: &str, parse: impl Fn(&str) -> Result<T>) -> Result<Option<T>> {
    if text.is_empty() { Ok(None) } else { parse(text).map(Some) }
}

/// The kernel refuses destinations that have bits behind their prefix.
fn masked(address: IpAddr, length: u8) -> IpAddr {
    match address {
        IpAddr::V4(address) => {
            let mask = u32::MAX.checked_shl(32 - u32::from(length)).unwrap_or(0);
            Ipv4Addr::from_bits(address.to_bits() & mask).into()
        }
        IpAddr::V6(address) => {
            let mask = u128::MAX.checked_shl(128 - u32::from(length)).unwrap_or(0);
            Ipv6Addr::from_bits(address.to_bits() & mask).into()
        }
    }
}

fn has_gateway(route: &RouteMessage) -> bool {
    route.attributes.iter().any(|attribute| matches!(attribute, RouteAttribute::Gateway(_)))
}

fn out(route: &RouteMessage) -> Option<u32> {
    route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Oif(index) => Some(*index),
        _ => None,
    })
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some((*address).into()),
        RouteAddress::Inet6(address) => Some((*address).into()),
        _ => None,
    }
}

/// A default route has no destination.
fn described(message: &RouteMessage, links: &[Link]) -> Route {
    let any: IpAddr = match message.header.address_family {
        AddressFamily::Inet6 => Ipv6Addr::UNSPECIFIED.into(),
        _ => Ipv4Addr::UNSPECIFIED.into(),
    };
    let mut route = Route {
        scope: u8::from(message.header.scope).into(),
        family: family(any),
        flags: message.header.flags.bits(),
        ..Default::default()
    };
    let text = |address: &RouteAddress| ip(address).map(|ip| ip.to_string()).unwrap_or_default();
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => {
                let length = message.header.destination_prefix_length;
                route.dest = format!("{}/{length}", text(address));
            }
            RouteAttribute::Gateway(address) => route.gateway = text(address),
            RouteAttribute::PrefSource(address) => route.source = text(address),
            RouteAttribute::Oif(index) => {
                let link = links.iter().find(|link| link.index == *index);
                route.device = link.map(|link| link.name.clone()).unwrap_or_default();
            }
            RouteAttribute::Metrics(metrics) => {
                for metric in metrics {
                    if let RouteMetric::Mtu(mtu) = metric {
                        route.mtu = *mtu;
                    }
                }
            }
            _ => {}
        }
    }
    route
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(dest: &str, gateway: &str, device: &str, source: &str) -> Route {
        Route {
            dest: dest.into(),
            gateway: gateway.into(),
            device: device.into(),
            source: source.into(),
            ..Default::default()
        }
    }

    fn both_ways(wanted: &Route) -> Result<Route> {
        plan(wanted, &[]).map(|plan| described(&plan, &[]))
    }

    #[test]
    fn routes_are_understood() {
        let to = both_ways(&route("10.1.2.3/16", "10.0.0.1", "", "10.0.0.2/0")).unwrap();
        assert_eq!((to.dest.as_str(), to.gateway.as_str()), ("10.1.0.0/16", "10.0.0.1"));
        assert_eq!(to.source, "10.0.0.2");
        let default = both_ways(&route("", "fd00::1", "", "")).unwrap();
        assert_eq!((default.dest.as_str(), default.gateway.as_str()), ("", "fd00::1"));
        assert_eq!(default.family.enum_value(), Ok(IPFamily::V6));
        for any in ["default", "0.0.0.0/0"] {
            assert_eq!(both_ways(&route(any, "10.0.0.1", "", "")).unwrap().dest, "");
        }
        let host = both_ways(&route("10.0.0.9", "10.0.0.1", "", "")).unwrap();
        assert_eq!(host.dest, "10.0.0.9/32");
    }

    #[test]
    fn flags_and_mtu() {
        let onlink = RouteFlags::Onlink.bits();
        let wanted = Route { flags: onlink | 1, mtu: 1400, ..route("", "10.0.0.1", "", "") };
        let understood = both_ways(&wanted).unwrap();
        assert_eq!((understood.flags, understood.mtu), (onlink, 1400));
    }

    #[test]
    fn routes_that_make_no_sense() {
        for wrong in [
            route("", "", "", ""),
            route("10.0.0.0/8", "", "", ""),
            route("10.0.0.0/8", "", "eth7", ""),
            route("10.0.0.0/8", "fd00::1", "", ""),
            route("10.0.0.0/8", "10.0.0.1", "", "fd00::2"),
            route("10.0.0.0/40", "10.0.0.1", "", ""),
            route("nowhere", "10.0.0.1", "", ""),
            Route { scope: 256, ..route("", "10.0.0.1", "", "") },
        ] {
            assert!(plan(&wrong, &[]).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn masks_of_every_length() {
        assert_eq!(masked("255.255.255.255".parse().unwrap(), 0).to_string(), "0.0.0.0");
        assert_eq!(masked("255.255.255.255".parse().unwrap(), 31).to_string(), "255.255.255.254");
        assert_eq!(masked("255.255.255.255".parse().unwrap(), 32).to_string(), "255.255.255.255");
        assert_eq!(masked("fd00::1".parse().unwrap(), 127).to_string(), "fd00::");
    }
}
