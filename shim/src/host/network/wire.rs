// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Wiring a link to the guest, and taking the wires off again.
//!
//! - **tcfilter**: a tap beside the link; what one receives leaves through the other. The link keeps its addresses, the
//!   guest has the same, and the kernel here never sees a packet of theirs.
//! - **macvtap**: a macvtap on the link takes over its Ethernet address; the link gets another and loses its IP addresses.

use std::fs::File;
use std::io::{self, Read as _};
use std::net::IpAddr;
use std::os::fd::OwnedFd;

use anyhow::{Context as _, Result, bail};
use ecr_vmm::config::MacAddr;
use netlink_packet_route::address::AddressMessage;
use rtnetlink::AddressMessageBuilder;
use serde::{Deserialize, Serialize};

use crate::config::NetModel;

use super::rtnl::Rtnl;
use super::scan::{Found, Kind, ip};
use super::tap;

/// Indexes of macvtaps start here: `/dev/tap<index>` is one name for all network namespaces, each of which counts its
/// links from 1.
const FIRST_MACVTAP_INDEX: u32 = 8192;
/// How many indexes are tried.
const INDEX_TRIES: u32 = 16;

/// What was done to a link, and is to be undone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Wire {
    /// Frames are redirected between the link and a tap.
    TcFilter {
        /// Its name.
        tap: String,
    },
    /// A macvtap sits on the link.
    MacVtap {
        /// Its name.
        tap: String,
        /// The link's Ethernet address, before the macvtap took it.
        mac: MacAddr,
        /// The link's IP addresses, with the length of their prefix.
        addresses: Vec<(IpAddr, u8)>,
    },
    /// Nothing: the link is a macvtap itself.
    Direct,
}

/// Wire `link`, the `number`th, by `model`. When this fails, the link is as before.
pub(super) async fn connect(
    rtnl: &Rtnl,
    link: &Found,
    number: usize,
    model: NetModel,
    queues: u16,
) -> Result<(Wire, Vec<OwnedFd>)> {
    let name = format!("tap{number}_kata");
    match (link.kind, model) {
        (Kind::MacVtap, _) => Ok((Wire::Direct, tap::open_macvtap(link.index, queues)?)),
        (Kind::Pair, NetModel::MacVtap) => add_macvtap(rtnl, link, name, queues).await,
        _ => add_tap(rtnl, link, name, queues).await,
    }
}

/// Undo [`connect`] on the link called `name`. What is gone already is no error.
pub(super) async fn disconnect(rtnl: &Rtnl, name: &str, wire: &Wire) -> Result<()> {
    match wire {
        Wire::TcFilter { tap } => {
            // The qdisc first: nothing is redirected to a link that goes away.
            if let Some(index) = rtnl.index(name).await? {
                forgive(rtnl.delete_ingress(index).await)
                    .with_context(|| format!("delete the ingress qdisc of {name}"))?;
            }
            delete_link(rtnl, tap).await
        }
        Wire::MacVtap { tap, mac, addresses } => {
            delete_link(rtnl, tap).await?;
            let Some(index) = rtnl.index(name).await? else { return Ok(()) };
            rtnl.set_mac(index, *mac).await.with_context(|| format!("restore {name}"))?;
            for (address, prefix) in addresses {
                rtnl.add_address(address_message(index, *address, *prefix))
                    .await
                    .with_context(|| format!("restore address {address}/{prefix} of {name}"))?;
            }
            Ok(())
        }
        Wire::Direct => Ok(()),
    }
}

async fn delete_link(rtnl: &Rtnl, name: &str) -> Result<()> {
    if let Some(index) = rtnl.index(name).await? {
        forgive(rtnl.delete_link(index).await).with_context(|| format!("delete {name}"))?;
    }
    Ok(())
}

/// Not there (any longer), in the words of links and of qdiscs.
fn forgive(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error)
            if matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ENOENT | libc::EINVAL)) =>
        {
            Ok(())
        }
        result => result,
    }
}

async fn add_tap(
    rtnl: &Rtnl,
    link: &Found,
    name: String,
    queues: u16,
) -> Result<(Wire, Vec<OwnedFd>)> {
    // Closing these takes the tap away again, whatever fails below.
    let fds = tap::create(&name, queues)?;
    let index = rtnl.index(&name).await?.with_context(|| format!("{name} is gone at once"))?;
    rtnl.bring_up(index, link.mtu).await.with_context(|| name.clone())?;
    rtnl.add_ingress(index).await.with_context(|| format!("add an ingress qdisc to {name}"))?;
    match rtnl.add_ingress(link.index).await {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => bail!(
            "{} has an ingress qdisc already: somebody filters it, or a sandbox that ended was not deleted",
            link.name
        ),
        Err(error) => {
            return Err(error).with_context(|| format!("add an ingress qdisc to {}", link.name));
        }
    }
    let redirected = async {
        rtnl.redirect(link.index, index).await?;
        rtnl.redirect(index, link.index).await
    };
    if let Err(error) = redirected.await {
        if let Err(error) = rtnl.delete_ingress(link.index).await {
            log::warn!("delete the ingress qdisc of {} again: {error}", link.name);
        }
        return Err(error).with_context(|| format!("redirect between {} and {name}", link.name));
    }
    Ok((Wire::TcFilter { tap: name }, fds))
}

async fn add_macvtap(
    rtnl: &Rtnl,
    link: &Found,
    name: String,
    queues: u16,
) -> Result<(Wire, Vec<OwnedFd>)> {
    let index = create_macvtap(rtnl, link, &name).await?;
    let addresses =
        link.addresses.iter().filter_map(|message| Some((ip(message)?, message.header.prefix_len)));
    let wire = Wire::MacVtap { tap: name.clone(), mac: link.mac, addresses: addresses.collect() };
    let taken_over = async {
        // The link's own first: no two links of one device may have the same.
        rtnl.set_mac(link.index, random_mac()?).await.with_context(|| link.name.clone())?;
        rtnl.set_mac(index, link.mac).await.with_context(|| name.clone())?;
        for message in &link.addresses {
            rtnl.delete_address(message.clone())
                .await
                .with_context(|| format!("take the addresses from {}", link.name))?;
        }
        rtnl.bring_up(index, link.mtu).await.with_context(|| name.clone())?;
        tap::open_macvtap(index, queues)
    };
    match taken_over.await {
        Ok(fds) => Ok((wire, fds)),
        Err(error) => {
            if let Err(error) = disconnect(rtnl, &link.name, &wire).await {
                log::warn!("undo: {error:#}");
            }
            Err(error)
        }
    }
}

/// Make the macvtap, with an index that no other namespace has.
async fn create_macvtap(rtnl: &Rtnl, link: &Found, name: &str) -> Result<u32> {
    let what = || format!("create macvtap {name} on {}", link.name);
    for _ in 0..INDEX_TRIES {
        let number = u32::from_ne_bytes(random()?) & 0x00ff_ffff;
        let index = FIRST_MACVTAP_INDEX + number;
        match rtnl.add_macvtap(name, index, link.index).await {
            Ok(()) => return Ok(index),
            Err(error) if matches!(error.raw_os_error(), Some(libc::EBUSY)) => {}
            Err(error) => return Err(error).with_context(what),
        }
    }
    bail!("{}: {INDEX_TRIES} random indexes are taken", what());
}

fn address_message(index: u32, address: IpAddr, prefix: u8) -> AddressMessage {
    match address {
        IpAddr::V4(address) => AddressMessageBuilder::<std::net::Ipv4Addr>::new()
            .index(index)
            .address(address, prefix)
            .build(),
        IpAddr::V6(address) => AddressMessageBuilder::<std::net::Ipv6Addr>::new()
            .index(index)
            .address(address, prefix)
            .build(),
    }
}

/// An address of one station, administered by nobody.
fn random_mac() -> Result<MacAddr> {
    let mut bytes = random::<6>()?;
    bytes[0] = bytes[0] & 0xfc | 0x02;
    Ok(MacAddr(bytes))
}

fn random<const N: usize>() -> Result<[u8; N]> {
    const PATH: &str = "/dev/urandom";
    let mut bytes = [0; N];
    File::open(PATH).and_then(|mut file| file.read_exact(&mut bytes)).context(PATH)?;
    Ok(bytes)
}
