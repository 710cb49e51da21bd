// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The contract between containerd and the shim as a process: how it is started, where it serves, what it prints, and
//! how a dead one is cleaned up after. See containerd's `runtime/v2/README.md`; what else its versions expect was
//! recorded from them.

pub mod args;
pub mod delete;
pub mod group;
pub mod id;
pub mod logger;
pub mod serve;
pub mod socket;
pub mod start;

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use crate::error::{Error, Kind, Result};
use crate::sandbox::Launcher;
use args::{Action, Args};

/// Where `start` leaves the listener for the shim.
const LISTENER_FD: i32 = 3;

/// Removes what is left on the host of a container whose shim is gone: namespace, container, bundle.
pub type CleanUp = fn(&str, &str, &Path) -> Result<()>;

/// The shim's `main`: `arguments` without the program's name, what makes the sandbox of the process that serves, and
/// what cleans up after one that died.
pub fn main(
    arguments: impl IntoIterator<Item = OsString>,
    launcher: impl FnOnce(&Args) -> Arc<dyn Launcher>,
    clean_up: CleanUp,
) -> ExitCode {
    let done = Args::parse(arguments).and_then(|args| run(&args, launcher, clean_up));
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log::error!("{error}");
            // Nobody may be there to read it.
            let _ = writeln!(io::stderr(), "{error}");
            ExitCode::FAILURE
        }
    }
}

fn run(
    args: &Args,
    launcher: impl FnOnce(&Args) -> Arc<dyn Launcher>,
    clean_up: CleanUp,
) -> Result<()> {
    match args.action {
        Action::Version => print(version().as_bytes()),
        Action::Start => print(start::start(args)?.as_bytes()),
        Action::Delete => print(&delete::delete(args, clean_up, &mut io::stderr())?),
        Action::Serve => serve::serve(args, launcher(args)),
    }
}

/// As Kata's shim says it.
fn version() -> String {
    format!(
        "containerd-shim-ecr-v2: id: \"io.containerd.ecr.v2\", version: {}, commit: {}\n",
        env!("CARGO_PKG_VERSION"),
        option_env!("ECR_COMMIT").unwrap_or("unknown")
    )
}

fn print(bytes: &[u8]) -> Result<()> {
    let mut stdout = io::stdout();
    stdout
        .write_all(bytes)
        .and_then(|()| stdout.flush())
        .map_err(|error| Error::new(Kind::Internal, format!("write the answer: {error}")))
}
