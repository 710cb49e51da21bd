// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Against the kernel, in network namespaces of the tests' own. Without root they are skipped.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use futures_util::TryStreamExt as _;
use netlink_packet_route::tc::TcAttribute;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use rtnetlink::{LinkIfb, LinkUnspec, LinkVeth, RouteMessageBuilder};

use super::*;

/// `struct virtio_net_hdr`, which a tap puts before each frame.
const VNET_HEADER: usize = 10;
/// An Ethernet type for experiments, which no protocol of the kernel answers.
const EXPERIMENT: [u8; 2] = [0x88, 0xb5];

/// A network namespace that lasts as long as this.
struct Namespace(File);

impl Namespace {
    /// `None`, and a word about it, without root.
    fn new() -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("SKIPPED: a network namespace needs root");
            return None;
        }
        let make = || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            File::open("/proc/thread-self/ns/net").unwrap()
        };
        Some(Self(std::thread::scope(|scope| scope.spawn(make).join().unwrap())))
    }

    fn path(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.0.as_raw_fd()).into()
    }

    fn run<T: Send>(&self, work: impl AsyncFnOnce(&Rtnl) -> Result<T> + Send) -> T {
        in_netns(&self.path(), work).unwrap()
    }

    /// Names of links, and of those with an ingress qdisc.
    fn state(&self) -> (Vec<String>, Vec<String>) {
        self.run(async |rtnl| {
            let (mut names, mut filtered) = (Vec::new(), Vec::new());
            for link in rtnl.links().await? {
                let name = link.attributes.iter().find_map(|attribute| match attribute {
                    netlink_packet_route::link::LinkAttribute::IfName(name) => Some(name.clone()),
                    _ => None,
                });
                let index = link.header.index;
                let qdiscs: Vec<_> = rtnl.0.qdisc().get().index(index as i32).execute().try_collect().await?;
                let ingress = |kind: &TcAttribute| matches!(kind, TcAttribute::Kind(kind) if kind == "ingress");
                if qdiscs.iter().any(|qdisc| {
                    qdisc.header.index == index as i32 && qdisc.attributes.iter().any(ingress)
                }) {
                    filtered.extend(name.clone());
                }
                names.extend(name);
            }
            Ok((names, filtered))
        })
    }

    fn attach(&self, queues: u16) -> Result<Network> {
        attach(request(&self.path(), NetModel::TcFilter, queues))
    }
}

fn request(netns: &Path, model: NetModel, queues: u16) -> NetworkRequest<'_> {
    NetworkRequest { netns, model, queues, vhost: false }
}

async fn up_with(rtnl: &Rtnl, name: &str, addresses: &[(IpAddr, u8)]) -> Result<u32> {
    let index = rtnl.index(name).await?.context("no such link")?;
    rtnl.bring_up(index, 1400).await?;
    for (address, prefix) in addresses {
        rtnl.0.address().add(index, *address, *prefix).execute().await?;
    }
    Ok(index)
}

fn v4(last: u8) -> (IpAddr, u8) {
    (Ipv4Addr::new(10, 1, 2, last).into(), 24)
}

/// Two namespaces, `name` in both, one end of a veth in each.
fn veth_between(a: &Namespace, b: &Namespace, name: &str, number: u8) {
    let there = b.0.as_raw_fd();
    a.run(async |rtnl| {
        rtnl.0.link().add(LinkVeth::new(name, "peer").build()).execute().await?;
        let moved = LinkUnspec::new_with_name("peer").setns_by_fd(there).build();
        rtnl.0.link().change(moved).execute().await?;
        up_with(rtnl, name, &[v4(number)]).await
    });
    b.run(async |rtnl| {
        let index = rtnl.index("peer").await?.context("no peer")?;
        let renamed = LinkUnspec::new_with_index(index).name(name.to_owned()).build();
        rtnl.0.link().change(renamed).execute().await?;
        up_with(rtnl, name, &[v4(number + 1)]).await
    });
}

/// A pod's namespace with one veth, and the other end's.
fn pod() -> Option<(Namespace, Namespace)> {
    let (a, b) = (Namespace::new()?, Namespace::new()?);
    veth_between(&a, &b, "eth0", 2);
    Some((a, b))
}

/// Send a frame into one guest's tap and wait until it comes out of the other's.
fn frame_goes(from: &Endpoint, to: &Endpoint, text: &[u8]) {
    let mut frame = vec![0; VNET_HEADER];
    frame.extend(to.guest_mac.0.iter().chain(&from.guest_mac.0).chain(&EXPERIMENT).chain(text));
    frame.resize(VNET_HEADER + 200, 0);
    File::from(from.taps[0].try_clone().unwrap()).write_all(&frame).unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        assert!(Instant::now() < deadline, "the frame does not arrive");
        let mut queues: Vec<_> =
            to.taps.iter().map(|tap| PollFd::new(tap.as_fd(), PollFlags::POLLIN)).collect();
        poll(&mut queues, PollTimeout::from(100u16)).unwrap();
        for tap in &to.taps {
            let mut buffer = [0; 2000];
            let Ok(length) = File::from(tap.try_clone().unwrap()).read(&mut buffer) else {
                continue;
            };
            if buffer[VNET_HEADER + 12..length].starts_with(&EXPERIMENT) {
                assert_eq!(buffer[VNET_HEADER..length], frame[VNET_HEADER..]);
                return;
            }
        }
    }
}

#[test]
fn frames_travel_both_ways_and_detaching_leaves_nothing() {
    let Some((a, b)) = pod() else { return };
    let before = a.state();
    assert_eq!(before.0, ["lo", "eth0"]);
    let (mut left, mut right) = (a.attach(1).unwrap(), b.attach(3).unwrap());
    assert_eq!(left.endpoints[0].taps.len(), 1);
    assert_eq!(right.endpoints[0].taps.len(), 3);
    assert_eq!(a.state().0, ["lo", "eth0", "tap0_kata"]);
    assert_eq!(a.state().1, ["eth0", "tap0_kata"]);
    frame_goes(&left.endpoints[0], &right.endpoints[0], b"there");
    frame_goes(&right.endpoints[0], &left.endpoints[0], b"and back");
    left.detach().unwrap();
    left.detach().unwrap();
    right.detach().unwrap();
    assert_eq!(a.state(), before);
    assert_eq!(b.state(), before);
}

#[test]
fn detaching_works_while_the_virtual_machine_still_holds_the_tap() {
    let Some((a, _b)) = pod() else { return };
    let mut network = a.attach(2).unwrap();
    let held = network.endpoints[0].taps[1].try_clone().unwrap();
    network.close_descriptors();
    assert_eq!(a.state().0, ["lo", "eth0", "tap0_kata"]);
    network.detach().unwrap();
    assert_eq!(a.state(), (vec!["lo".into(), "eth0".into()], vec![]));
    drop(held);
}

#[test]
fn the_guest_is_told_what_the_interface_has() {
    let Some((a, _b)) = pod() else { return };
    let gateway = Ipv4Addr::new(10, 1, 2, 1);
    let v6 = |text: &str| text.parse::<Ipv6Addr>().unwrap();
    let mac = a.run(async |rtnl| {
        let index = rtnl.index("eth0").await?.context("eth0")?;
        let link = rtnl.links().await?.into_iter().find(|link| link.header.index == index);
        let mac = link.unwrap().attributes.into_iter().find_map(|attribute| match attribute {
            netlink_packet_route::link::LinkAttribute::Address(bytes) => Some(bytes),
            _ => None,
        });
        rtnl.0.address().add(index, v6("fd00::2").into(), 64).execute().await?;
        let default =
            RouteMessageBuilder::<Ipv4Addr>::new().gateway(gateway).output_interface(index);
        rtnl.0.route().add(default.build()).execute().await?;
        let network = RouteMessageBuilder::<Ipv6Addr>::new()
            .destination_prefix(v6("fd01::"), 48)
            .gateway(v6("fd00::1"))
            .output_interface(index);
        rtnl.0.route().add(network.build()).execute().await?;
        rtnl.0
            .neighbours()
            .add(index, gateway.into())
            .link_layer_address(&[2, 0, 0, 0, 0, 9])
            .execute()
            .await?;
        Ok(mac)
    });
    let mut network = a.attach(1).unwrap();
    let endpoint = &network.endpoints[0];
    assert_eq!(endpoint.guest_mac.0.to_vec(), mac.unwrap());
    assert_eq!((endpoint.name.as_str(), endpoint.mtu), ("eth0", 1400));
    let device = endpoint.device("net0");
    assert_eq!((device.mtu, device.taps.len(), device.vhost.len()), (Some(1400), 1, 0));

    let interface = &network.interfaces()[0];
    assert_eq!((interface.name.as_str(), interface.mtu, interface.raw_flags), ("eth0", 1400, 0));
    assert_eq!(interface.hw_addr, endpoint.guest_mac.to_string());
    let addresses: Vec<_> = interface
        .ip_addresses
        .iter()
        .map(|ip| format!("{:?} {}/{}", ip.family, ip.address, ip.mask))
        .collect();
    assert_eq!(addresses, ["V4 10.1.2.2/24", "V6 fd00::2/64"]);

    let mut routes: Vec<_> = network
        .routes()
        .iter()
        .map(|r| {
            format!(
                "{:?} {:?} via {} dev {} scope {}",
                r.family, r.dest, r.gateway, r.device, r.scope
            )
        })
        .collect();
    routes.sort();
    assert_eq!(
        routes,
        ["V4 \"\" via 10.1.2.1 dev eth0 scope 0", "V6 \"fd01::/48\" via fd00::1 dev eth0 scope 0"]
    );
    let neighbors = network.neighbors();
    assert_eq!(neighbors.len(), 1);
    assert_eq!(neighbors[0].to_ip_address.address, "10.1.2.1");
    assert_eq!((neighbors[0].lladdr.as_str(), neighbors[0].state), ("02:00:00:00:00:09", 0x80));
    network.detach().unwrap();
}

#[test]
fn many_interfaces_sorted_by_name() {
    let Some(a) = Namespace::new() else { return };
    a.run(async |rtnl| {
        for number in 0..64u8 {
            let name = format!("eth{number}");
            rtnl.0
                .link()
                .add(LinkVeth::new(&name, &format!("peer{number}")).build())
                .execute()
                .await?;
            up_with(rtnl, &name, &[(Ipv4Addr::new(10, 2, number, 2).into(), 24)]).await?;
        }
        Ok(())
    });
    let before = a.state();
    let started = Instant::now();
    let mut network = a.attach(1).unwrap();
    eprintln!("64 interfaces attached in {:?}", started.elapsed());
    let names: Vec<_> = network.endpoints.iter().map(|endpoint| endpoint.name.clone()).collect();
    assert_eq!(names.len(), 64);
    assert!(names.is_sorted(), "{names:?}");
    let started = Instant::now();
    network.detach().unwrap();
    eprintln!("and detached in {:?}", started.elapsed());
    assert_eq!(a.state(), before);
}

#[test]
fn an_interface_of_no_use_undoes_those_before_it() {
    let Some((a, _b)) = pod() else { return };
    a.run(async |rtnl| {
        rtnl.0.link().add(LinkIfb::new("odd0").build()).execute().await?;
        Ok(())
    });
    // Without an address it does not matter.
    let before = a.state();
    a.attach(1).unwrap().detach().unwrap();
    a.run(async |rtnl| up_with(rtnl, "odd0", &[v4(77)]).await);
    let error = format!("{:#}", a.attach(1).unwrap_err());
    assert!(error.contains("interface odd0: Unsupported network interface: ifb"), "{error}");
    assert_eq!(a.state(), before);
}

#[test]
fn an_ingress_qdisc_of_somebody_else_is_left_alone() {
    let Some((a, _b)) = pod() else { return };
    a.run(async |rtnl| {
        rtnl.0.link().add(LinkVeth::new("eth1", "peer1").build()).execute().await?;
        let index = up_with(rtnl, "eth1", &[v4(9)]).await?;
        Ok(rtnl.add_ingress(index).await?)
    });
    let before = a.state();
    let error = format!("{:#}", a.attach(1).unwrap_err());
    assert!(error.contains("eth1 has an ingress qdisc already"), "{error}");
    assert_eq!(a.state(), before);
}

#[test]
fn a_namespace_without_interfaces_and_the_model_none_are_empty_networks() {
    let Some((a, _b)) = pod() else { return };
    let before = a.state();
    assert!(attach(request(&a.path(), NetModel::None, 1)).unwrap().endpoints.is_empty());
    assert_eq!(a.state(), before);
    let empty = Namespace::new().unwrap();
    let mut network = empty.attach(1).unwrap();
    assert!(network.endpoints.is_empty() && network.interfaces().is_empty());
    network.detach().unwrap();
}

#[test]
fn a_namespace_that_is_gone() {
    let missing = Path::new("/run/netns/no-such-pod");
    let error = format!("{:#}", attach(request(missing, NetModel::TcFilter, 1)).unwrap_err());
    assert!(error.contains("/run/netns/no-such-pod") && error.contains("No such file"), "{error}");
    let Some((a, _b)) = pod() else { return };
    let mut network = a.attach(1).unwrap();
    // What is left of a namespace that was unmounted.
    let file = tempfile::NamedTempFile::new().unwrap();
    network.netns = file.path().to_owned();
    network.detach().unwrap();
}

#[test]
fn what_a_dead_process_left_is_cleaned_up_from_its_record() {
    let Some((a, _b)) = pod() else { return };
    let before = a.state();
    let network = a.attach(2).unwrap();
    let text = serde_json::to_string(&network.record()).unwrap();
    drop(network);
    // The tap went with its descriptors.
    assert_eq!(a.state(), (before.0.clone(), vec!["eth0".into()]));
    let record: Record = serde_json::from_str(&text).unwrap();
    cleanup(&record).unwrap();
    assert_eq!(a.state(), before);
    cleanup(&record).unwrap();
    a.attach(1).unwrap().detach().unwrap();
}

#[test]
fn a_tap_is_an_interface_as_well() {
    let Some(a) = Namespace::new() else { return };
    let inner = a.run(async |rtnl| {
        let fds = tap::create("eth0", 1)?;
        up_with(rtnl, "eth0", &[v4(2)]).await?;
        Ok(fds)
    });
    let mut network = a.attach(1).unwrap();
    let outer = other_end(&network.endpoints[0], inner);
    frame_goes(&outer, &network.endpoints[0], b"in");
    frame_goes(&network.endpoints[0], &outer, b"out");
    network.detach().unwrap();
}

/// The other end of an interface: only its address differs.
fn other_end(of: &Endpoint, taps: Vec<OwnedFd>) -> Endpoint {
    Endpoint {
        name: "outer".into(),
        guest_mac: MacAddr([2, 0, 0, 0, 0, 7]),
        mtu: of.mtu,
        taps,
        vhost: vec![],
        interface: types::Interface::default(),
        routes: vec![],
        neighbors: vec![],
        wire: Wire::Direct,
    }
}

#[test]
fn a_macvtap_takes_the_address_and_gives_it_back() {
    let Some((a, b)) = pod() else { return };
    let probe = a.run(async |rtnl| {
        let index = rtnl.index("eth0").await?.context("eth0")?;
        let probe = rtnl.add_macvtap("probe", 9000, index).await;
        if probe.is_ok() {
            rtnl.delete_link(9000).await?;
        }
        Ok(probe)
    });
    if let Err(error) = probe {
        eprintln!("SKIPPED: this kernel makes no macvtap: {error}");
        return;
    }
    let described = a.attach(1).unwrap().interfaces();
    let record = Record {
        netns: a.path(),
        links: vec![("eth0".into(), Wire::TcFilter { tap: "tap0_kata".into() })],
    };
    cleanup(&record).unwrap();
    let mut network = attach(request(&a.path(), NetModel::MacVtap, 1)).unwrap();
    assert_eq!(network.interfaces(), described);
    let mut other = b.attach(1).unwrap();
    frame_goes(&network.endpoints[0], &other.endpoints[0], b"there");
    frame_goes(&other.endpoints[0], &network.endpoints[0], b"and back");
    other.detach().unwrap();
    network.detach().unwrap();
    // As it was: another attach finds the same.
    let mut again = a.attach(1).unwrap();
    assert_eq!(again.interfaces(), described);
    again.detach().unwrap();
}
