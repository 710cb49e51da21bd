// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Properties of `device_add`. Clients write switches and numbers as JSON has them, or as text, as on QEMU's
//! command line (`"on"`, `"4"`).

use serde_json::{Map, Value};

use super::request::QmpError;

/// The arguments of one `device_add`.
#[derive(Debug)]
pub(super) struct Properties<'a> {
    driver: &'a str,
    values: &'a Map<String, Value>,
}

impl<'a> Properties<'a> {
    /// Arguments for `driver`, which knows `used`, and `ignored` that change nothing here.
    pub(super) fn new(
        driver: &'a str,
        values: &'a Map<String, Value>,
        used: &[&str],
        ignored: &[&str],
    ) -> Result<Self, QmpError> {
        let known = |name: &&String| {
            ["driver", "id", "bus", "addr"]
                .iter()
                .chain(used)
                .chain(ignored)
                .any(|known| known == name)
        };
        match values.keys().find(|name| !known(name)) {
            Some(name) => Err(QmpError::generic(format!("Property '{driver}.{name}' not found"))),
            None => Ok(Self { driver, values }),
        }
    }

    /// A text.
    pub(super) fn text(&self, name: &str) -> Result<Option<&'a str>, QmpError> {
        match self.values.get(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(wrong_type(name, "string")),
        }
    }

    /// A text that must be there.
    pub(super) fn required(&self, name: &str) -> Result<&'a str, QmpError> {
        self.text(name)?.ok_or_else(|| QmpError::generic(format!("Parameter '{name}' is missing")))
    }

    /// A number from 0 to `u16::MAX`.
    pub(super) fn number(&self, name: &str) -> Result<Option<u16>, QmpError> {
        let Some(value) = self.values.get(name) else { return Ok(None) };
        let number = match value {
            Value::Number(number) => number.as_u64(),
            Value::String(text) => number(text),
            _ => return Err(wrong_type(name, "integer")),
        };
        let number = number.and_then(|number| u16::try_from(number).ok());
        number.map(Some).ok_or_else(|| self.refuses(name, value))
    }

    /// A switch.
    pub(super) fn switch(&self, name: &str) -> Result<Option<bool>, QmpError> {
        let Some(value) = self.values.get(name) else { return Ok(None) };
        switch(value).map(Some).ok_or_else(|| self.refuses(name, value))
    }

    /// A switch that may also be left to the device (`auto`).
    pub(super) fn automatic(&self, name: &str) -> Result<Option<bool>, QmpError> {
        match self.values.get(name) {
            Some(Value::String(text)) if text == "auto" => Ok(None),
            _ => self.switch(name),
        }
    }

    /// The error for a value that the property cannot have.
    pub(super) fn refuses(&self, name: &str, value: &Value) -> QmpError {
        let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        let driver = self.driver;
        QmpError::generic(format!("Property '{driver}.{name}' doesn't take value '{text}'"))
    }

    /// The error for the name of something that is not there.
    pub(super) fn cannot_find(&self, name: &str, value: &str) -> QmpError {
        let device = self.driver.replace("-pci", "-device");
        QmpError::generic(format!("Property '{device}.{name}' can't find value '{value}'"))
    }
}

/// A switch as JSON or as text.
pub(super) fn switch(value: &Value) -> Option<bool> {
    match value {
        Value::Bool(on) => Some(*on),
        Value::String(text) => match text.as_str() {
            "on" | "yes" | "true" | "y" => Some(true),
            "off" | "no" | "false" | "n" => Some(false),
            _ => None,
        },
        _ => None,
    }
}

fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

fn wrong_type(name: &str, wanted: &str) -> QmpError {
    QmpError::generic(format!("Invalid parameter type for '{name}', expected: {wanted}"))
}

/// The slot in `addr`: hexadecimal, and a function behind a dot that must be 0.
pub(super) fn slot(addr: &str) -> Option<u8> {
    let slot = addr.strip_suffix(".0").unwrap_or(addr);
    let slot = slot.strip_prefix("0x").unwrap_or(slot);
    // from_str_radix would take a sign as well.
    let digits = slot.bytes().all(|digit| digit.is_ascii_hexdigit());
    u8::from_str_radix(slot, 16).ok().filter(|slot| digits && *slot < 32)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn with<T>(values: Value, test: impl FnOnce(&Properties<'_>) -> T) -> T {
        let Value::Object(values) = values else { panic!("not an object") };
        test(&Properties::new("virtio-net-pci", &values, &["mq", "vectors", "mac"], &[]).unwrap())
    }

    #[test]
    fn switches_and_numbers_come_as_json_or_as_text() {
        for on in [json!(true), json!("on"), json!("true"), json!("yes")] {
            assert_eq!(with(json!({"mq": on}), |it| it.switch("mq")), Ok(Some(true)));
        }
        assert_eq!(with(json!({"mq": "off"}), |it| it.switch("mq")), Ok(Some(false)));
        for four in [json!(4), json!("4"), json!("0x4")] {
            assert_eq!(with(json!({"vectors": four}), |it| it.number("vectors")), Ok(Some(4)));
        }
        assert_eq!(with(json!({}), |it| it.number("vectors")), Ok(None));
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let text = with(json!({"mq": "maybe"}), |it| it.switch("mq")).unwrap_err().desc;
        assert_eq!(text, "Property 'virtio-net-pci.mq' doesn't take value 'maybe'");
        for bad in [json!(-1), json!(65536), json!("x"), json!(1.5)] {
            assert!(with(json!({"vectors": bad}), |it| it.number("vectors")).is_err());
        }
        let values = json!({"size": 1});
        let unknown = Properties::new("virtio-blk-pci", values.as_object().unwrap(), &[], &[]);
        assert_eq!(unknown.unwrap_err().desc, "Property 'virtio-blk-pci.size' not found");
    }

    #[test]
    fn a_slot_is_hexadecimal() {
        assert_eq!(["1", "01", "0x1e", "1f.0"].map(slot), [Some(1), Some(1), Some(30), Some(31)]);
        assert_eq!(["", "20", "1.1", "+1", "x", "1.0.0"].map(slot), [None; 6]);
    }
}
