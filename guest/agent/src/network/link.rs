// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Links and their addresses. A link is found by its hardware address: what the kernel named it first depends on the
//! order of discovery.

use std::net::IpAddr;

use anyhow::{Context, Result, anyhow, bail};
use ecr_agent_protocol::types::{IPAddress, IPFamily, Interface};
use futures_util::TryStreamExt;
use netlink_packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use nix::errno::Errno;
use protobuf::EnumOrUnknown;
use rtnetlink::{LinkMessageBuilder, LinkUnspec};

use super::{BadRequest, Netlink, errno, explain, parse_ip, parse_mac, write_mac};
use crate::uevent::Uevents;

/// netdevice(7).
const IFF_NOARP: u32 = 0x80;
/// linux/if.h: `IFNAMSIZ`, its terminating NUL included.
const NAME_ROOM: usize = 16;
/// What a link is called while its name is given to another.
const SPARE_NAME: &str = "ecr-renamed";

/// Make the link with the hardware address of `wanted` look like it, and bring it up. A link that has just been plugged
/// is waited for.
pub async fn update_interface(wanted: &Interface, uevents: &Uevents) -> Result<()> {
    let plan = Plan::of(wanted).map_err(|error| BadRequest(format!("{error:#}")))?;
    let netlink = Netlink::open()?;
    let link = netlink.await_link(&plan.mac, uevents).await?;
    netlink.apply(&plan, &link).await.with_context(|| {
        format!("set up link {:?} ({}) as {:?}", link.name, wanted.hw_addr, wanted.name)
    })
}

/// An interface, understood.
#[derive(Debug)]
struct Plan {
    mac: [u8; 6],
    name: String,
    addresses: Vec<(IpAddr, u8)>,
    mtu: Option<u32>,
    arp: bool,
}

impl Plan {
    fn of(wanted: &Interface) -> Result<Self> {
        let name = wanted.name.clone();
        if name.len() >= NAME_ROOM || name.contains('/') || name.contains(char::is_whitespace) {
            bail!("{name:?} cannot be the name of a link");
        }
        let mtu = match wanted.mtu {
            0 => None,
            mtu => Some(u32::try_from(mtu).with_context(|| format!("MTU {mtu}"))?),
        };
        Ok(Plan {
            mac: parse_mac(&wanted.hw_addr)?,
            name,
            addresses: wanted.ip_addresses.iter().map(address).collect::<Result<_>>()?,
            mtu,
            arp: wanted.raw_flags & IFF_NOARP == 0,
        })
    }
}

/// The mask is a prefix length in decimal.
fn address(wanted: &IPAddress) -> Result<(IpAddr, u8)> {
    let address = parse_ip(&wanted.address)?;
    let longest = if address.is_ipv4() { 32 } else { 128 };
    match wanted.mask.parse() {
        Ok(length) if length <= longest => Ok((address, length)),
        _ => bail!("{address}: mask {:?} is not a prefix length", wanted.mask),
    }
}

/// What there is to know of a link.
#[derive(Clone, Debug)]
pub struct Link {
    pub index: u32,
    pub name: String,
    pub mac: Vec<u8>,
    mtu: u32,
    up: bool,
}

impl Link {
    fn of(message: &LinkMessage) -> Self {
        let mut link = Link {
            index: message.header.index,
            name: String::new(),
            mac: Vec::new(),
            mtu: 0,
            up: message.header.flags.contains(LinkFlags::Up),
        };
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name.clone_from(name),
                LinkAttribute::Address(mac) => link.mac.clone_from(mac),
                LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
                _ => {}
            }
        }
        link
    }
}

impl Netlink {
    pub(super) async fn links(&self) -> Result<Vec<Link>> {
        let links = self.handle.link().get().execute().map_ok(|message| Link::of(&message));
        links.try_collect().await.map_err(|error| explain(&error)).context("list the links")
    }

    async fn addresses(&self) -> Result<Vec<AddressMessage>> {
        let addresses = self.handle.address().get().execute().try_collect();
        addresses.await.map_err(|error| explain(&error)).context("list the addresses")
    }

    async fn await_link(&self, mac: &[u8], uevents: &Uevents) -> Result<Link> {
        let mut wait = uevents.start_wait();
        loop {
            let links = self.links().await?;
            if let Some(link) = links.iter().find(|link| link.mac == mac) {
                return Ok(link.clone());
            }
            if !wait.again().await {
                let known = links.iter().map(|link| write_mac(&link.mac)).collect::<Vec<_>>();
                bail!(
                    "no link has the hardware address {}; there are {}",
                    write_mac(mac),
                    known.join(", ")
                );
            }
        }
    }

    /// Its name cannot be changed while a link is up.
    async fn apply(&self, plan: &Plan, link: &Link) -> Result<()> {
        if link.up {
            self.set(LinkUnspec::new_with_index(link.index).down()).await.context("set it down")?;
        }
        for address in self.addresses().await? {
            if address.header.index == link.index {
                self.remove_address(address).await?;
            }
        }
        if !plan.name.is_empty() && plan.name != link.name {
            self.rename(link, &plan.name).await?;
        }
        let mut last = LinkUnspec::new_with_index(link.index).arp(plan.arp).up();
        if let Some(mtu) = plan.mtu {
            last = last.mtu(mtu);
        }
        // Before it is up, so that the kernel has no time to announce anything else.
        for &(address, length) in &plan.addresses {
            self.add_address(link.index, address, length).await?;
        }
        self.set(last).await.with_context(|| format!("bring it up with MTU {:?}", plan.mtu))
    }

    async fn set(&self, change: LinkMessageBuilder<LinkUnspec>) -> Result<()> {
        let done = self.handle.link().set(change.build()).execute().await;
        done.map_err(|error| explain(&error))
    }

    /// The name may be another link's, which the kernel has found first: then the two change names.
    async fn rename(&self, link: &Link, name: &str) -> Result<()> {
        let attempt = || format!("rename it to {name:?}");
        let other = self.links().await?.into_iter().find(|other| other.name == name);
        let Some(other) = other else {
            let change = LinkUnspec::new_with_index(link.index).name(name);
            return self.set(change).await.with_context(attempt);
        };
        if other.up {
            bail!("the name {name:?} belongs to a link that is up: {}", write_mac(&other.mac));
        }
        for (index, name) in
            [(other.index, SPARE_NAME), (link.index, name), (other.index, link.name.as_str())]
        {
            let change = LinkUnspec::new_with_index(index).name(name);
            self.set(change).await.with_context(attempt)?;
        }
        Ok(())
    }

    async fn remove_address(&self, address: AddressMessage) -> Result<()> {
        match self.handle.address().del(address).execute().await {
            // With the first address of a network the others may go.
            Err(error) if errno(&error) == Some(Errno::EADDRNOTAVAIL) => Ok(()),
            done => done.map_err(|error| explain(&error)).context("remove an address"),
        }
    }

    async fn add_address(&self, index: u32, address: IpAddr, length: u8) -> Result<()> {
        let mut request = self.handle.address().add(index, address, length);
        if address.is_ipv6() {
            // Whoever gave it has made sure that it is nobody else's; detection would take a second.
            request.message_mut().header.flags |= AddressHeaderFlags::Nodad;
        }
        match request.execute().await {
            Err(error) if errno(&error) == Some(Errno::EEXIST) => Ok(()),
            done => done
                .map_err(|error| explain(&error))
                .with_context(|| format!("add address {address}/{length}")),
        }
    }
}

/// Every link with its addresses.
pub async fn list_interfaces() -> Result<Vec<Interface>> {
    let netlink = Netlink::open()?;
    let (links, addresses) = (netlink.links().await?, netlink.addresses().await?);
    let interface = |link: Link| Interface {
        device: link.name.clone(),
        name: link.name,
        ip_addresses: addresses
            .iter()
            .filter(|address| address.header.index == link.index)
            .filter_map(described)
            .collect(),
        mtu: link.mtu.into(),
        hw_addr: write_mac(&link.mac),
        ..Default::default()
    };
    Ok(links.into_iter().map(interface).collect())
}

fn described(message: &AddressMessage) -> Option<IPAddress> {
    // On a link between two points the address is the other's, and the local one is ours.
    let local = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Local(address) => Some(*address),
        _ => None,
    });
    let address = local.or_else(|| {
        message.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Address(address) => Some(*address),
            _ => None,
        })
    })?;
    Some(IPAddress {
        family: family(address),
        address: address.to_string(),
        mask: message.header.prefix_len.to_string(),
        ..Default::default()
    })
}

pub fn family(address: IpAddr) -> EnumOrUnknown<IPFamily> {
    if address.is_ipv4() { IPFamily::V4.into() } else { IPFamily::V6.into() }
}

/// The link of this name.
pub fn named<'a>(links: &'a [Link], name: &str) -> Result<&'a Link> {
    links.iter().find(|link| link.name == name).ok_or_else(|| {
        let names = links.iter().map(|link| link.name.as_str()).collect::<Vec<_>>();
        anyhow!("there is no link {name:?}; there are {}", names.join(", "))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interface() -> Interface {
        Interface {
            name: "eth0".into(),
            hw_addr: "02:00:00:00:00:01".into(),
            mtu: 1450,
            ip_addresses: vec![IPAddress {
                address: "10.0.0.2".into(),
                mask: "24".into(),
                ..Default::default()
            }],
            ..Default::default()
        }
    }

    #[test]
    fn an_interface_is_understood() {
        let plan = Plan::of(&interface()).unwrap();
        assert_eq!(plan.addresses, [("10.0.0.2".parse().unwrap(), 24)]);
        assert_eq!((plan.mtu, plan.arp), (Some(1450), true));
        let plan = Plan::of(&Interface { raw_flags: IFF_NOARP, mtu: 0, ..interface() }).unwrap();
        assert_eq!((plan.mtu, plan.arp), (None, false));
    }

    #[test]
    fn interfaces_that_make_no_sense() {
        let address = |address: &str, mask: &str| Interface {
            ip_addresses: vec![IPAddress {
                address: address.into(),
                mask: mask.into(),
                ..Default::default()
            }],
            ..interface()
        };
        for wrong in [
            Interface { hw_addr: String::new(), ..interface() },
            Interface { name: "sixteen-bytes-16".into(), ..interface() },
            Interface { name: "a/b".into(), ..interface() },
            Interface { mtu: 1 << 40, ..interface() },
            address("10.0.0", "24"),
            address("10.0.0.2", "33"),
            address("10.0.0.2", "255.255.255.0"),
            address("fd00::1", ""),
        ] {
            assert!(Plan::of(&wrong).is_err(), "{wrong:?}");
        }
    }
}
