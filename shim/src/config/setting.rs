// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The one table of keys. Each part of the configuration is declared once, by [`settings!`]; its structure with plain
//! fields, its defaults, and the table by which files, annotations, checks and the printed configuration work all come
//! from that declaration.

use std::path::PathBuf;

use toml::Value;

use super::{Config, Table};

/// What kind of value a key has. Annotations are text and are read by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Bool,
    /// A whole number, 0 or more.
    Unsigned,
    /// A whole number.
    Signed,
    Text,
    List,
}

/// How far a key has an effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Honoured {
    /// Every value has the effect that it has in Kata.
    Yes,
    /// These values have.
    Only(&'static [&'static str]),
    /// None, yet: who sets it is told.
    No,
    /// None, and none is missing: it is about a program or a device that ecr does not have.
    Moot,
}

/// A key of the configuration file.
pub(super) struct Key {
    pub(super) table: Table,
    pub(super) name: &'static str,
    pub(super) kind: Kind,
    pub(super) honoured: Honoured,
    pub(super) get: fn(&Config) -> Value,
    /// The error says what is wrong with the value.
    pub(super) set: fn(&mut Config, &Value) -> Result<(), String>,
}

/// A type that a key can have.
pub(super) trait Setting: Sized {
    const KIND: Kind;
    fn from_value(value: &Value) -> Result<Self, String>;
    fn to_value(&self) -> Value;
}

/// Declare a table of the configuration file: a structure with plain fields, and its rows of the table of keys.
macro_rules! settings {
    (
        $(#[$meta:meta])*
        pub struct $name:ident, $table:expr, $keys:ident = config.$field:ident {
            $( $(#[doc = $doc:literal])* $key:ident: $type:ty = $default:expr, $honoured:expr $(, $parse:path)?; )*
        }
    ) => {
        $(#[$meta])*
        #[derive(Debug, Clone, PartialEq)]
        pub struct $name {
            $( $(#[doc = $doc])* pub $key: $type, )*
        }

        impl Default for $name {
            fn default() -> Self {
                Self { $( $key: $default, )* }
            }
        }

        pub(super) const $keys: &[Key] = &[ $(
            Key {
                table: $table,
                name: stringify!($key),
                kind: <$type as Setting>::KIND,
                honoured: $honoured,
                get: |config| Setting::to_value(&config.$field.$key),
                set: |config, value| {
                    config.$field.$key = settings!(@parse value $(, $parse)?)?;
                    Ok(())
                },
            },
        )* ];
    };
    (@parse $value:ident) => { Setting::from_value($value) };
    (@parse $value:ident, $parse:path) => { $parse($value) };
}

/// Declare an enumeration of words. The empty string is the default. The given function says that a word is unknown.
macro_rules! choice {
    (
        $(#[$meta:meta])*
        pub enum $name:ident, $unknown:expr;
        $( $(#[doc = $doc:literal])* $(#[default $($default:tt)?])? $variant:ident = $word:literal $(| $alias:literal)*, )*
    ) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
        pub enum $name {
            $( $(#[doc = $doc])* $(#[default $($default)?])? $variant, )*
        }

        impl $name {
            /// The word for it in configuration files.
            pub const fn as_str(self) -> &'static str {
                match self {
                    $( Self::$variant => $word, )*
                }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl Setting for $name {
            const KIND: Kind = Kind::Text;

            fn from_value(value: &toml::Value) -> Result<Self, String> {
                match value.as_str() {
                    Some("") => Ok(Self::default()),
                    $( Some($word $(| $alias)*) => Ok(Self::$variant), )*
                    Some(word) => {
                        let unknown: fn(&str, &str) -> String = $unknown;
                        Err(unknown(word, &format!("[{}]", [$($word),*].join(" "))))
                    }
                    None => Err($crate::config::setting::mismatch("a string", value)),
                }
            }

            fn to_value(&self) -> toml::Value {
                self.as_str().into()
            }
        }
    };
}

pub(super) use {choice, settings};

/// That a value is of another type than it should be.
pub(super) fn mismatch(expected: &str, found: &Value) -> String {
    let shown: String = found.to_string().chars().take(60).collect();
    format!("expected {expected}, found {} {shown}", found.type_str())
}

impl Setting for bool {
    const KIND: Kind = Kind::Bool;

    fn from_value(value: &Value) -> Result<Self, String> {
        value.as_bool().ok_or_else(|| mismatch("a boolean", value))
    }

    fn to_value(&self) -> Value {
        (*self).into()
    }
}

impl Setting for u32 {
    const KIND: Kind = Kind::Unsigned;

    fn from_value(value: &Value) -> Result<Self, String> {
        let number = value.as_integer().and_then(|number| number.try_into().ok());
        number.ok_or_else(|| mismatch("a whole number from 0 to 4294967295", value))
    }

    fn to_value(&self) -> Value {
        (*self).into()
    }
}

impl Setting for u64 {
    const KIND: Kind = Kind::Unsigned;

    fn from_value(value: &Value) -> Result<Self, String> {
        let number = value.as_integer().and_then(|number| number.try_into().ok());
        number.ok_or_else(|| mismatch("a whole number, 0 or more", value))
    }

    fn to_value(&self) -> Value {
        // The file format has no larger numbers.
        i64::try_from(*self).unwrap_or(i64::MAX).into()
    }
}

impl Setting for i64 {
    const KIND: Kind = Kind::Signed;

    fn from_value(value: &Value) -> Result<Self, String> {
        value.as_integer().ok_or_else(|| mismatch("a whole number", value))
    }

    fn to_value(&self) -> Value {
        (*self).into()
    }
}

impl Setting for String {
    const KIND: Kind = Kind::Text;

    fn from_value(value: &Value) -> Result<Self, String> {
        value.as_str().map(Into::into).ok_or_else(|| mismatch("a string", value))
    }

    fn to_value(&self) -> Value {
        self.as_str().into()
    }
}

impl Setting for PathBuf {
    const KIND: Kind = Kind::Text;

    fn from_value(value: &Value) -> Result<Self, String> {
        String::from_value(value).map(Into::into)
    }

    fn to_value(&self) -> Value {
        self.to_string_lossy().as_ref().into()
    }
}

/// The empty string is no path.
impl Setting for Option<PathBuf> {
    const KIND: Kind = Kind::Text;

    fn from_value(value: &Value) -> Result<Self, String> {
        let path = PathBuf::from_value(value)?;
        Ok((!path.as_os_str().is_empty()).then_some(path))
    }

    fn to_value(&self) -> Value {
        self.as_ref().map_or_else(|| "".into(), Setting::to_value)
    }
}

impl<T: Setting> Setting for Vec<T> {
    const KIND: Kind = Kind::List;

    fn from_value(value: &Value) -> Result<Self, String> {
        let Some(items) = value.as_array() else {
            return Err(mismatch("a list of strings", value));
        };
        items.iter().map(T::from_value).collect()
    }

    fn to_value(&self) -> Value {
        Value::Array(self.iter().map(Setting::to_value).collect())
    }
}
