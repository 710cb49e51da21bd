// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

use std::fmt;
use std::os::fd::RawFd;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A network device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// Unique among all devices.
    pub id: String,
    /// The guest's address.
    pub mac: MacAddr,
    /// Largest packet that the guest is told to send; its own default where it is not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// Entries of a queue, a power of two.
    #[serde(default = "NetConfig::default_queue_size")]
    pub queue_size: u16,
    /// One descriptor of the tap for each pair of queues, opened with `IFF_TAP`, `IFF_NO_PI` and
    /// `IFF_VNET_HDR`. They stay the caller's.
    #[serde(default)]
    pub taps: Vec<RawFd>,
    /// One open /dev/vhost-net for each pair of queues; where there is none, this process serves them. They
    /// stay the caller's.
    #[serde(default)]
    pub vhost: Vec<RawFd>,
    /// In place of descriptors: what to open.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tap: Option<TapConfig>,
}

impl NetConfig {
    /// Entries of a queue where nothing else is asked for.
    pub const fn default_queue_size() -> u16 {
        256
    }
}

/// A tap that is opened, and made where it is not there, when the VM is built.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TapConfig {
    /// Name of the interface.
    pub name: String,
    /// Pairs of queues.
    #[serde(default = "TapConfig::default_queues")]
    pub queues: u16,
    /// Let the host's kernel serve the queues, through /dev/vhost-net.
    #[serde(default)]
    pub vhost: bool,
}

impl TapConfig {
    /// Pairs of queues where nothing else is asked for.
    pub const fn default_queues() -> u16 {
        1
    }
}

/// An Ethernet address, written as `02:00:5e:10:00:01`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddr(pub [u8; 6]);

/// A text that is no Ethernet address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no Ethernet address: use six pairs of hexadecimal digits, as in 02:00:5e:10:00:01"
)]
pub struct MacAddrError(String);

impl MacAddr {
    /// Read an address as people write it.
    ///
    /// # Errors
    /// It is none.
    pub fn parse(text: &str) -> Result<Self, MacAddrError> {
        let error = || MacAddrError(text.to_owned());
        let mut bytes = [0; 6];
        let mut pairs = text.split(':');
        for byte in &mut bytes {
            let pair = pairs.next().filter(|pair| pair.len() == 2).ok_or_else(error)?;
            // from_str_radix would take a sign as well.
            if !pair.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return Err(error());
            }
            *byte = u8::from_str_radix(pair, 16).map_err(|_| error())?;
        }
        match pairs.next() {
            None => Ok(Self(bytes)),
            Some(_) => Err(error()),
        }
    }

    /// Whether it can be the address of one station: neither a group's nor nobody's.
    pub fn is_unicast(self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for MacAddr {
    type Err = MacAddrError;

    fn from_str(text: &str) -> Result<Self, MacAddrError> {
        Self::parse(text)
    }
}

impl TryFrom<String> for MacAddr {
    type Error = MacAddrError;

    fn try_from(text: String) -> Result<Self, MacAddrError> {
        Self::parse(&text)
    }
}

impl From<MacAddr> for String {
    fn from(address: MacAddr) -> Self {
        address.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_reads_as_it_is_written() {
        let address = MacAddr([0x02, 0x00, 0x5e, 0x10, 0xab, 0xff]);
        assert_eq!(address.to_string(), "02:00:5e:10:ab:ff");
        assert_eq!(MacAddr::parse("02:00:5E:10:ab:FF"), Ok(address));
        let json = serde_json::to_string(&address).unwrap();
        assert_eq!(json, "\"02:00:5e:10:ab:ff\"");
        assert_eq!(serde_json::from_str::<MacAddr>(&json).unwrap(), address);
    }

    #[test]
    fn what_is_no_address() {
        for text in [
            "",
            "02:00:5e:10:00",
            "02:00:5e:10:00:01:02",
            "02:00:5e:10:00:0",
            "02:00:5e:10:00:+1",
            "02-00-5e-10-00-01",
            "02:00:5e:10:00:0g",
            "02:00:5e:10:00:01 ",
        ] {
            let error = MacAddr::parse(text).unwrap_err().to_string();
            assert!(error.starts_with(&format!("{text:?} is no Ethernet address")), "{error}");
        }
    }

    #[test]
    fn addresses_of_one_station() {
        assert!(MacAddr([2, 0, 0, 0, 0, 1]).is_unicast());
        for group in [[0; 6], [0xff; 6], [1, 0, 0x5e, 0, 0, 1]] {
            assert!(!MacAddr(group).is_unicast());
        }
    }
}
