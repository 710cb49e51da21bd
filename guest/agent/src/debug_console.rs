// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The debug console: a shell of the image for people, on vsock or on the console.
//!
//! On vsock each connection gets a shell of its own on a terminal of its own. When the connection ends, the terminal
//! hangs up, and the shell ends as it would on any terminal.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::fcntl::OFlag;
use nix::pty::{Winsize, grantpt, posix_openpt, ptsname_r, unlockpt};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, Interest};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener};

use crate::exec::{ENVIRONMENT, own_the_terminal};
use crate::reaper::Reaper;
use crate::sandbox::Sandbox;

const CONSOLE: &str = "/dev/console";
const SHELLS: [&str; 2] = ["/bin/bash", "/bin/sh"];
/// As many people as will ever look at once.
const MOST_SHELLS: usize = 8;
/// A shell that ends at once must not be started as fast as the guest can.
const PAUSE: Duration = Duration::from_secs(1);
/// What a shell may still say, or do, when it or its peer has gone.
const LAST_WORDS: Duration = Duration::from_millis(200);
const PIECE: usize = 16 << 10;
/// Nobody has said how big the other side's terminal is.
const SIZE: Winsize = Winsize { ws_row: 24, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 };

/// A shell for every connection to vsock port `port`, for ever.
pub async fn serve(port: u32, sandbox: Arc<Sandbox>) -> Result<()> {
    let listener = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port))
        .with_context(|| format!("listen on vsock port {port} for the debug console"))?;
    let room = Arc::new(Semaphore::new(MOST_SHELLS));
    loop {
        let (mut connection, _) = listener.accept().await.context("accept a debug console")?;
        let Ok(place) = Arc::clone(&room).try_acquire_owned() else {
            // They are told if they still listen.
            let _ = connection.write_all(b"too many debug consoles are open\r\n").await;
            continue;
        };
        let sandbox = Arc::clone(&sandbox);
        tokio::spawn(async move {
            if let Err(error) = talk(connection, find_shell(&SHELLS), &sandbox.reaper).await {
                log::warn!("debug console: {error:#}");
            }
            drop(place);
        });
    }
}

/// A shell on the console, and another one when it ends, for ever.
pub async fn on_console(sandbox: Arc<Sandbox>) -> Result<()> {
    let shell = find_shell(&SHELLS).context("the guest image has no shell")?;
    loop {
        let console = OpenOptions::new()
            .read(true)
            .write(true)
            .open(CONSOLE)
            .with_context(|| format!("open {CONSOLE}"))?;
        let mut child = command(&shell, &console)?;
        let ended = sandbox.reaper.spawn(&mut child).context("start a shell on the console")?;
        drop(child);
        ended.wait().await;
        tokio::time::sleep(PAUSE).await;
    }
}

fn find_shell(shells: &[&str]) -> Option<PathBuf> {
    shells.iter().map(PathBuf::from).find(|shell| shell.exists())
}

fn command(shell: &Path, terminal: &File) -> Result<Command> {
    let again = || terminal.try_clone().context("open the terminal again");
    let mut child = Command::new(shell);
    child.arg("-i").env_clear().envs(ENVIRONMENT).current_dir("/");
    child.stdin(again()?).stdout(again()?).stderr(again()?);
    // SAFETY: between fork and exec only system calls are made, and nothing is allocated.
    unsafe { child.pre_exec(own_the_terminal) };
    Ok(child)
}

/// Join `connection` and a shell until one of them ends.
async fn talk(
    mut connection: impl AsyncRead + AsyncWrite + Unpin,
    shell: Option<PathBuf>,
    reaper: &Reaper,
) -> Result<()> {
    let Some(shell) = shell else {
        let _ = connection.write_all(b"the guest image has no shell\r\n").await;
        return Ok(());
    };
    let (master, terminal) = open_terminal()?;
    let mut child = command(&shell, &terminal)?;
    let ended = reaper.spawn(&mut child).with_context(|| format!("start {}", shell.display()))?;
    // The terminal is the shell's alone, or its end would not be seen.
    drop((child, terminal));
    // What the shell leaves in the background may hold its terminal.
    let shell_gone = async {
        ended.wait().await;
        tokio::time::sleep(LAST_WORDS).await;
    };
    let outcome = tokio::select! {
        outcome = relay(connection, master) => outcome,
        () = shell_gone => Ok(()),
    };
    // The master is closed, which hangs the terminal up. A shell that does not hear that is killed.
    if timeout(LAST_WORDS, ended.wait()).await.is_err() {
        ended.signal(libc::SIGKILL);
        ended.wait().await;
    }
    outcome
}

fn open_terminal() -> Result<(OwnedFd, File)> {
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
    let master = posix_openpt(flags).context("open a terminal")?;
    grantpt(&master).and_then(|()| unlockpt(&master)).context("unlock a terminal")?;
    let name = ptsname_r(&master).context("find a terminal")?;
    let terminal = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOCTTY)
        .open(&name)
        .with_context(|| format!("open {name}"))?;
    // SAFETY: TIOCSWINSZ reads a winsize, which is a constant.
    if unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ as _, &SIZE) } < 0 {
        return Err(io::Error::last_os_error()).context("set the size of a terminal");
    }
    Ok((master.into(), terminal))
}

/// Carry bytes both ways until one side has no more.
async fn relay(connection: impl AsyncRead + AsyncWrite + Unpin, master: OwnedFd) -> Result<()> {
    let interest = Interest::READABLE | Interest::WRITABLE;
    // SAFETY: the descriptor is owned, and nothing replaces or closes it while it is registered.
    let master = unsafe { AsyncFd::register_with_interest(File::from(master), interest) }
        .context("watch a terminal")?;
    let (mut from, mut to) = tokio::io::split(connection);
    tokio::select! {
        outcome = shell_to_peer(&master, &mut to) => outcome,
        outcome = peer_to_shell(&mut from, &master) => outcome,
    }
}

async fn shell_to_peer(master: &AsyncFd<File>, to: &mut (impl AsyncWrite + Unpin)) -> Result<()> {
    let mut piece = vec![0; PIECE];
    loop {
        let read = master
            .async_io(Interest::READABLE, |mut master| io::Read::read(&mut master, &mut piece))
            .await;
        match read {
            // The last process on the terminal has gone.
            Ok(0) => return Ok(()),
            Err(error) if error.raw_os_error() == Some(libc::EIO) => return Ok(()),
            Err(error) => return Err(error).context("read from a shell"),
            Ok(length) => to.write_all(&piece[..length]).await.context("write to the peer")?,
        }
    }
}

async fn peer_to_shell(from: &mut (impl AsyncRead + Unpin), master: &AsyncFd<File>) -> Result<()> {
    let mut piece = vec![0; PIECE];
    loop {
        let length = from.read(&mut piece).await.context("read from the peer")?;
        if length == 0 {
            return Ok(());
        }
        let mut rest = &piece[..length];
        while !rest.is_empty() {
            let written = master
                .async_io(Interest::WRITABLE, |mut master| io::Write::write(&mut master, rest))
                .await
                .context("write to a shell")?;
            rest = &rest[written..];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn an_image_without_a_shell_says_so() {
        let (ours, theirs) = tokio::io::duplex(1024);
        let reaper = Reaper::that_never_collects();
        talk(theirs, find_shell(&["/no/shell"]), &reaper).await.unwrap();
        let mut said = String::new();
        let mut ours = ours;
        ours.read_to_string(&mut said).await.unwrap();
        assert_eq!(said, "the guest image has no shell\r\n");
    }

    #[test]
    fn a_terminal_has_a_size() {
        let (_master, terminal) = open_terminal().unwrap();
        let mut size = Winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: TIOCGWINSZ writes a winsize, which lives until the call returns.
        let outcome =
            unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCGWINSZ as _, &mut size) };
        assert_eq!((outcome, size.ws_row, size.ws_col), (0, 24, 80));
    }
}
