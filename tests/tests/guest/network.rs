// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Taps, through this process and through the kernel; and NICs that come and go.

use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use ecr_devices::backend::tap::Tap;
use ecr_tests::guest::Boot;
use ecr_tests::place::KERNEL;
use ecr_tests::qmp::Qmp;
use ecr_tests::skip::{same_everywhere, skip};
use serde_json::json;

use crate::{ends_well, place, powers_off, value};

/// A tap with an address on the host's side, as long as it lives.
struct HostTap(&'static str);

impl HostTap {
    fn new(name: &'static str, address: &str) -> Result<Self> {
        if !Path::new("/dev/net/tun").exists() {
            skip("this host has no /dev/net/tun");
        }
        let kind = ["mode", "tap", "multi_queue", "vnet_hdr"];
        ip(&[&["tuntap", "add", "dev", name], &kind[..]].concat())?;
        let tap = Self(name);
        ip(&["address", "add", address, "dev", name])?;
        ip(&["link", "set", name, "up"])?;
        Ok(tap)
    }
}

impl Drop for HostTap {
    fn drop(&mut self) {
        let gone = ip(&["link", "delete", self.0]);
        assert!(gone.is_ok(), "{} stays behind", self.0);
    }
}

fn ip(arguments: &[&str]) -> Result<()> {
    let output = Command::new("ip").args(arguments).output().context("ip")?;
    let problem = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "ip {arguments:?}: {problem}");
    Ok(())
}

/// Frames of all sizes pass between host and guest, over two pairs of queues.
fn a_guest_is_on_the_network(tap: &'static str, vhost: &str) -> Result<()> {
    let _tap = HostTap::new(tap, "192.0.2.1/24")?;
    let boot = Boot::kernel(&place(), KERNEL)
        .image(&place(), "pmem")
        .with(&["--cpus", "2"])
        .with(&[
            "--net",
            &format!("tap={tap},queues=2,vhost={vhost},mac=02:00:00:00:00:01,mtu=1400"),
        ])
        .script(
            "cd /sys/class/net/eth0; echo MAC=$(cat address); echo MTU=$(cat mtu); \
             echo QUEUES=$(ls queues | wc -l); \
             ip link set eth0 up; ip addr add 192.0.2.2/24 dev eth0; \
             for size in 1 1300 4000 60000; do ping -c 3 -s $size 192.0.2.1 | grep received; done; \
             echo ALL=$(ping -c 100 -A -s 8000 192.0.2.1 | grep -c seq=)",
        );
    let said = powers_off(boot)?;
    for (key, wanted) in
        [("MAC", "02:00:00:00:00:01"), ("MTU", "1400"), ("QUEUES", "4"), ("ALL", "100")]
    {
        ensure!(value(&said, key)? == wanted, "{key} is not {wanted}:\n{said}");
    }
    let all = said.matches("3 packets received").count();
    ensure!(all == 4, "of 4 sizes, {all} came back:\n{said}");
    Ok(())
}

#[test]
#[ignore = "boots a guest"]
fn a_guest_is_on_the_network_through_this_process() -> Result<()> {
    a_guest_is_on_the_network("ecr-test0", "off")
}

#[test]
#[ignore = "boots a guest"]
fn a_guest_is_on_the_network_through_the_kernel() -> Result<()> {
    if !Path::new("/dev/vhost-net").exists() {
        skip("this host has no /dev/vhost-net");
    }
    a_guest_is_on_the_network("ecr-test1", "on")
}

#[test]
#[ignore = "boots a guest"]
fn a_nic_is_plugged_in_and_out_of_a_running_guest_5_times() -> Result<()> {
    same_everywhere();
    let tap = HostTap::new("ecr-test2", "192.0.2.1/24")?;
    let scratch = tempfile::tempdir()?;
    let socket = scratch.path().join("qmp.sock");
    let mut guest = Boot::kernel(&place(), KERNEL)
        .image(&place(), "pmem")
        .with(&["--bridges", "1"])
        .qmp(&socket)
        .script(
            "nic=/sys/class/net/eth0; echo LISTENING=yes; for n in $(seq 5); do \
             until [ -e $nic/address ]; do sleep 0.05; done; \
             echo WHERE=$(readlink -f $nic/device); echo MAC$n=$(cat $nic/address); \
             ip link set eth0 up; ip addr add 192.0.2.2/24 dev eth0; \
             echo PING$n=$(ping -c 20 -A -s 3000 192.0.2.1 | grep -c seq=); \
             while [ -e $nic ]; do sleep 0.05; done; echo GONE$n=yes; done",
        )
        .start()?;
    guest.wait_for("LISTENING=yes")?;
    let mut qmp = Qmp::connect(&socket)?;
    for n in 1..=5 {
        let mac = format!("02:00:00:00:00:{n:02x}");
        let queues = Tap::open(tap.0, 1)?;
        qmp.give("tap", queues[0].as_fd())?;
        drop(queues);
        qmp.execute_with("netdev_add", &json!({"type": "tap", "id": "net0", "fds": "tap"}))?;
        let device = json!({"driver": "virtio-net-pci", "id": "virtio-net0", "netdev": "net0",
                            "mac": mac, "bus": "pci-bridge-0", "addr": "02"});
        qmp.execute_with("device_add", &device)?;
        let place = guest.wait_for("WHERE=")?;
        ensure!(place.contains("/0000:00:02.0/0000:01:02.0/virtio"), "{place}");
        guest.wait_for(&format!("MAC{n}={mac}"))?;
        guest.wait_for(&format!("PING{n}=20"))?;
        qmp.execute_with("device_del", &json!({"id": "virtio-net0"}))?;
        let gone = qmp.wait_event("DEVICE_DELETED")?;
        ensure!(gone["data"]["device"] == "virtio-net0", "{gone}");
        qmp.execute_with("netdev_del", &json!({"id": "net0"}))?;
        guest.wait_for(&format!("GONE{n}=yes"))?;
    }
    ends_well(guest).map(drop)
}
