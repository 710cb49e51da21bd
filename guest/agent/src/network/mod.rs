// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The sandbox's network, which all of its containers share: links, addresses, routes, neighbours, packet filter,
//! counters. The runtime says what there is on the host, and the guest gets the same.

mod filter;
mod link;
mod neighbour;
mod route;
mod stats;

use std::net::IpAddr;

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use rtnetlink::Handle;

pub use filter::{get_tables, set_tables};
pub use link::{list_interfaces, update_interface};
pub use neighbour::add_neighbours;
pub use route::{list_routes, update_routes};
pub use stats::stats;

/// What a call asks that no kernel could do: the caller's fault.
#[derive(Debug)]
pub struct BadRequest(pub String);

impl std::fmt::Display for BadRequest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for BadRequest {}

/// A routing socket for one call: calls are rare, and an idle guest needs none.
struct Netlink {
    handle: Handle,
    task: tokio::task::AbortHandle,
}

impl Netlink {
    fn open() -> Result<Self> {
        let (connection, handle, _) =
            rtnetlink::new_connection().context("open a routing socket")?;
        Ok(Netlink { handle, task: tokio::spawn(connection).abort_handle() })
    }
}

impl Drop for Netlink {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The reason that the kernel gave, if it was the kernel.
fn errno(error: &rtnetlink::Error) -> Option<Errno> {
    match error {
        rtnetlink::Error::NetlinkError(message) => {
            Some(Errno::from_raw(message.raw_code().saturating_neg()))
        }
        _ => None,
    }
}

/// An error as short as the kernel's.
fn explain(error: &rtnetlink::Error) -> anyhow::Error {
    match errno(error) {
        Some(errno) => anyhow::Error::new(errno),
        None => anyhow::anyhow!("{error}"),
    }
}

fn parse_ip(text: &str) -> Result<IpAddr> {
    text.parse().with_context(|| format!("{text:?} is not an IP address"))
}

/// `ADDRESS/LENGTH`; without a length it is the address alone.
fn parse_prefix(text: &str) -> Result<(IpAddr, u8)> {
    let (address, length) = match text.split_once('/') {
        Some((address, length)) => (parse_ip(address)?, Some(length)),
        None => (parse_ip(text)?, None),
    };
    let longest = if address.is_ipv4() { 32 } else { 128 };
    let length = match length {
        Some(length) => length.parse().ok().filter(|length| *length <= longest),
        None => Some(longest),
    };
    match length {
        Some(length) => Ok((address, length)),
        None => bail!("{text:?}: the prefix length has to be at most {longest}"),
    }
}

/// Six bytes in hexadecimal, with colons between them.
fn parse_mac(text: &str) -> Result<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        *byte = parts
            .next()
            .filter(|part| part.len() == 2 && !part.starts_with('+'))
            .and_then(|part| u8::from_str_radix(part, 16).ok())
            .with_context(|| format!("{text:?} is not a hardware address"))?;
    }
    if parts.next().is_some() {
        bail!("{text:?} is not a hardware address");
    }
    Ok(mac)
}

fn write_mac(mac: &[u8]) -> String {
    mac.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        assert_eq!(parse_prefix("10.0.0.0/8").unwrap(), (ip("10.0.0.0"), 8));
        assert_eq!(parse_prefix("10.0.0.1").unwrap(), (ip("10.0.0.1"), 32));
        assert_eq!(parse_prefix("fd00::/64").unwrap(), (ip("fd00::"), 64));
        assert_eq!(parse_prefix("::/0").unwrap(), (ip("::"), 0));
        for wrong in ["", "/8", "10.0.0.0/33", "10.0.0.0/", "fd00::/129", "10.0.0/8", "a/b/c"] {
            assert!(parse_prefix(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn hardware_addresses() {
        let mac = parse_mac("02:42:aC:11:00:0f").unwrap();
        assert_eq!(write_mac(&mac), "02:42:ac:11:00:0f");
        for wrong in
            ["", "02:42:ac:11:00", "02:42:ac:11:00:0f:01", "2:42:ac:11:00:f", "0g:42:ac:11:00:0f"]
        {
            assert!(parse_mac(wrong).is_err(), "{wrong}");
        }
    }
}
