// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! `ecr-runtime exec`: this terminal becomes that of a shell in the guest.

use std::io::IsTerminal as _;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use clap::Args;
use nix::sys::termios::{self, SetArg, Termios};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};
use tokio::signal::unix::{SignalKind, signal};
use tokio_vsock::{VsockAddr, VsockStream};

use ecr_agent_protocol::client::connect_multiplexed;

use crate::client;

#[derive(Debug, Args)]
pub struct Arguments {
    /// vsock port of the debug console
    #[arg(long = "kata-debug-port", value_name = "PORT", default_value_t = 1026)]
    port: u32,
    /// The sandbox
    #[arg(value_name = "SANDBOX")]
    sandbox: String,
}

/// Where an agent listens.
#[derive(Debug, PartialEq, Eq)]
enum Address {
    Vsock { cid: u32 },
    Multiplexed { path: PathBuf },
}

impl Address {
    /// `vsock://CID:PORT` or `hvsock://PATH:PORT`. The port is the agent's, not the console's.
    fn parse(url: &str) -> Result<Self> {
        let url = url.trim();
        let parsed = (|| {
            let (scheme, rest) = url.split_once("://")?;
            let (host, _port) = rest.rsplit_once(':')?;
            match scheme {
                "vsock" => Some(Self::Vsock { cid: host.parse().ok()? }),
                "hvsock" => Some(Self::Multiplexed { path: host.into() }),
                _ => None,
            }
        })();
        parsed.with_context(|| {
            format!("the shim says that the agent is at {url:?}, which is no address")
        })
    }
}

/// The terminal in raw mode; dropped, it is as it was.
struct RawTerminal(Termios);

impl RawTerminal {
    fn take() -> Result<Self> {
        let before = termios::tcgetattr(std::io::stdin()).context("look at the terminal")?;
        let mut raw = before.clone();
        termios::cfmakeraw(&mut raw);
        termios::tcsetattr(std::io::stdin(), SetArg::TCSANOW, &raw).context("set the terminal")?;
        Ok(Self(before))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // It may have been closed.
        let _ = termios::tcsetattr(std::io::stdin(), SetArg::TCSANOW, &self.0);
    }
}

/// Connect this program's standard input and output to the debug console.
pub fn run(arguments: &Arguments, root: &Path) -> Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let outcome = runtime.block_on(console(arguments, root));
    // A thread may still wait for the terminal; nobody waits for the thread.
    runtime.shutdown_background();
    outcome.map(|()| ExitCode::SUCCESS)
}

async fn console(arguments: &Arguments, root: &Path) -> Result<()> {
    let url = client::ask_async(root, &arguments.sandbox, "/agent-url").await?;
    let port = arguments.port;
    let hint = || {
        format!(
            "connect to the debug console of sandbox {} on port {port}: is debug_console_enabled set in its \
             configuration?",
            arguments.sandbox
        )
    };
    match Address::parse(&url)? {
        Address::Vsock { cid } => {
            let stream = VsockStream::connect(VsockAddr::new(cid, port)).await;
            attend(stream.with_context(hint)?).await
        }
        Address::Multiplexed { path } => {
            attend(connect_multiplexed(&path, port).await.with_context(hint)?).await
        }
    }
}

/// Standard input or output, to be waited for.
fn stream_of(stream: impl AsFd) -> Result<tokio::fs::File> {
    let descriptor = stream.as_fd().try_clone_to_owned().context("duplicate a descriptor")?;
    Ok(tokio::fs::File::from_std(descriptor.into()))
}

/// Copy both ways until the guest hangs up, or a signal ends it.
async fn attend(stream: impl AsyncRead + AsyncWrite) -> Result<()> {
    let (stdin, stdout) = (stream_of(std::io::stdin())?, stream_of(std::io::stdout())?);
    let terminal = std::io::stdin().is_terminal().then(RawTerminal::take).transpose()?;
    let (mut from_guest, mut to_guest) = tokio::io::split(stream);
    let input = async {
        let mut stdin = stdin;
        let copied = tokio::io::copy(&mut stdin, &mut to_guest).await;
        // The guest's shell sees the end of its input, and ends.
        let _ = to_guest.shutdown().await;
        match copied {
            Ok(_) => std::future::pending().await,
            Err(error) => error,
        }
    };
    let output = async {
        let mut stdout = stdout;
        let copied = tokio::io::copy(&mut from_guest, &mut stdout).await;
        stdout.flush().await?;
        copied
    };
    let (mut hangup, mut interrupt, mut terminate) = (
        signal(SignalKind::hangup())?,
        signal(SignalKind::interrupt())?,
        signal(SignalKind::terminate())?,
    );
    let ended = tokio::select! {
        copied = output => copied.map(drop).context("read from the guest"),
        error = input => Err(error).context("write to the guest"),
        _ = hangup.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
        _ = terminate.recv() => Ok(()),
    };
    let was_raw = terminal.is_some();
    drop(terminal);
    if was_raw {
        eprintln!();
    }
    match ended {
        // A guest that ends cuts the connection.
        Err(error)
            if error
                .downcast_ref::<std::io::Error>()
                .is_some_and(|error| error.kind() == std::io::ErrorKind::ConnectionReset) =>
        {
            bail!("the guest is gone")
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_of_addresses_are_understood() {
        assert_eq!(Address::parse("vsock://7:1024\n").unwrap(), Address::Vsock { cid: 7 });
        let path = PathBuf::from("/run/vc/vm/s/kata.hvsock");
        assert_eq!(
            Address::parse("hvsock:///run/vc/vm/s/kata.hvsock:1024").unwrap(),
            Address::Multiplexed { path }
        );
        for wrong in ["", "vsock://x:1024", "vsock://7", "tcp://1:2"] {
            assert!(Address::parse(wrong).is_err(), "{wrong}");
        }
    }
}
