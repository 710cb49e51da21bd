// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What the annotations of a container manager say about a container: a pod's sandbox, a container of a pod, or one
//! that stands alone; and which sandbox it belongs to.

use std::collections::HashMap;

use crate::error::{Error, Kind, Result};

/// What a container is to its pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ContainerType {
    /// The first container of a pod, which brings the sandbox into being.
    PodSandbox,
    /// One of the other containers of a pod.
    PodContainer,
    /// No pod: the container has a sandbox of its own.
    Single,
}

impl ContainerType {
    /// True when creating this container means starting a virtual machine.
    pub fn brings_sandbox(self) -> bool {
        self != Self::PodContainer
    }
}

/// A container manager's words: the key, then its values for a sandbox and for a container. The first key that is
/// present decides.
const TYPE_KEYS: &[(&str, &str, &str)] = &[
    ("io.kubernetes.cri.container-type", "sandbox", "container"),
    ("io.kubernetes.cri-o.ContainerType", "sandbox", "container"),
    ("io.kubernetes.docker.type", "podsandbox", "container"),
];

/// Where container managers name the sandbox; the first that is present decides.
const SANDBOX_ID_KEYS: &[&str] =
    &["io.kubernetes.cri.sandbox-id", "io.kubernetes.cri-o.SandboxID", "io.kubernetes.sandbox.id"];

/// What kind of container has these annotations.
///
/// # Errors
/// A manager's key has a value that it has never had.
pub fn container_type(annotations: &HashMap<String, String>) -> Result<ContainerType> {
    for &(key, sandbox, container) in TYPE_KEYS {
        let Some(value) = annotations.get(key) else { continue };
        return match value.as_str() {
            value if value == sandbox => Ok(ContainerType::PodSandbox),
            value if value == container => Ok(ContainerType::PodContainer),
            value => Err(Error::new(
                Kind::InvalidArgument,
                format!(
                    "Unknown container type {value} in annotation {key}: expected {sandbox} or {container}"
                ),
            )),
        };
    }
    Ok(ContainerType::Single)
}

/// The sandbox that a container of a pod belongs to.
///
/// # Errors
/// No annotation names it.
pub fn sandbox_id(annotations: &HashMap<String, String>) -> Result<&str> {
    SANDBOX_ID_KEYS
        .iter()
        .find_map(|key| annotations.get(*key))
        .filter(|id| !id.is_empty())
        .map(String::as_str)
        .ok_or_else(|| {
            let keys = SANDBOX_ID_KEYS.join(", ");
            Error::new(
                Kind::InvalidArgument,
                format!("Could not find sandbox ID: a container of a pod needs one of the annotations {keys}"),
            )
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn annotations(pairs: &[(&str, &str)]) -> HashMap<String, String> {
        pairs.iter().map(|&(key, value)| (key.to_owned(), value.to_owned())).collect()
    }

    #[test]
    fn every_manager_is_understood() {
        for &(key, sandbox, container) in TYPE_KEYS {
            assert_eq!(
                container_type(&annotations(&[(key, sandbox)])).unwrap(),
                ContainerType::PodSandbox
            );
            assert_eq!(
                container_type(&annotations(&[(key, container)])).unwrap(),
                ContainerType::PodContainer
            );
        }
        assert_eq!(container_type(&annotations(&[])).unwrap(), ContainerType::Single);
    }

    #[test]
    fn the_first_manager_decides() {
        let both = annotations(&[
            ("io.kubernetes.docker.type", "podsandbox"),
            ("io.kubernetes.cri.container-type", "container"),
        ]);
        assert_eq!(container_type(&both).unwrap(), ContainerType::PodContainer);
    }

    #[test]
    fn an_unknown_type_is_refused() {
        let error = container_type(&annotations(&[("io.kubernetes.cri.container-type", "pod")]));
        let error = error.unwrap_err();
        assert_eq!(error.kind(), Kind::InvalidArgument);
        assert!(error.to_string().starts_with("Unknown container type pod"), "{error}");
    }

    #[test]
    fn a_sandbox_id_is_found_or_missed() {
        for key in SANDBOX_ID_KEYS {
            assert_eq!(sandbox_id(&annotations(&[(key, "s1")])).unwrap(), "s1");
        }
        let error = sandbox_id(&annotations(&[])).unwrap_err();
        assert!(error.to_string().starts_with("Could not find sandbox ID"), "{error}");
    }
}
