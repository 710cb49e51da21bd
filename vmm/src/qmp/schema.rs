// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Types of arguments, replies and events: what is checked, and what `query-qmp-schema` shows of it
//! (QEMU's `qapi/introspect.json`).
//!
//! Left out: alternates, features and variants of objects, which nothing here has.

use serde_json::{Map, Value, json};

use super::command::COMMANDS;
use super::event::EVENTS;
use super::request::QmpError;

/// A QAPI type.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Type {
    Str,
    Int,
    Bool,
    Null,
    Enum(&'static [&'static str]),
    /// Whatever it is, the command looks at it itself.
    Any,
    Array(&'static Type),
    Object(&'static [Member]),
    /// An object with members besides these.
    Open(&'static [Member]),
}

/// A member of an object.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Member {
    name: &'static str,
    kind: &'static Type,
    optional: bool,
}

/// A member that must be there.
pub(super) const fn member(name: &'static str, kind: &'static Type) -> Member {
    Member { name, kind, optional: false }
}

/// A member that may be there.
pub(super) const fn optional(name: &'static str, kind: &'static Type) -> Member {
    Member { name, kind, optional: true }
}

impl Type {
    /// The object without members.
    pub(super) const EMPTY: Self = Self::Object(&[]);

    /// Check a value that stands in a request under `name`.
    pub(super) fn check(&self, name: &str, value: &Value) -> Result<(), QmpError> {
        match (self, value) {
            (Self::Str, Value::String(_))
            | (Self::Bool, Value::Bool(_))
            | (Self::Null, Value::Null)
            | (Self::Any, _) => Ok(()),
            (Self::Int, Value::Number(number)) if !number.is_f64() => Ok(()),
            (Self::Enum(values), Value::String(text)) if !values.contains(&text.as_str()) => {
                Err(QmpError::generic(format!("Parameter '{name}' does not accept value '{text}'")))
            }
            (Self::Enum(_), Value::String(_)) => Ok(()),
            (Self::Array(element), Value::Array(values)) => values
                .iter()
                .enumerate()
                .try_for_each(|(index, value)| element.check(&format!("{name}[{index}]"), value)),
            (Self::Object(members), Value::Object(values)) => {
                check_members(members, values, &format!("{name}."))
            }
            (Self::Open(members), Value::Object(values)) => {
                check_declared(members, values, &format!("{name}."))
            }
            _ => Err(QmpError::generic(format!(
                "Invalid parameter type for '{name}', expected: {}",
                self.json_type()
            ))),
        }
    }

    /// Name of the JSON type, as QEMU spells it.
    fn json_type(&self) -> &'static str {
        match self {
            Self::Str | Self::Enum(_) => "string",
            Self::Int => "integer",
            Self::Bool => "boolean",
            Self::Null => "null",
            Self::Array(_) => "array",
            Self::Any => "value",
            Self::Object(_) | Self::Open(_) => "object",
        }
    }
}

/// Check the arguments of a command.
pub(super) fn check_arguments(kind: &Type, values: &Map<String, Value>) -> Result<(), QmpError> {
    match kind {
        Type::Object(members) => check_members(members, values, ""),
        Type::Open(members) => check_declared(members, values, ""),
        _ => Ok(()),
    }
}

/// In QEMU's order: what is declared first, then what is left.
fn check_members(
    members: &[Member],
    values: &Map<String, Value>,
    prefix: &str,
) -> Result<(), QmpError> {
    check_declared(members, values, prefix)?;
    match values.keys().find(|key| members.iter().all(|member| member.name != *key)) {
        Some(key) => Err(QmpError::generic(format!("Parameter '{prefix}{key}' is unexpected"))),
        None => Ok(()),
    }
}

fn check_declared(
    members: &[Member],
    values: &Map<String, Value>,
    prefix: &str,
) -> Result<(), QmpError> {
    for Member { name, kind, optional } in members {
        match values.get(*name) {
            Some(value) => kind.check(&format!("{prefix}{name}"), value)?,
            None if *optional => {}
            None => {
                return Err(QmpError::generic(format!("Parameter '{prefix}{name}' is missing")));
            }
        }
    }
    Ok(())
}

/// The answer to `query-qmp-schema`: commands, events, and the types they use, each once.
pub(super) fn introspect() -> Value {
    let mut types = Types::default();
    let mut schema: Vec<Value> = COMMANDS
        .iter()
        .map(|command| {
            json!({
                "name": command.name,
                "meta-type": "command",
                "arg-type": types.name(command.arguments),
                "ret-type": types.name(command.returns),
            })
        })
        .collect();
    schema.extend(EVENTS.iter().map(|event| {
        json!({"name": event.name, "meta-type": "event", "arg-type": types.name(event.data)})
    }));
    schema.extend(types.described);
    Value::Array(schema)
}

/// The types that were named so far.
#[derive(Default)]
struct Types {
    seen: Vec<(&'static Type, String)>,
    described: Vec<Value>,
}

impl Types {
    /// The name of a type. As with QEMU, only those of built-in types are meant to be known to clients.
    fn name(&mut self, kind: &'static Type) -> String {
        if let Some((_, name)) = self.seen.iter().find(|(seen, _)| *seen == kind) {
            return name.clone();
        }
        let number = self.seen.len().to_string();
        let (name, mut described) = match kind {
            Type::Str => ("str".into(), json!({"meta-type": "builtin", "json-type": "string"})),
            Type::Int => ("int".into(), json!({"meta-type": "builtin", "json-type": "int"})),
            Type::Bool => ("bool".into(), json!({"meta-type": "builtin", "json-type": "boolean"})),
            Type::Any => ("any".into(), json!({"meta-type": "builtin", "json-type": "value"})),
            Type::Null => ("null".into(), json!({"meta-type": "builtin", "json-type": "null"})),
            Type::Enum(values) => {
                let members: Vec<Value> = values.iter().map(|name| json!({"name": name})).collect();
                (number, json!({"meta-type": "enum", "members": members, "values": values}))
            }
            Type::Array(element) => {
                let element = self.name(element);
                let name = format!("[{element}]");
                (name, json!({"meta-type": "array", "element-type": element}))
            }
            Type::Object(members) | Type::Open(members) => {
                let members: Vec<Value> = members.iter().map(|one| self.describe(one)).collect();
                (self.seen.len().to_string(), json!({"meta-type": "object", "members": members}))
            }
        };
        self.seen.push((kind, name.clone()));
        described["name"] = json!(name);
        self.described.push(described);
        name
    }

    fn describe(&mut self, member: &Member) -> Value {
        let mut described = json!({"name": member.name, "type": self.name(member.kind)});
        if member.optional {
            // There is no default that the schema could tell.
            described["default"] = Value::Null;
        }
        described
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    const PERSON: Type = Type::Object(&[
        member("name", &Type::Str),
        optional("age", &Type::Int),
        optional("tags", &Type::Array(&Type::Enum(&["a", "b"]))),
        optional("home", &Type::Object(&[member("paid", &Type::Bool)])),
    ]);

    fn refusal(arguments: Value) -> String {
        let Value::Object(arguments) = arguments else { panic!("not an object") };
        check_arguments(&PERSON, &arguments).unwrap_err().desc
    }

    #[test]
    fn accepts_what_fits() {
        let value = json!({"name": "x", "age": 3, "tags": ["a", "b"], "home": {"paid": true}});
        assert_eq!(check_arguments(&PERSON, value.as_object().unwrap()), Ok(()));
    }

    #[test]
    fn refuses_in_qemus_words() {
        assert_eq!(refusal(json!({})), "Parameter 'name' is missing");
        assert_eq!(
            refusal(json!({"name": 1})),
            "Invalid parameter type for 'name', expected: string"
        );
        assert_eq!(
            refusal(json!({"name": "x", "age": 1.5})),
            "Invalid parameter type for 'age', expected: integer"
        );
        assert_eq!(
            refusal(json!({"name": "x", "tags": ["a", 5]})),
            "Invalid parameter type for 'tags[1]', expected: string"
        );
        assert_eq!(
            refusal(json!({"name": "x", "tags": ["c"]})),
            "Parameter 'tags[0]' does not accept value 'c'"
        );
        assert_eq!(refusal(json!({"name": "x", "home": {}})), "Parameter 'home.paid' is missing");
        assert_eq!(refusal(json!({"name": "x", "sex": 1})), "Parameter 'sex' is unexpected");
    }

    #[test]
    fn the_schema_describes_each_type_that_it_names() {
        let schema = introspect();
        let schema = schema.as_array().unwrap();
        let names: Vec<&str> = schema.iter().map(|one| one["name"].as_str().unwrap()).collect();
        let known: HashSet<&str> = names.iter().copied().collect();
        assert_eq!(names.len(), known.len(), "a name twice");
        for entity in schema {
            for key in ["arg-type", "ret-type", "element-type"] {
                if let Some(name) = entity.get(key) {
                    assert!(known.contains(name.as_str().unwrap()), "{entity}");
                }
            }
            for member in entity.get("members").and_then(Value::as_array).into_iter().flatten() {
                if let Some(name) = member.get("type") {
                    assert!(known.contains(name.as_str().unwrap()), "{entity}");
                }
            }
        }
    }

    #[test]
    fn the_schema_fits_into_one_line_of_a_go_scanner() {
        let length = introspect().to_string().len();
        assert!(length < 60 << 10, "{length}");
    }
}
