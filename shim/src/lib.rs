// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The containerd shim. One process serves one pod: it links the virtual machine monitor, runs the pod's guest in its
//! own threads, and speaks containerd's task API on one side and the agent protocol on the other.
//!
//! | module | subject |
//! |---|---|
//! | [`process`] | the shim's contract with containerd: start, serve, delete, its log |
//! | [`task`] | the task API: containers, execs, their streams, events, statistics |
//! | [`sandbox`] | a pod's virtual machine: start order, teardown, the agent in it |
//! | [`container`] | what becomes of a container's specification, root file system and volumes |
//! | [`host`] | what a sandbox takes of the host: shared files, network, cgroups, hooks |
//! | [`config`] | Kata's configuration files and annotations |

pub mod config;
pub mod container;
pub mod error;
pub mod host;
pub mod process;
pub mod sandbox;
pub mod task;
