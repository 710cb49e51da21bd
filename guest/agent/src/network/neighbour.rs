// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Neighbours whose hardware addresses are known beforehand.

use anyhow::{Context, Result};
use ecr_agent_protocol::types::ARPNeighbor;
use netlink_packet_route::neighbour::{NeighbourFlags, NeighbourState};

use super::link::{Link, named};
use super::{BadRequest, Netlink, explain, parse_ip, parse_mac};

/// linux/neighbour.h; what a neighbour is if the request does not say.
const NUD_PERMANENT: u16 = 0x80;

/// Add `neighbours`, or replace them.
pub async fn add_neighbours(neighbours: &[ARPNeighbor]) -> Result<()> {
    let netlink = Netlink::open()?;
    let links = netlink.links().await?;
    for wanted in neighbours {
        let attempt = || {
            format!(
                "neighbour {:?} ({:?}) on {:?}",
                wanted.to_ip_address.address, wanted.lladdr, wanted.device
            )
        };
        let plan = Plan::of(wanted, &links)
            .with_context(attempt)
            .map_err(|error| BadRequest(format!("{error:#}")))?;
        let mut request = netlink
            .handle
            .neighbours()
            .add(plan.link, plan.address)
            .state(NeighbourState::from(plan.state))
            .flags(NeighbourFlags::from_bits_retain(plan.flags))
            .replace();
        if let Some(mac) = plan.mac {
            request = request.link_layer_address(&mac);
        }
        request.execute().await.map_err(|error| explain(&error)).with_context(attempt)?;
    }
    Ok(())
}

#[derive(Debug)]
struct Plan {
    link: u32,
    address: std::net::IpAddr,
    mac: Option<[u8; 6]>,
    state: u16,
    flags: u8,
}

impl Plan {
    fn of(wanted: &ARPNeighbor, links: &[Link]) -> Result<Self> {
        let state = match wanted.state {
            0 => NUD_PERMANENT,
            state => u16::try_from(state).with_context(|| format!("state {state}"))?,
        };
        Ok(Plan {
            link: named(links, &wanted.device)?.index,
            address: parse_ip(&wanted.to_ip_address.address)?,
            mac: (!wanted.lladdr.is_empty()).then(|| parse_mac(&wanted.lladdr)).transpose()?,
            state,
            flags: u8::try_from(wanted.flags).with_context(|| format!("flags {}", wanted.flags))?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_that_make_no_sense() {
        let good = ARPNeighbor {
            to_ip_address: protobuf::MessageField::some(ecr_agent_protocol::types::IPAddress {
                address: "10.0.0.1".into(),
                ..Default::default()
            }),
            lladdr: "02:00:00:00:00:01".into(),
            ..Default::default()
        };
        for wrong in [
            ARPNeighbor { device: "eth7".into(), ..good.clone() },
            ARPNeighbor { to_ip_address: protobuf::MessageField::none(), ..good.clone() },
        ] {
            assert!(Plan::of(&wrong, &[]).is_err(), "{wrong:?}");
        }
    }
}
