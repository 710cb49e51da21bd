// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Which names containers and execs may have. They become parts of paths on host and guest.

use crate::error::{Error, Kind, Result};

/// The longest name that containerd itself accepts.
const MAX_LENGTH: usize = 76;

/// Check a container's id: `^[a-zA-Z0-9][a-zA-Z0-9_.-]+$`.
pub fn check_container(id: &str) -> Result<()> {
    check("container", id, 2)
}

/// Check an exec's id: as a container's, but one character is enough.
pub fn check_exec(id: &str) -> Result<()> {
    check("exec", id, 1)
}

fn check(what: &str, id: &str, shortest: usize) -> Result<()> {
    let good = (shortest..=MAX_LENGTH).contains(&id.len())
        && id.starts_with(|first: char| first.is_ascii_alphanumeric())
        && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte));
    if good {
        return Ok(());
    }
    // What is quoted is bounded, too.
    let shown: String = id.chars().take(MAX_LENGTH + 1).collect();
    Err(Error::new(
        Kind::InvalidArgument,
        format!(
            "{what} id {shown:?} is not allowed: it takes {shortest} to {MAX_LENGTH} letters, digits, '_', '.' and \
             '-', a letter or digit first"
        ),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_safe_in_paths() {
        for id in ["c1", "0a", "a_b.c-d", &"x".repeat(MAX_LENGTH)] {
            check_container(id).unwrap();
        }
        for id in ["", "c", "-c1", ".c1", "..", "a/b", "a b", "c\0", "é1", &"x".repeat(77)] {
            assert!(check_container(id).is_err(), "{id:?}");
        }
        check_exec("1").unwrap();
        assert!(check_exec("").is_err());
        assert!(check_exec("../1").is_err());
    }
}
