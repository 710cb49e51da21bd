// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Runtime options: what stands under `options` of a runtime in containerd's configuration. Those of
//! `runtimeoptions.v1` name a configuration file; those of other runtimes (`ctr` sends runc's unasked) say nothing to
//! us.

use std::path::PathBuf;

use protobuf::well_known_types::any::Any;
use protobuf::{CodedInputStream, Message};

use crate::error::{Error, Kind, Result};

/// The messages that name a configuration file; the older one has the same fields.
const TYPES: [&str; 2] = ["runtimeoptions.v1.Options", "cri.runtimeoptions.v1.Options"];

/// `runtimeoptions.v1.Options.config_path`.
const CONFIG_PATH: u32 = 2;

/// Check options as `start` gets them: an encoded `Any`, or nothing.
pub fn check(bytes: &[u8]) -> Result<()> {
    if bytes.is_empty() {
        return Ok(());
    }
    let any = Any::parse_from_bytes(bytes).map_err(|error| invalid(&error))?;
    config_path(Some(&any)).map(drop)
}

/// The configuration file that options name.
pub fn config_path(options: Option<&Any>) -> Result<Option<PathBuf>> {
    let Some(options) = options else { return Ok(None) };
    let name = options.type_url.rsplit('/').next().unwrap_or_default();
    if !TYPES.contains(&name) {
        return Ok(None);
    }
    let path = string_field(&options.value, CONFIG_PATH).map_err(|error| invalid(&error))?;
    Ok(path.filter(|path| !path.is_empty()).map(PathBuf::from))
}

/// The last value of a string field of an encoded message.
fn string_field(message: &[u8], number: u32) -> protobuf::Result<Option<String>> {
    let mut value = None;
    let mut input = CodedInputStream::from_bytes(message);
    while let Some(tag) = input.read_raw_tag_or_eof()? {
        // A tag is the field's number and its wire type; 2 is what has a length.
        if tag == number << 3 | 2 {
            value = Some(input.read_string()?);
        } else {
            protobuf::rt::read_unknown_or_skip_group(tag, &mut input, &mut Default::default())?;
        }
    }
    Ok(value)
}

fn invalid(error: &protobuf::Error) -> Error {
    Error::new(Kind::InvalidArgument, format!("read runtime options: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As containerd 1.6 sends them for `ConfigPath = "ecr.toml"`.
    const RECORDED: &[u8] =
        b"\x0a\x19runtimeoptions.v1.Options\x12\x15\x0a\x09type-name\x12\x08ecr.toml";

    #[test]
    fn options_name_a_configuration_file() {
        check(RECORDED).unwrap();
        let any = Any::parse_from_bytes(RECORDED).unwrap();
        assert_eq!(config_path(Some(&any)).unwrap(), Some("ecr.toml".into()));
        let prefixed = Any {
            type_url: "type.googleapis.com/cri.runtimeoptions.v1.Options".into(),
            ..any.clone()
        };
        assert_eq!(config_path(Some(&prefixed)).unwrap(), Some("ecr.toml".into()));
    }

    #[test]
    fn what_is_not_ours_is_ignored_and_what_is_broken_refused() {
        check(b"").unwrap();
        let runc = Any { type_url: "containerd.runc.v1.Options".into(), ..Default::default() };
        assert_eq!(config_path(Some(&runc)).unwrap(), None);
        assert!(check(b"\x0a\xff").is_err());
        assert!(check(&RECORDED[..RECORDED.len() - 3]).is_err());
        let broken = Any { type_url: TYPES[0].into(), value: vec![0x12, 9], ..Default::default() };
        assert!(config_path(Some(&broken)).is_err());
    }
}
