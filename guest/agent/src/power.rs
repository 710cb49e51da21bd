// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The end of the guest: who may ask for it, and how it is done.
//!
//! - The ACPI power button, which is an input device: a press of `KEY_POWER`.
//! - `SIGTERM`, `SIGUSR1` and `SIGUSR2`, which `poweroff` and `halt` of a busybox send to init.
//! - `SIGINT`, which the kernel sends for Ctrl-Alt-Del: restart.

use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use nix::errno::Errno;
use nix::sys::reboot::{RebootMode, reboot, set_cad_enabled};
use nix::sys::signal::{SIGKILL, SIGTERM, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, sync};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::Notify;

/// How long processes have to end by themselves.
const GRACE: Duration = Duration::from_secs(2);
/// How long the kernel has to end them after that.
const AFTER_KILL: Duration = Duration::from_secs(1);
const POLL: Duration = Duration::from_millis(5);

const INPUT_CLASS: &str = "/sys/class/input";
/// Type and code of the event (linux/input-event-codes.h), and the value that means "pressed".
const EV_KEY: u16 = 1;
const KEY_POWER: u16 = 116;
const PRESSED: i32 = 1;

/// What follows the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    PowerOff,
    Restart,
}

/// Those who may ask for the end of the guest. None is missed from [`Self::listen`] on: a button that nobody has open
/// forgets who pressed it.
pub struct Requests {
    signals: Signals,
    pressed: Arc<Notify>,
}

impl Requests {
    /// Listen to all of them.
    pub fn listen() -> Result<Self> {
        // Without this the kernel restarts at once when Ctrl-Alt-Del is pressed.
        if let Err(error) = set_cad_enabled(false) {
            log::warn!("keep Ctrl-Alt-Del from restarting at once: {error}");
        }
        let pressed = Arc::new(Notify::new());
        for button in power_buttons() {
            let pressed = Arc::clone(&pressed);
            tokio::spawn(async move {
                match wait_for_press(button).await {
                    Ok(()) => pressed.notify_one(),
                    Err(error) => log::warn!("the power button is lost: {error:#}"),
                }
            });
        }
        Ok(Self { signals: Signals::watch()?, pressed })
    }

    /// The first request.
    pub async fn first(mut self) -> Stop {
        tokio::select! {
            stop = self.signals.first() => stop,
            () = self.pressed.notified() => Stop::PowerOff,
        }
    }
}

/// The signals that ask for the end.
pub struct Signals {
    terminate: Signal,
    halt: Signal,
    power_off: Signal,
    interrupt: Signal,
}

impl Signals {
    /// Watch for them.
    pub fn watch() -> Result<Self> {
        let watch = |kind| signal(kind).context("watch for signals");
        Ok(Self {
            terminate: watch(SignalKind::terminate())?,
            halt: watch(SignalKind::user_defined1())?,
            power_off: watch(SignalKind::user_defined2())?,
            interrupt: watch(SignalKind::interrupt())?,
        })
    }

    /// The first of them.
    pub async fn first(&mut self) -> Stop {
        tokio::select! {
            _ = self.terminate.recv() => Stop::PowerOff,
            _ = self.halt.recv() => Stop::PowerOff,
            _ = self.power_off.recv() => Stop::PowerOff,
            _ = self.interrupt.recv() => Stop::Restart,
        }
    }
}

/// End all processes, write everything out, and give the machine back. Returns only with an error.
pub fn shut_down(stop: Stop) -> Result<()> {
    if !end_processes(SIGTERM, GRACE) {
        end_processes(SIGKILL, AFTER_KILL);
    }
    sync();
    crate::mounts::unmount_all();
    let mode = match stop {
        Stop::PowerOff => RebootMode::RB_POWER_OFF,
        Stop::Restart => RebootMode::RB_AUTOBOOT,
    };
    let Err(error) = reboot(mode);
    Err(anyhow!(error)).context("stop the machine")
}

/// Send `signal` to every process but this one and wait for their ends; true when none is left. Whoever loses its
/// parent becomes a child of init, so "no children" means "no processes".
fn end_processes(signal: nix::sys::signal::Signal, patience: Duration) -> bool {
    if kill(Pid::from_raw(-1), signal) == Err(Errno::ESRCH) {
        return true;
    }
    let deadline = Instant::now() + patience;
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Err(Errno::ECHILD) => return true,
            Ok(WaitStatus::StillAlive) if Instant::now() < deadline => std::thread::sleep(POLL),
            Ok(WaitStatus::StillAlive) => return false,
            _ => {}
        }
    }
}

/// The input devices that have a power key.
fn power_buttons() -> Vec<File> {
    let Ok(entries) = fs::read_dir(INPUT_CLASS) else { return Vec::new() };
    entries
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("event"))
        .filter(|entry| {
            fs::read_to_string(entry.path().join("device/capabilities/key"))
                .is_ok_and(|keys| has_key(&keys, KEY_POWER))
        })
        .filter_map(|entry| {
            let node = Path::new("/dev/input").join(entry.file_name());
            OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_NONBLOCK)
                .open(&node)
                .inspect_err(|error| log::warn!("open power button {}: {error}", node.display()))
                .ok()
        })
        .collect()
}

/// Whether `key` is in a bitmap as sysfs shows it: hexadecimal words of a `long` each, the highest one first.
fn has_key(bitmap: &str, key: u16) -> bool {
    let (word, bit) = (usize::from(key) / usize::BITS as usize, u32::from(key) % usize::BITS);
    bitmap
        .split_ascii_whitespace()
        .rev()
        .nth(word)
        .and_then(|word| usize::from_str_radix(word, 16).ok())
        .is_some_and(|word| word >> bit & 1 == 1)
}

async fn wait_for_press(button: File) -> Result<()> {
    const EVENT: usize = size_of::<libc::input_event>();
    // SAFETY: the File owns its descriptor, and nothing replaces or closes it while it is registered.
    let button = unsafe { AsyncFd::register_with_interest(button, Interest::READABLE) }
        .context("watch the power button")?;
    loop {
        let mut event = [0; EVENT];
        let mut ready = button.readable().await.context("wait for the power button")?;
        // The kernel hands out whole events.
        let read = ready.try_io(|button| button.get_ref().read_exact(&mut event));
        match read {
            Ok(outcome) => outcome.context("read from the power button")?,
            Err(_would_block) => continue,
        }
        if is_press(&event) {
            return Ok(());
        }
    }
}

/// An event ends with type, code and value; the time before them is of no interest.
fn is_press(event: &[u8; size_of::<libc::input_event>()]) -> bool {
    let Some((_, &[t0, t1, c0, c1, v0, v1, v2, v3])) = event.split_last_chunk::<8>() else {
        return false;
    };
    u16::from_ne_bytes([t0, t1]) == EV_KEY
        && u16::from_ne_bytes([c0, c1]) == KEY_POWER
        && i32::from_ne_bytes([v0, v1, v2, v3]) == PRESSED
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_power_key_in_a_capability_bitmap() {
        // As Linux shows the ACPI power button, and a keyboard that has many keys.
        assert!(has_key("10000000000000 0\n", KEY_POWER));
        assert!(has_key(
            "402000007 ffc03078f800d2a9 f2beffdfffefffff fffffffffffffffe\n",
            KEY_POWER
        ));
        assert!(!has_key("ffefffffffffffff ffffffffffffffff\n", KEY_POWER));
        assert!(!has_key("ffffffffffffffff\n", KEY_POWER));
        assert!(!has_key("not hex\n", KEY_POWER));
    }

    #[test]
    fn a_press_and_what_is_none() {
        let event = |kind: u16, code: u16, value: i32| {
            let mut event = [0xff; size_of::<libc::input_event>()];
            let tail = event.last_chunk_mut::<8>().unwrap();
            tail[0..2].copy_from_slice(&kind.to_ne_bytes());
            tail[2..4].copy_from_slice(&code.to_ne_bytes());
            tail[4..8].copy_from_slice(&value.to_ne_bytes());
            event
        };
        assert!(is_press(&event(EV_KEY, KEY_POWER, PRESSED)));
        assert!(!is_press(&event(EV_KEY, KEY_POWER, 0)));
        assert!(!is_press(&event(EV_KEY, 30, PRESSED)));
        assert!(!is_press(&event(0, 0, 0)));
    }
}
