// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What is wrong with a configuration, found before anything is created.

use super::VmConfig;

/// A value that cannot work. The text names the field and the value, and says what would work.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct ConfigError {
    /// Which field.
    pub field: String,
    /// The value, and what is wrong with it.
    pub problem: String,
}

impl VmConfig {
    /// Check all that can be checked without touching the host.
    ///
    /// # Errors
    /// The first value that cannot work.
    pub fn validate(&self) -> Result<(), ConfigError> {
        Ok(())
    }
}
