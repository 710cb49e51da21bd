// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The envelope: what a request looks like before its command is known, and the messages that go back.

use serde::Serialize;
use serde_json::{Map, Value};

use crate::control::CommandError;

/// QEMU's error classes (`qapi/error.json`), as far as commands here answer with them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) enum ErrorClass {
    GenericError,
    CommandNotFound,
    DeviceNotFound,
}

/// A request that was refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct QmpError {
    pub(super) class: ErrorClass,
    pub(super) desc: String,
}

impl QmpError {
    pub(super) fn generic(desc: impl Into<String>) -> Self {
        Self { class: ErrorClass::GenericError, desc: desc.into() }
    }

    pub(super) fn device_not_found(id: &str) -> Self {
        CommandError::DeviceNotFound(id.to_owned()).into()
    }

    pub(super) fn command_not_found(desc: impl Into<String>) -> Self {
        Self { class: ErrorClass::CommandNotFound, desc: desc.into() }
    }
}

impl From<CommandError> for QmpError {
    fn from(error: CommandError) -> Self {
        let class = match error {
            CommandError::DeviceNotFound(_) => ErrorClass::DeviceNotFound,
            CommandError::WrongState(_) | CommandError::Failed(_) | CommandError::Gone => {
                ErrorClass::GenericError
            }
        };
        Self { class, desc: error.to_string() }
    }
}

/// What a client asks for.
#[derive(Debug, PartialEq)]
pub(super) struct Request {
    pub(super) command: String,
    pub(super) arguments: Map<String, Value>,
}

/// Take a request apart: the `id` that goes back with the answer, of any type, and what is asked for.
pub(super) fn parse(message: Value) -> (Option<Value>, Result<Request, QmpError>) {
    let Value::Object(mut members) = message else {
        return (None, Err(QmpError::generic("QMP input must be a JSON object")));
    };
    let id = members.remove("id");
    (id, members_to_request(members))
}

fn members_to_request(mut members: Map<String, Value>) -> Result<Request, QmpError> {
    let execute = members.remove("execute");
    let arguments = members.remove("arguments");
    if let Some(name) = members.keys().next() {
        return Err(QmpError::generic(format!("QMP input member '{name}' is unexpected")));
    }
    let arguments = match arguments {
        None => Map::new(),
        Some(Value::Object(arguments)) => arguments,
        Some(_) => {
            return Err(QmpError::generic("QMP input member 'arguments' must be an object"));
        }
    };
    match execute {
        Some(Value::String(command)) => Ok(Request { command, arguments }),
        Some(_) => Err(QmpError::generic("QMP input member 'execute' must be a string")),
        None => Err(QmpError::generic("QMP input lacks member 'execute'")),
    }
}

/// An answer. Members stand in the order in which QEMU writes them.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub(super) enum Answer {
    Return {
        #[serde(rename = "return")]
        value: Value,
        #[serde(skip_serializing_if = "Option::is_none")]
        id: Option<Value>,
    },
    Error {
        #[serde(skip_serializing_if = "Option::is_none")]
        id: Option<Value>,
        error: QmpError,
    },
}

impl Answer {
    pub(super) fn new(id: Option<Value>, result: Result<Value, QmpError>) -> Self {
        match result {
            Ok(value) => Self::Return { value, id },
            Err(error) => Self::Error { id, error },
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn refusal(message: Value) -> String {
        parse(message).1.unwrap_err().desc
    }

    #[test]
    fn takes_a_request_apart() {
        let (id, request) = parse(json!({"execute": "stop", "id": {"a": [1, null]}}));
        assert_eq!(id, Some(json!({"a": [1, null]})));
        assert_eq!(request, Ok(Request { command: "stop".into(), arguments: Map::new() }));
    }

    #[test]
    fn a_refused_envelope_keeps_its_id() {
        let (id, request) = parse(json!({"id": 4}));
        assert_eq!(id, Some(json!(4)));
        assert_eq!(request.unwrap_err().desc, "QMP input lacks member 'execute'");
    }

    #[test]
    fn refuses_in_qemus_words() {
        assert_eq!(refusal(json!([1])), "QMP input must be a JSON object");
        assert_eq!(refusal(json!({"execute": 5})), "QMP input member 'execute' must be a string");
        assert_eq!(
            refusal(json!({"execute": "stop", "arguments": null})),
            "QMP input member 'arguments' must be an object"
        );
        assert_eq!(
            refusal(json!({"execute": "stop", "foo": 1})),
            "QMP input member 'foo' is unexpected"
        );
        // The capability `oob` is not offered.
        assert_eq!(
            refusal(json!({"exec-oob": "stop"})),
            "QMP input member 'exec-oob' is unexpected"
        );
    }

    #[test]
    fn members_stand_in_qemus_order() {
        let line = |result| serde_json::to_string(&Answer::new(Some(json!(1)), result)).unwrap();
        assert_eq!(line(Ok(json!({}))), r#"{"return":{},"id":1}"#);
        assert_eq!(
            line(Err(QmpError::generic("x"))),
            r#"{"id":1,"error":{"class":"GenericError","desc":"x"}}"#
        );
        let line = serde_json::to_string(&Answer::new(None, Ok(json!([])))).unwrap();
        assert_eq!(line, r#"{"return":[]}"#);
    }
}
