// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Events as QEMU spells them (`qapi/run-state.json`, `qapi/qdev.json`).

use std::time::UNIX_EPOCH;

use serde::Serialize;
use serde_json::{Value, json};

use super::schema::{Type, member, optional};
use crate::control::{Event, EventKind, ShutdownReason};

/// An event.
#[derive(Debug)]
pub(super) struct EventSpec {
    pub(super) name: &'static str,
    pub(super) data: &'static Type,
}

const CAUSE: Type = Type::Enum(&[
    "host-error",
    "host-qmp-quit",
    "host-qmp-system-reset",
    "guest-shutdown",
    "guest-reset",
    "guest-panic",
]);
const GUEST_AND_CAUSE: Type =
    Type::Object(&[member("guest", &Type::Bool), member("reason", &CAUSE)]);
const DELETED: Type = Type::Object(&[optional("device", &Type::Str), member("path", &Type::Str)]);
const LOST: Type = Type::Object(&[member("device", &Type::Str)]);
const PANIC: Type = Type::Object(&[member("action", &Type::Enum(&["pause", "run"]))]);

/// All events there are.
pub(super) const EVENTS: &[EventSpec] = &[
    EventSpec { name: "STOP", data: &Type::EMPTY },
    EventSpec { name: "RESUME", data: &Type::EMPTY },
    EventSpec { name: "RESET", data: &GUEST_AND_CAUSE },
    EventSpec { name: "POWERDOWN", data: &Type::EMPTY },
    EventSpec { name: "DEVICE_DELETED", data: &DELETED },
    // QEMU has none for this, so it is spelled as an extension (docs/interop/qmp-spec.rst, 2.5).
    EventSpec { name: "__io.containerd.ecr_BACKEND_LOST", data: &LOST },
    EventSpec { name: "SHUTDOWN", data: &GUEST_AND_CAUSE },
    EventSpec { name: "GUEST_PANICKED", data: &PANIC },
    EventSpec { name: "GUEST_CRASHLOADED", data: &PANIC },
];

/// An event as it goes over the wire. Members stand in the order in which QEMU writes them.
#[derive(Debug, Serialize)]
pub(super) struct EventMessage {
    timestamp: Timestamp,
    event: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<Value>,
}

#[derive(Debug, Serialize)]
struct Timestamp {
    seconds: u64,
    microseconds: u32,
}

impl From<&Event> for EventMessage {
    fn from(event: &Event) -> Self {
        // A clock that stands before 1970 is shown as 1970.
        let time = event.time.duration_since(UNIX_EPOCH).unwrap_or_default();
        let (event, data) = spell(&event.kind);
        Self {
            timestamp: Timestamp { seconds: time.as_secs(), microseconds: time.subsec_micros() },
            event,
            data,
        }
    }
}

fn spell(kind: &EventKind) -> (&'static str, Option<Value>) {
    match kind {
        EventKind::Stop => ("STOP", None),
        EventKind::Resume => ("RESUME", None),
        EventKind::Reset { guest: true } => ("RESET", cause(true, "guest-reset")),
        EventKind::Reset { guest: false } => ("RESET", cause(false, "host-qmp-system-reset")),
        EventKind::Powerdown => ("POWERDOWN", None),
        EventKind::DeviceDeleted { id } => {
            let path = format!("/machine/peripheral/{id}");
            ("DEVICE_DELETED", Some(json!({"device": id, "path": path})))
        }
        EventKind::BackendLost { id } => {
            ("__io.containerd.ecr_BACKEND_LOST", Some(json!({"device": id})))
        }
        EventKind::Shutdown(reason) => ("SHUTDOWN", shutdown_cause(reason)),
        // What becomes of the VM is told by what follows.
        EventKind::GuestPanicked => ("GUEST_PANICKED", Some(json!({"action": "pause"}))),
        EventKind::GuestCrashLoaded => ("GUEST_CRASHLOADED", Some(json!({"action": "run"}))),
    }
}

fn shutdown_cause(reason: &ShutdownReason) -> Option<Value> {
    match reason {
        ShutdownReason::GuestShutdown => cause(true, "guest-shutdown"),
        ShutdownReason::GuestReset => cause(true, "guest-reset"),
        ShutdownReason::GuestPanic => cause(true, "guest-panic"),
        ShutdownReason::HostQuit => cause(false, "host-qmp-quit"),
        ShutdownReason::Failed(_) => cause(false, "host-error"),
    }
}

fn cause(guest: bool, reason: &str) -> Option<Value> {
    Some(json!({"guest": guest, "reason": reason}))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn message(kind: EventKind) -> String {
        let time = UNIX_EPOCH + Duration::new(1795485519, 87_546_999);
        serde_json::to_string(&EventMessage::from(&Event { time, kind })).unwrap()
    }

    #[test]
    fn reads_as_qemu_writes_it() {
        assert_eq!(
            message(EventKind::Reset { guest: false }),
            r#"{"timestamp":{"seconds":1795485519,"microseconds":87546},"event":"RESET","data":{"guest":false,"reason":"host-qmp-system-reset"}}"#
        );
        assert_eq!(
            message(EventKind::Stop),
            r#"{"timestamp":{"seconds":1795485519,"microseconds":87546},"event":"STOP"}"#
        );
    }

    #[test]
    fn each_event_keeps_to_the_schema() {
        let kinds = [
            EventKind::Stop,
            EventKind::Resume,
            EventKind::Reset { guest: true },
            EventKind::Reset { guest: false },
            EventKind::Powerdown,
            EventKind::DeviceDeleted { id: "disk0".into() },
            EventKind::Shutdown(ShutdownReason::GuestShutdown),
            EventKind::Shutdown(ShutdownReason::GuestReset),
            EventKind::Shutdown(ShutdownReason::GuestPanic),
            EventKind::Shutdown(ShutdownReason::HostQuit),
            EventKind::Shutdown(ShutdownReason::Failed("x".into())),
            EventKind::BackendLost { id: "fs0".into() },
            EventKind::GuestPanicked,
            EventKind::GuestCrashLoaded,
        ];
        for kind in kinds {
            let (name, data) = spell(&kind);
            let spec = EVENTS.iter().find(|spec| spec.name == name).unwrap();
            spec.data.check("data", &data.unwrap_or_else(|| json!({}))).unwrap();
        }
    }
}
