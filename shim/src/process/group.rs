// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Which containers share a virtual machine. CRI implementations say in annotations whether a container is a pod's
//! sandbox or belongs to one; a container without such annotations has a virtual machine of its own.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use serde::Deserialize;

use crate::error::{Error, Kind, Result};

/// Annotations that tell a container's type, and the values for a sandbox and for a container of a pod: containerd,
/// CRI-O, dockershim. The first that is there counts.
const TYPES: [(&str, &str, &str); 3] = [
    ("io.kubernetes.cri.container-type", "sandbox", "container"),
    ("io.kubernetes.cri-o.ContainerType", "sandbox", "container"),
    ("io.kubernetes.docker.type", "podsandbox", "container"),
];

/// Annotations that name the sandbox of a container.
const SANDBOX_IDS: [&str; 3] =
    ["io.kubernetes.cri.sandbox-id", "io.kubernetes.cri-o.SandboxID", "io.kubernetes.sandbox.id"];

/// The longest `config.json` that is read.
pub(crate) const MAX_SPEC: u64 = 16 << 20;

/// What a container is to its virtual machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// It is alone in it.
    Single,
    /// It is the first of a pod.
    Sandbox,
    /// It joins the pod whose sandbox has this id.
    Pod(String),
}

impl Role {
    /// Tell it from a container's annotations.
    pub fn of(annotations: &HashMap<String, String>) -> Result<Self> {
        for (key, sandbox, container) in TYPES {
            match annotations.get(key).map(String::as_str) {
                None => {}
                Some(value) if value == sandbox => return Ok(Role::Sandbox),
                Some(value) if value == container => return sandbox_id(annotations).map(Role::Pod),
                Some(value) => {
                    return Err(invalid(format!(
                        "Unknown container type {value} in annotation {key}"
                    )));
                }
            }
        }
        Ok(Role::Single)
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
        let text = read_bounded(&path)?;
        let spec: Annotated = serde_json::from_slice(&text)
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

fn sandbox_id(annotations: &HashMap<String, String>) -> Result<String> {
    SANDBOX_IDS.iter().find_map(|key| annotations.get(*key)).cloned().ok_or_else(|| {
        invalid(format!("Could not find sandbox ID: none of {} is set", SANDBOX_IDS.join(", ")))
    })
}

fn invalid(text: String) -> Error {
    Error::new(Kind::InvalidArgument, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn role(annotations: &[(&str, &str)]) -> Result<Role> {
        Role::of(&annotations.iter().map(|&(k, v)| (k.to_owned(), v.to_owned())).collect())
    }

    #[test]
    fn every_cri_says_it_in_its_own_words() {
        assert_eq!(role(&[]).unwrap(), Role::Single);
        assert_eq!(role(&[("a", "b")]).unwrap(), Role::Single);
        for (key, sandbox, id_key) in [
            ("io.kubernetes.cri.container-type", "sandbox", "io.kubernetes.cri.sandbox-id"),
            ("io.kubernetes.cri-o.ContainerType", "sandbox", "io.kubernetes.cri-o.SandboxID"),
            ("io.kubernetes.docker.type", "podsandbox", "io.kubernetes.sandbox.id"),
        ] {
            assert_eq!(role(&[(key, sandbox), (id_key, "s1")]).unwrap(), Role::Sandbox);
            let container = role(&[(key, "container"), (id_key, "s1")]).unwrap();
            assert_eq!(container, Role::Pod("s1".into()));
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused_in_kata_s_words() {
        let error = role(&[("io.kubernetes.cri.container-type", "pod")]).unwrap_err();
        assert!(error.to_string().contains("Unknown container type pod"), "{error}");
        let error = role(&[("io.kubernetes.cri.container-type", "container")]).unwrap_err();
        assert!(error.to_string().contains("Could not find sandbox ID"), "{error}");
    }

    #[test]
    fn only_the_annotations_of_a_specification_are_looked_at() {
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("config.json");
        fs::write(&config, r#"{"process": 7, "annotations": null}"#).unwrap();
        assert_eq!(Role::of_bundle(dir.path()).unwrap(), Role::Single);
        fs::write(&config, "{").unwrap();
        let error = Role::of_bundle(dir.path()).unwrap_err();
        assert!(error.to_string().contains("config.json"), "{error}");
    }
}
