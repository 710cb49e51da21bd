// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Which file a process's first argument means, and the step into it. Errors read as other runtimes' do, since
//! people and programs look for these words.

use std::convert::Infallible;
use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use ecr_agent_protocol::oci::Process;
use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::sys::signal::{
    SaFlags, SigAction, SigHandler, SigSet, SigmaskHow, Signal, sigaction, sigprocmask,
};
use nix::unistd::{AccessFlags, execve, faccessat};

use super::privilege::home_of;

/// A program ready to be executed.
#[derive(Debug)]
pub struct Program {
    path: PathBuf,
    file: CString,
    arguments: Vec<CString>,
    environment: Vec<CString>,
}

impl Program {
    /// Look the program up as the process's user, in its root and working directory.
    pub fn find(process: &Process) -> Result<Self> {
        let Some(name) = process.args.first() else { bail!("args must not be empty") };
        let mut environment = process.env.clone();
        if !environment.iter().any(|entry| entry.starts_with("HOME=")) {
            environment.push(format!("HOME={}", home_of(process.user.get_or_default().uid)));
        }
        let search = environment.iter().rev().find_map(|entry| entry.strip_prefix("PATH="));
        let path = find(name, search.unwrap_or_default())?;
        let file = CString::new(path.as_os_str().as_bytes())
            .with_context(|| format!("exec: {name:?} contains a zero byte"))?;
        let strings = |list: &[String], what| {
            list.iter()
                .map(|text| CString::new(text.as_str()))
                .collect::<Result<Vec<_>, _>>()
                .with_context(|| format!("{what} contains a zero byte"))
        };
        let arguments = strings(&process.args, "an argument")?;
        let environment = strings(&environment, "an environment variable")?;
        Ok(Program { path, file, arguments, environment })
    }

    /// Become the program.
    pub fn execute(&self) -> Result<Infallible> {
        reset_signals()?;
        close_others()?;
        let Err(error) = execve(&self.file, &self.arguments, &self.environment);
        Err(anyhow!("exec {}: {}", self.path.display(), error.desc().to_lowercase()))
    }
}

fn find(name: &str, search: &str) -> Result<PathBuf> {
    let failed = |why: &str| anyhow!("exec: {name:?}: {why}");
    if name.contains('/') {
        return match executable(Path::new(name)) {
            Ok(()) => Ok(name.into()),
            Err(Errno::ENOENT) => Err(failed(&format!("stat {name}: no such file or directory"))),
            Err(error) => Err(failed(&error.desc().to_lowercase())),
        };
    }
    search
        .split(':')
        .map(|directory| Path::new(if directory.is_empty() { "." } else { directory }).join(name))
        .find(|path| !name.is_empty() && executable(path).is_ok())
        .ok_or_else(|| failed("executable file not found in $PATH"))
}

fn executable(path: &Path) -> nix::Result<()> {
    let found = nix::sys::stat::stat(path)?;
    if found.st_mode & libc::S_IFMT == libc::S_IFDIR {
        return Err(Errno::EISDIR);
    }
    faccessat(nix::fcntl::AT_FDCWD, path, AccessFlags::X_OK, AtFlags::AT_EACCESS)
}

/// Rust programs ignore SIGPIPE; others must not find it so.
fn reset_signals() -> Result<()> {
    let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    // SAFETY: no handler of ours is taken away.
    unsafe { sigaction(Signal::SIGPIPE, &default) }.context("reset SIGPIPE")?;
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None).context("unblock signals")
}

/// Nothing but the standard streams reaches the program.
fn close_others() -> Result<()> {
    // SAFETY: the descriptors stay open until the program is executed.
    let outcome = unsafe {
        libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC)
    };
    Errno::result(outcome).context("keep file descriptors from the program")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn programs_are_found_as_shells_do() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).display().to_string();
        for (name, mode) in [("tool", 0o755), ("text", 0o644)] {
            std::fs::write(path(name), "").unwrap();
            std::fs::set_permissions(path(name), std::fs::Permissions::from_mode(mode)).unwrap();
        }
        let search = format!("/nowhere:{}", dir.path().display());
        assert_eq!(find("tool", &search).unwrap(), dir.path().join("tool"));
        assert_eq!(find(&path("tool"), "").unwrap(), dir.path().join("tool"));
        let error = |name: &str| find(name, &search).unwrap_err().to_string();
        assert_eq!(error("text"), "exec: \"text\": executable file not found in $PATH");
        assert_eq!(error(""), "exec: \"\": executable file not found in $PATH");
        assert_eq!(error(&path("text")), format!("exec: {:?}: permission denied", path("text")));
        let missing = path("missing");
        let expected = format!("exec: {missing:?}: stat {missing}: no such file or directory");
        assert_eq!(error(&missing), expected);
        assert_eq!(error("/"), "exec: \"/\": is a directory");
    }

    #[test]
    fn a_process_needs_arguments() {
        assert!(Program::find(&Process::new()).is_err());
    }
}
