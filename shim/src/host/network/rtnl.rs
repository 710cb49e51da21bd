// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! rtnetlink(7) as the rest of this module needs it: few calls, and errors that say what the kernel refused.

use std::io;

use anyhow::{Context as _, Result};
use ecr_vmm::config::MacAddr;
use futures_util::TryStreamExt as _;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::AddressMessage;
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute, LinkMessage, MacVtapMode,
};
use netlink_packet_route::neighbour::NeighbourMessage;
use netlink_packet_route::route::RouteMessage;
use netlink_packet_route::tc::TcHandle;
use rtnetlink::{Handle, LinkMacVtap, LinkUnspec};

/// `ETH_P_ALL` in network order, as a filter has it.
const ALL_PROTOCOLS: u16 = (libc::ETH_P_ALL as u16).to_be();
/// The handle of the ingress qdisc, `ffff:`.
const INGRESS: u32 = 0xffff_0000;

/// A connection to the network namespace of the thread that made it.
#[derive(Debug)]
pub(super) struct Rtnl(pub(super) Handle);

impl Rtnl {
    /// Connect. A task of the present runtime serves the connection.
    pub(super) fn connect() -> Result<Self> {
        let (connection, handle, _) =
            rtnetlink::new_connection().context("open a netlink socket")?;
        tokio::spawn(connection);
        Ok(Self(handle))
    }

    pub(super) async fn links(&self) -> Result<Vec<LinkMessage>> {
        self.0.link().get().execute().try_collect().await.map_err(plain).context("list links")
    }

    pub(super) async fn addresses(&self) -> Result<Vec<AddressMessage>> {
        self.0
            .address()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(plain)
            .context("list addresses")
    }

    /// The routes of both families, of all tables.
    pub(super) async fn routes(&self) -> Result<Vec<RouteMessage>> {
        let mut routes = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut query = RouteMessage::default();
            query.header.address_family = family;
            let found: Vec<_> = self
                .0
                .route()
                .get(query)
                .execute()
                .try_collect()
                .await
                .map_err(plain)
                .context("list routes")?;
            routes.extend(found);
        }
        Ok(routes)
    }

    pub(super) async fn neighbours(&self) -> Result<Vec<NeighbourMessage>> {
        self.0
            .neighbours()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(plain)
            .context("list neighbours")
    }

    /// The index of the link called `name`; `None` when there is none.
    pub(super) async fn index(&self, name: &str) -> Result<Option<u32>> {
        let found = self.0.link().get().match_name(name.to_owned()).execute().try_next().await;
        match found.map_err(plain) {
            Ok(link) => Ok(link.map(|link| link.header.index)),
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
            Err(error) => Err(error).with_context(|| format!("look up link {name}")),
        }
    }

    /// Set the MTU of a link and bring it up, without an address of its own: what it sent would be seen by the guest.
    pub(super) async fn bring_up(&self, index: u32, mtu: u32) -> Result<()> {
        let no_address = AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)]);
        let message = LinkUnspec::new_with_index(index)
            .append_extra_attribute(LinkAttribute::AfSpecUnspec(vec![no_address]))
            .build();
        // Fails where IPv6 is switched off, and is not needed there.
        if let Err(error) = self.0.link().change(message).execute().await.map_err(plain) {
            log::debug!("link {index} keeps its IPv6 address: {error}");
        }
        let message = LinkUnspec::new_with_index(index).mtu(mtu).up().build();
        self.change(message).await.with_context(|| format!("set MTU {mtu}, up"))
    }

    pub(super) async fn set_mac(&self, index: u32, mac: MacAddr) -> Result<()> {
        let message = LinkUnspec::new_with_index(index).address(mac.0.to_vec()).build();
        self.change(message).await.with_context(|| format!("set address {mac}"))
    }

    async fn change(&self, message: LinkMessage) -> io::Result<()> {
        self.0.link().change(message).execute().await.map_err(plain)
    }

    /// Make a macvtap in bridge mode, with an index of the caller's choice, on the link `lower`.
    pub(super) async fn add_macvtap(&self, name: &str, index: u32, lower: u32) -> io::Result<()> {
        let message = LinkMacVtap::new(name, lower, MacVtapMode::Bridge).index(index).build();
        self.0.link().add(message).execute().await.map_err(plain)
    }

    pub(super) async fn delete_link(&self, index: u32) -> io::Result<()> {
        self.0.link().del(index).execute().await.map_err(plain)
    }

    pub(super) async fn add_address(&self, message: AddressMessage) -> io::Result<()> {
        let mut request =
            self.0.address().add(message.header.index, std::net::Ipv4Addr::UNSPECIFIED.into(), 0);
        *request.message_mut() = message;
        request.replace().execute().await.map_err(plain)
    }

    pub(super) async fn delete_address(&self, message: AddressMessage) -> io::Result<()> {
        self.0.address().del(message).execute().await.map_err(plain)
    }

    /// Give a link the qdisc at which what it receives can be filtered.
    pub(super) async fn add_ingress(&self, index: u32) -> io::Result<()> {
        self.0.qdisc().add(tc_index(index)?).ingress().execute().await.map_err(plain)
    }

    /// Take it away, and the filters with it.
    pub(super) async fn delete_ingress(&self, index: u32) -> io::Result<()> {
        let mut request = self.0.qdisc().del(tc_index(index)?);
        request.message_mut().header.parent = TcHandle::INGRESS;
        request.message_mut().header.handle = TcHandle::from(INGRESS);
        request.execute().await.map_err(plain)
    }

    /// Whatever `from` receives leaves through `to`: a u32 filter that matches all, with the action mirred.
    pub(super) async fn redirect(&self, from: u32, to: u32) -> io::Result<()> {
        self.0
            .traffic_filter(tc_index(from)?)
            .add()
            .parent(INGRESS)
            .protocol(ALL_PROTOCOLS)
            .redirect(to)
            .map_err(plain)?
            .execute()
            .await
            .map_err(plain)
    }
}

fn tc_index(index: u32) -> io::Result<i32> {
    i32::try_from(index).map_err(|_| io::Error::from_raw_os_error(libc::ENODEV))
}

/// The kernel's own error where there is one.
fn plain(error: rtnetlink::Error) -> io::Error {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io(),
        other => io::Error::other(other.to_string()),
    }
}
