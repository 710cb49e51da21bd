// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The arguments `--net` and `--fs`.

use std::os::fd::RawFd;

use super::options::{self, Options};
use crate::config::{FsConfig, MacAddr, NetConfig, TapConfig};

/// A network device; what is made up from its place among the others may have to be filled in.
#[derive(Debug, Clone)]
pub(super) struct Net {
    mac: Option<MacAddr>,
    config: NetConfig,
}

impl Net {
    /// The device as the one with number `index`.
    pub(super) fn numbered(self, index: usize) -> NetConfig {
        let Self { mac, mut config } = self;
        if config.id.is_empty() {
            config.id = format!("net{index}");
        }
        // QEMU's default, and those behind it.
        config.mac = mac.unwrap_or(MacAddr([
            0x52,
            0x54,
            0x00,
            0x12,
            0x34,
            0x56_u8.wrapping_add(index as u8),
        ]));
        config
    }
}

pub(super) fn net(text: &str) -> Result<Net, String> {
    const KEYS: &[&str] =
        &["tap", "queues", "vhost", "fd", "vhostfd", "mac", "mtu", "queue_size", "id"];
    let options = Options::parse(text, None, KEYS)?;
    let tap = options.text("tap");
    let (queues, vhost) = (options.number("queues")?, options.switch("vhost")?);
    match (&tap, options.text("fd")) {
        (None, None) => return Err("tap= or fd= is missing".to_owned()),
        (Some(_), Some(_)) => return Err("tap= and fd= are both given: use one of them".to_owned()),
        (None, Some(_)) if queues.is_some() || vhost => {
            return Err("queues= and vhost= go with tap=: give as many descriptors".to_owned());
        }
        (Some(_), None) if options.text("vhostfd").is_some() => {
            return Err("vhostfd= goes with fd=: use vhost=on".to_owned());
        }
        _ => {}
    }
    let mac = options.text("mac").map(|mac| MacAddr::parse(&mac)).transpose();
    let queues = queues.unwrap_or(TapConfig::default_queues());
    Ok(Net {
        mac: mac.map_err(|error| format!("mac={error}"))?,
        config: NetConfig {
            id: options.text("id").unwrap_or_default(),
            mac: MacAddr([0; 6]),
            mtu: options.number("mtu")?,
            queue_size: options.number("queue_size")?.unwrap_or(NetConfig::default_queue_size()),
            taps: descriptors(&options, "fd")?,
            vhost: descriptors(&options, "vhostfd")?,
            tap: tap.map(|name| TapConfig { name, queues, vhost }),
        },
    })
}

/// `N:N:N`.
fn descriptors(options: &Options, key: &str) -> Result<Vec<RawFd>, String> {
    let Some(list) = options.text(key) else { return Ok(Vec::new()) };
    list.split(':')
        .map(|fd| options::number(fd).map_err(|problem| format!("{key}={list}: {problem}")))
        .collect()
}

/// A file system; its id may have to be filled in.
pub(super) fn fs(text: &str) -> Result<FsConfig, String> {
    const KEYS: &[&str] = &["socket", "tag", "queues", "queue_size", "id"];
    let options = Options::parse(text, None, KEYS)?;
    Ok(FsConfig {
        id: options.text("id").unwrap_or_default(),
        tag: options.required("tag")?.to_owned(),
        socket: options.required("socket")?.into(),
        queues: options.number("queues")?.unwrap_or(FsConfig::default_queues()),
        queue_size: options.number("queue_size")?.unwrap_or(FsConfig::default_queue_size()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tap_by_name() {
        let config = net("tap=tap0").unwrap().numbered(1);
        assert_eq!(
            (config.id.as_str(), config.mac.to_string()),
            ("net1", "52:54:00:12:34:57".into())
        );
        assert_eq!(config.tap, Some(TapConfig { name: "tap0".into(), queues: 1, vhost: false }));
        let text = "tap=t,queues=4,vhost=on,mac=02:00:00:00:00:09,mtu=9000,queue_size=512,id=lan";
        let config = net(text).unwrap().numbered(0);
        assert_eq!(config.tap, Some(TapConfig { name: "t".into(), queues: 4, vhost: true }));
        assert_eq!((config.mtu, config.queue_size, config.id.as_str()), (Some(9000), 512, "lan"));
        assert_eq!(config.mac.to_string(), "02:00:00:00:00:09");
    }

    #[test]
    fn descriptors_of_a_tap() {
        let config = net("fd=3:4,vhostfd=5:6").unwrap().numbered(0);
        assert_eq!((config.taps, config.vhost, config.tap), (vec![3, 4], vec![5, 6], None));
        assert_eq!(net("fd=3").unwrap().numbered(0).vhost, Vec::<RawFd>::new());
    }

    #[test]
    fn mistakes_of_networks() {
        for (text, problem) in [
            ("mac=02:00:00:00:00:09", "tap= or fd= is missing"),
            ("tap=a,fd=3", "both given"),
            ("fd=3,queues=2", "go with tap="),
            ("fd=3,vhost=on", "go with tap="),
            ("tap=a,vhostfd=3", "use vhost=on"),
            ("tap=a,mac=1", "mac=\"1\" is no Ethernet address"),
            ("fd=3:x", "fd=3:x: use a whole number"),
            ("tap=a,mtu=99999", "mtu=99999: use a whole number"),
            ("tap=a,speed=1", "there is no \"speed\""),
        ] {
            let error = net(text).unwrap_err();
            assert!(error.contains(problem), "{text}: {error}");
        }
    }

    #[test]
    fn file_systems() {
        let config = fs("socket=fs.sock,tag=data").unwrap();
        assert_eq!((config.tag.as_str(), config.queues, config.id.as_str()), ("data", 1, ""));
        let config = fs("socket=a,,b,tag=t,queues=4,queue_size=1024,id=share").unwrap();
        assert_eq!((config.queues, config.queue_size, config.id.as_str()), (4, 1024, "share"));
        assert_eq!(config.socket, std::path::PathBuf::from("a,b"));
        assert_eq!(fs("socket=a").unwrap_err(), "tag= is missing");
        assert_eq!(fs("tag=a").unwrap_err(), "socket= is missing");
    }
}
