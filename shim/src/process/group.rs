// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Which containers share a virtual machine, as the `config.json` of a bundle tells it.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use serde::Deserialize;

use crate::config::{ContainerType, container_type, sandbox_id};
use crate::error::{Error, Kind, Result};

/// The longest `config.json` that is read.
const MAX_SPEC: u64 = 16 << 20;

/// What a container is to its virtual machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// It brings one with it: it is alone in it, or the first of a pod.
    Owner,
    /// It joins the pod whose sandbox has this id.
    Member(String),
}

impl Role {
    /// Tell it from a container's annotations.
    pub fn of(annotations: &HashMap<String, String>) -> Result<Self> {
        match container_type(annotations)? {
            ContainerType::Single | ContainerType::PodSandbox => Ok(Role::Owner),
            ContainerType::PodContainer => {
                sandbox_id(annotations).map(|id| Role::Member(id.to_owned()))
            }
        }
    }

    /// Tell it from the `config.json` of a bundle.
    pub fn of_bundle(bundle: &Path) -> Result<Self> {
        /// The only part of the specification that matters here.
        #[derive(Deserialize)]
        struct Annotated {
            #[serde(default)]
            annotations: Option<HashMap<String, String>>,
        }
        let path = bundle.join("config.json");
        let spec: Annotated = serde_json::from_slice(&read_bounded(&path)?)
            .map_err(|error| invalid(format!("read {}: {error}", path.display())))?;
        Self::of(&spec.annotations.unwrap_or_default())
    }
}

/// Read a specification, unless it is larger than any can be.
pub(crate) fn read_bounded(path: &Path) -> Result<Vec<u8>> {
    let failed = |error| invalid(format!("read {}: {error}", path.display()));
    let size = fs::metadata(path).map_err(failed)?.len();
    if size > MAX_SPEC {
        return Err(invalid(format!(
            "{} has {size} bytes; no specification is larger than {MAX_SPEC}",
            path.display()
        )));
    }
    fs::read(path).map_err(failed)
}

fn invalid(text: String) -> Error {
    Error::new(Kind::InvalidArgument, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_annotations_of_a_specification_are_looked_at() {
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("config.json");
        fs::write(&config, r#"{"process": 7, "annotations": null}"#).unwrap();
        assert_eq!(Role::of_bundle(dir.path()).unwrap(), Role::Owner);
        let member = r#"{"annotations": {"io.kubernetes.cri.container-type": "container",
                         "io.kubernetes.cri.sandbox-id": "s1"}}"#;
        fs::write(&config, member).unwrap();
        assert_eq!(Role::of_bundle(dir.path()).unwrap(), Role::Member("s1".into()));
        fs::write(&config, "{").unwrap();
        let error = Role::of_bundle(dir.path()).unwrap_err();
        assert!(error.to_string().contains("config.json"), "{error}");
    }
}
