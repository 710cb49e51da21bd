// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What callers are told. An error has a kind, on which containerd acts, and a text, which a person reads: what was
//! attempted, with which value, and why it failed.

use std::fmt;

/// Kinds of errors, with gRPC's names and meanings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The request makes no sense, whatever the state.
    InvalidArgument,
    /// No such container or exec.
    NotFound,
    /// It is there already.
    AlreadyExists,
    /// Not in this state.
    FailedPrecondition,
    /// Not offered.
    Unimplemented,
    /// It took too long.
    DeadlineExceeded,
    /// The guest or its agent is gone.
    Unavailable,
    /// Anything else.
    Internal,
}

/// An error with its kind.
#[derive(Debug, Clone)]
pub struct Error {
    kind: Kind,
    text: String,
}

/// A result with [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error of `kind` that says `text`.
    pub fn new(kind: Kind, text: impl Into<String>) -> Self {
        Self { kind, text: text.into() }
    }

    /// What callers act on.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The same error, with what was attempted put before it.
    #[must_use]
    pub fn context(self, attempted: impl fmt::Display) -> Self {
        Self { kind: self.kind, text: format!("{attempted}: {}", self.text) }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Error {}

/// An [`anyhow::Error`] is of no special kind unless an [`Error`] lies in its chain.
impl From<anyhow::Error> for Error {
    fn from(error: anyhow::Error) -> Self {
        let kind = error
            .chain()
            .find_map(|cause| cause.downcast_ref::<Error>())
            .map_or(Kind::Internal, |cause| cause.kind);
        Self { kind, text: format!("{error:#}") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context as _;

    #[test]
    fn a_kind_survives_its_context() {
        let inner = Error::new(Kind::NotFound, "container c1 not found");
        let outer: Error = Err::<(), _>(inner).context("start container").unwrap_err().into();
        assert_eq!(outer.kind(), Kind::NotFound);
        assert_eq!(outer.to_string(), "start container: container c1 not found");
    }
}
