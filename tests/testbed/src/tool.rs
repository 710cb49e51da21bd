// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Programs of Debian's that the testbed uses, and what to install where one is missing.

use std::ffi::OsString;
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// `name`, found also where only root looks for programs.
#[must_use]
pub fn command(name: &str) -> Command {
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    path.push(OsString::from(":/usr/sbin:/sbin"));
    let mut command = Command::new(name);
    command.env("PATH", path);
    command
}

/// Runs `command`, which comes with the Debian package `package`.
///
/// # Errors
/// It is missing or failed; the error says what it said.
pub fn run(command: &mut Command, package: &str) -> Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command
        .output()
        .with_context(|| format!("running {program} (Debian package {package})"))?;
    ensure!(
        output.status.success(),
        "{program}: {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_says_what_the_program_said() {
        run(&mut command("true"), "coreutils").unwrap();
        let error =
            run(command("sh").args(["-c", "echo disk is full >&2; exit 1"]), "dash").unwrap_err();
        assert!(error.to_string().contains("disk is full"), "{error}");
        let error = run(&mut command("no-such-program"), "the-package").unwrap_err();
        assert!(error.to_string().contains("the-package"), "{error}");
    }
}
