// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The task API: containerd's calls, as `containerd.task.v2.Task` and `containerd.task.v3.Task`, become calls of a
//! [`Sandbox`](crate::sandbox::Sandbox).
//!
//! | module | subject |
//! |---|---|
//! | [`service`] | the calls as they come from the wire, their deadlines and answers |
//! | [`pod`] | what this shim serves: one sandbox and its containers |
//! | `create`, `run`, `end` | the life of a container and its processes, from Create to Delete |
//! | [`container`], [`process`] | their states |
//! | [`io`] | their streams |
//! | [`events`], [`callers`] | what containerd is told, and whether it is there |
//! | `stats`, [`options`] | conversions |
//!
//! Locks: a container's `change` lets one call at a time change the container, and may be held while the guest is
//! asked. States have short locks of their own, which nobody holds while waiting, so State answers at once whatever
//! else is going on.
//!
//! A call whose caller gives up, because of a deadline or a lost connection, is dropped where it waits. Create and
//! Start then undo what they did; what is better finished than left half done (Delete, Pause, Resume) runs in a task of
//! its own.

pub mod callers;
pub mod container;
mod create;
mod end;
pub mod events;
pub mod io;
pub mod options;
pub mod pod;
pub mod process;
mod run;
pub mod service;
mod stats;

use std::time::{SystemTime, UNIX_EPOCH};

use protobuf::well_known_types::timestamp::Timestamp;

/// A time as protobuf has it. Clocks before 1970 are taken for 1970.
pub(crate) fn timestamp(time: SystemTime) -> Timestamp {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        // Below 10^9.
        nanos: i32::try_from(since.subsec_nanos()).unwrap_or_default(),
        ..Default::default()
    }
}
