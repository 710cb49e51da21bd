// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The bytes on the wire, worked out by hand from the contract's field numbers and the protobuf encoding: a key is
//! `number << 3 | type`, types are 0 varint and 2 length-delimited. A renumbered or retyped field changes them.

#![allow(clippy::unwrap_used)] // Helpers too: a failed step is a failed test.

use ecr_agent_protocol::agent::*;
use ecr_agent_protocol::csi::*;
use ecr_agent_protocol::health::*;
use ecr_agent_protocol::oci::*;
use ecr_agent_protocol::types::*;
use protobuf::{EnumOrUnknown, Message, MessageField};

/// `message` has exactly the bytes `wire`, and `wire` is read back as the same message.
#[track_caller]
fn same<M: Message + PartialEq + std::fmt::Debug>(message: &M, wire: &[u8]) {
    assert_eq!(message.write_to_bytes().unwrap(), wire);
    assert_eq!(&M::parse_from_bytes(wire).unwrap(), message);
}

#[test]
fn health() {
    let status = HealthCheckResponse {
        status: EnumOrUnknown::new(health_check_response::ServingStatus::SERVING),
        ..Default::default()
    };
    same(&status, &[0x08, 1]);
    let version = VersionCheckResponse {
        grpc_version: "0.0.1".into(),
        agent_version: "v".into(),
        ..Default::default()
    };
    same(&version, b"\x0a\x050.0.1\x12\x01v");
}

#[test]
fn guest_details() {
    same(
        &GuestDetailsRequest {
            mem_block_size: true,
            mem_hotplug_probe: true,
            ..Default::default()
        },
        &[0x08, 1, 0x10, 1],
    );
    let response = GuestDetailsResponse {
        mem_block_size_bytes: 0x800_0000,
        agent_details: MessageField::some(AgentDetails {
            version: "1".into(),
            init_daemon: true,
            device_handlers: vec!["a".into()],
            storage_handlers: vec!["b".into()],
            supports_seccomp: true,
            extra_features: vec!["c".into()],
            ..Default::default()
        }),
        support_mem_hotplug_probe: true,
        ..Default::default()
    };
    same(
        &response,
        b"\x08\x80\x80\x80\x40\x12\x10\x0a\x011\x10\x01\x1a\x01a\x22\x01b\x28\x01\x32\x01c\x18\x01",
    );
}

#[test]
fn create_container() {
    let request = CreateContainerRequest {
        container_id: "c".into(),
        exec_id: "e".into(),
        string_user: MessageField::some(StringUser {
            additional_gids: vec!["g".into()],
            ..Default::default()
        }),
        devices: vec![Device { type_: "t".into(), ..Default::default() }],
        storages: vec![Storage { mount_point: "m".into(), shared: true, ..Default::default() }],
        oci: MessageField::some(Spec { hostname: "h".into(), ..Default::default() }),
        sandbox_pidns: true,
        shared_mounts: vec![SharedMount { dst_path: "d".into(), ..Default::default() }],
        stdin_port: 1,
        stdout_port: 2,
        stderr_port: 3,
        ..Default::default()
    };
    same(
        &request,
        b"\x0a\x01c\x12\x01e\x1a\x03\x1a\x01g\x22\x03\x12\x01t\x2a\x05\x32\x01m\x40\x01\x32\x03\x22\x01h\x38\x01\
          \x42\x03\x2a\x01d\x48\x01\x50\x02\x58\x03",
    );
}

#[test]
fn fields_that_do_not_start_at_one() {
    same(&ReseedRandomDevRequest { data: vec![7], ..Default::default() }, &[0x12, 1, 7]);
    let group = FSGroup {
        group_id: 5,
        group_change_policy: EnumOrUnknown::new(FSGroupChangePolicy::OnRootMismatch),
        ..Default::default()
    };
    same(&group, &[0x10, 5, 0x18, 1]);
}

#[test]
fn network() {
    let interface = Interface {
        device: "d".into(),
        name: "n".into(),
        ip_addresses: vec![IPAddress {
            family: EnumOrUnknown::new(IPFamily::V6),
            address: "a".into(),
            mask: "m".into(),
            ..Default::default()
        }],
        mtu: 1500,
        hw_addr: "h".into(),
        device_path: "p".into(),
        type_: "t".into(),
        raw_flags: 0x80,
        ..Default::default()
    };
    same(
        &interface,
        b"\x0a\x01d\x12\x01n\x1a\x08\x08\x01\x12\x01a\x1a\x01m\x20\xdc\x0b\x2a\x01h\x32\x01p\x3a\x01t\x40\x80\x01",
    );
    let route = Route { scope: 253, flags: 4, mtu: 9000, ..Default::default() };
    same(&route, b"\x28\xfd\x01\x38\x04\x40\xa8\x46");
    let neighbor = ARPNeighbor {
        to_ip_address: MessageField::some(IPAddress::new()),
        lladdr: "l".into(),
        state: 0x80,
        flags: -1,
        ..Default::default()
    };
    same(&neighbor, b"\x0a\x00\x1a\x01l\x20\x80\x01\x28\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01");
}

#[test]
fn oci() {
    let limit = POSIXRlimit { type_: "r".into(), hard: 2, soft: 1, ..Default::default() };
    same(&limit, b"\x0a\x01r\x10\x02\x18\x01");
    let memory =
        LinuxMemory { limit: -1, swappiness: 60, disable_oom_killer: true, ..Default::default() };
    same(&memory, b"\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01\x30\x3c\x38\x01");
    let linux = Linux {
        cgroups_path: "c".into(),
        seccomp: MessageField::some(LinuxSeccomp { flags: vec!["f".into()], ..Default::default() }),
        intel_rdt: MessageField::some(LinuxIntelRdt::new()),
        ..Default::default()
    };
    same(&linux, b"\x2a\x01c\x42\x03\x1a\x01f\x6a\x00");
    let hooks = Hooks { start_container: vec![Hook::new()], ..Default::default() };
    same(&hooks, b"\x32\x00");
    let mut spec = Spec::new();
    spec.annotations.insert("k".into(), "v".into());
    same(&spec, b"\x3a\x06\x0a\x01k\x12\x01v");
}

/// The one place in the specification where "absent" is not zero.
#[test]
fn seccomp_errno_is_optional() {
    let mut call = LinuxSyscall { action: "a".into(), ..Default::default() };
    same(&call, b"\x12\x01a");
    call.set_errnoret(0);
    same(&call, b"\x12\x01a\x18\x00");
}

#[test]
fn memory_agent_fields_are_optional() {
    same(&MemAgentMemcgConfig::new(), b"");
    let config = MemAgentCompactConfig {
        disabled: Some(false),
        compact_sec_max: Some(-1),
        compact_force_times: Some(0),
        ..Default::default()
    };
    same(&config, b"\x08\x00\x28\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01\x40\x00");
}

#[test]
fn statistics() {
    let mut memory =
        MemoryStats { kernel_usage: MessageField::some(MemoryData::new()), ..Default::default() };
    memory.stats.insert("k".into(), 1);
    same(&memory, b"\x22\x00\x32\x05\x0a\x01k\x10\x01");
    let cpu = CpuUsage { percpu_usage: vec![1, 300], ..Default::default() };
    same(&cpu, b"\x12\x03\x01\xac\x02");
    let volume = VolumeUsage {
        available: 1,
        total: 2,
        used: 3,
        unit: EnumOrUnknown::new(volume_usage::Unit::INODES),
        ..Default::default()
    };
    same(&volume, &[0x08, 1, 0x10, 2, 0x18, 3, 0x20, 2]);
}

#[test]
fn copy_file() {
    let request = CopyFileRequest {
        path: "p".into(),
        file_size: 1,
        file_mode: 2,
        dir_mode: 3,
        uid: 4,
        gid: 5,
        offset: 6,
        data: vec![9],
        ..Default::default()
    };
    same(&request, b"\x0a\x01p\x10\x01\x18\x02\x20\x03\x28\x04\x30\x05\x38\x06\x42\x01\x09");
}

/// A newer peer may send fields that we do not know.
#[test]
fn unknown_fields_are_skipped() {
    let read = StartContainerRequest::parse_from_bytes(b"\x0a\x01c\xf8\x7f\x01").unwrap();
    assert_eq!(read.container_id, "c");
}
