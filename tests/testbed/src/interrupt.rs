// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Leaves no directory, process group or raw terminal behind when `ecr-testbed` is interrupted.
//!
//! What must be undone is registered for as long as its guard lives. On SIGINT, SIGTERM or SIGHUP a thread undoes
//! all of it and ends the process; children that are not registered die with it (`PR_SET_PDEATHSIG`).

use std::io;
use std::path::PathBuf;

use parking_lot::Mutex;
use rustix::process::{Pid, Signal};
use rustix::termios::{OptionalActions, Termios};

/// Something to undo.
#[derive(Debug)]
pub enum Undo {
    /// Remove this directory and what is in it.
    Directory(PathBuf),
    /// Kill this process group.
    Group(Pid),
    /// Give the terminal on standard input these settings back.
    Terminal(Box<Termios>),
}

static PENDING: Mutex<Vec<(u64, Undo)>> = Mutex::new(Vec::new());
const SIGNALS: [i32; 3] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP];

/// Undoes its [`Undo`] when dropped, or when the process is interrupted before.
#[derive(Debug)]
#[must_use = "undone at once unless kept"]
pub struct Guard(u64);

impl Guard {
    /// Registers `undo`.
    pub fn new(undo: Undo) -> Self {
        let mut pending = PENDING.lock();
        let id = pending.last().map_or(0, |(id, _)| id + 1);
        pending.push((id, undo));
        Self(id)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let mut pending = PENDING.lock();
        if let Some(index) = pending.iter().position(|(id, _)| *id == self.0) {
            let (_, undo) = pending.remove(index);
            carry_out(&undo);
        }
    }
}

fn carry_out(undo: &Undo) {
    // What is undone may have gone by itself, and there is nobody to tell.
    match undo {
        Undo::Directory(path) => {
            let _ = std::fs::remove_dir_all(path);
        }
        Undo::Group(leader) => {
            let _ = rustix::process::kill_process_group(*leader, Signal::KILL);
        }
        Undo::Terminal(settings) => {
            let stdin = rustix::stdio::stdin();
            let _ = rustix::termios::tcsetattr(stdin, OptionalActions::Now, settings);
        }
    }
}

/// Starts the thread that waits for the signals. Call it before any other thread starts: they inherit the mask.
///
/// # Errors
/// The signals cannot be blocked or the thread cannot be started.
pub fn handle() -> io::Result<()> {
    // SAFETY: an all-zero sigset_t is a valid object for sigemptyset, which initialises it.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: `set` is ours and outlives the calls; the old mask is not asked for.
    let blocked = unsafe {
        libc::sigemptyset(&raw mut set);
        for signal in SIGNALS {
            libc::sigaddset(&raw mut set, signal);
        }
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut())
    };
    if blocked != 0 {
        return Err(io::Error::from_raw_os_error(blocked));
    }
    std::thread::Builder::new().name("interrupt".into()).spawn(move || {
        let mut signal = 0;
        // SAFETY: `set` was initialised above and `signal` is ours.
        if unsafe { libc::sigwait(&raw const set, &raw mut signal) } == 0 {
            let mut pending = PENDING.lock();
            while let Some((_, undo)) = pending.pop() {
                carry_out(&undo);
            }
            std::process::exit(128 + signal);
        }
    })?;
    Ok(())
}
