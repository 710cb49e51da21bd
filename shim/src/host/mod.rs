// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What a sandbox takes of the host.
//!
//! | module | subject |
//! |---|---|
//! | [`management`], [`metrics`] | the socket that tools ask, and the figures it tells |
//! | [`cgroup`] | the sandbox's cgroups |
//! | [`hooks`] | OCI hooks |
//! | [`mount`], [`mountinfo`] | mounts and binds, and taking them down |
//! | [`share`], [`virtiofsd`] | the files that host and guest share |
//! | [`netns`] | network namespaces |
//! | [`network`] | the pod's interfaces and taps |
//! | [`spawn`] | helper processes |
//! | [`vsock`] | the guest's address on the host's vsock |

pub mod cgroup;
pub mod hooks;
pub mod management;
pub mod metrics;
pub mod mount;
pub mod mountinfo;
pub mod netns;
pub mod network;
pub mod share;
pub mod spawn;
pub mod virtiofsd;
pub mod vsock;
