// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The wire contract between the runtime on the host and the agent in the guest: ttRPC over vsock, with the messages
//! and services of Kata's agent protocol. `protos/` holds the contract; the modules of messages and services are
//! generated from it at build time. [`client`] is the host's way in.

#![deny(unsafe_code)]

pub mod client;

include!(concat!(env!("OUT_DIR"), "/modules.rs"));

/// The vsock port on which the agent serves [`agent_ttrpc::AgentService`] and [`health_ttrpc::Health`].
pub const AGENT_PORT: u32 = 1024;

/// The version of the agent's API, as `grpc.Health/Version` reports it.
pub const API_VERSION: &str = "0.0.1";
