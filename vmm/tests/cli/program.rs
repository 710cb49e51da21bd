// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! One run of `ecr-vmm`.

use std::ffi::OsStr;
use std::io::{ErrorKind, Read};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A program that does not end fails the test instead of stopping it.
const PATIENCE: Duration = Duration::from_secs(60);

/// A run that is killed where the test forgets it.
pub struct Program(Child);

/// How a run ended.
#[derive(Debug)]
pub struct Ended {
    pub status: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Program {
    /// Start with nothing to read and nobody's terminal.
    pub fn start<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ecr-vmm"));
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Self(command.spawn().unwrap())
    }

    /// A VM with a kernel and no console.
    pub fn vm(kernel: &Path, arguments: &[&str]) -> Self {
        let kernel = kernel.to_str().unwrap();
        let fixed = ["--kernel", kernel, "--memory", "16M", "--console", "off"];
        Self::start(fixed.iter().chain(arguments))
    }

    pub fn from_child(child: Child) -> Self {
        Self(child)
    }

    pub fn signal(&self, signal: i32) {
        let pid = i32::try_from(self.0.id()).unwrap();
        // SAFETY: no pointer is passed, and the process has not been waited for, so its id is its own.
        assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
    }

    /// Connect to the socket that the program makes.
    pub fn connect(&mut self, socket: &Path) -> UnixStream {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match UnixStream::connect(socket) {
                Ok(stream) => return stream,
                Err(error) if matches!(error.kind(), ErrorKind::NotFound) => {}
                Err(error) => panic!("{error}"),
            }
            assert!(self.0.try_wait().unwrap().is_none(), "it has ended before it listened");
            assert!(Instant::now() < deadline, "no socket {socket:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Wait for the end.
    pub fn end(mut self) -> Ended {
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < deadline, "it does not end");
            std::thread::sleep(Duration::from_millis(5));
        };
        let text = |pipe: Option<&mut dyn Read>| {
            let mut text = String::new();
            pipe.map(|pipe| pipe.read_to_string(&mut text).unwrap());
            text
        };
        Ended {
            status: status.code().unwrap_or_else(|| panic!("{status}")),
            stdout: text(self.0.stdout.as_mut().map(|pipe| pipe as &mut dyn Read)),
            stderr: text(self.0.stderr.as_mut().map(|pipe| pipe as &mut dyn Read)),
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // It has ended already where all went well.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Ended {
    /// It ended with this status, and one line on standard error that contains this text.
    #[track_caller]
    pub fn assert(&self, status: i32, text: &str) {
        assert_eq!(self.status, status, "{self:?}");
        assert!(self.stderr.starts_with("ecr-vmm: ") && self.stderr.contains(text), "{self:?}");
        assert_eq!(self.stderr.lines().count(), 1, "{self:?}");
    }
}
