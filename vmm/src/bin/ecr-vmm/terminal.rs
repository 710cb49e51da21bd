// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The terminal while it belongs to the guest: raw (termios(3)), with a key that gets out.

use std::io::{self, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

/// What a person has to know.
pub const KEYS: &str = "Ctrl-A X ends the VM, Ctrl-A Ctrl-A sends a Ctrl-A";

/// Ctrl-A.
const ESCAPE: u8 = 1;

/// Standard input as the guest's keyboard. Dropping it restores the terminal.
#[derive(Debug)]
pub struct Terminal {
    before: Termios,
    keys: Keys,
    /// What is typed goes in here.
    ours: UnixStream,
    /// And comes out there.
    guest: UnixStream,
}

impl Terminal {
    /// Make the terminal raw.
    pub fn take() -> io::Result<Self> {
        let (ours, guest) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let before = Termios::get()?;
        before.raw().set()?;
        Ok(Self { before, keys: Keys::default(), ours, guest })
    }

    /// Where the guest's input is to be read.
    pub fn guest_end(&self) -> &UnixStream {
        &self.guest
    }

    /// Pass on what was typed. Returns whether it was the way out, or there is no more to come.
    pub fn forward(&mut self) -> Forwarded {
        let mut typed = [0; 1024];
        let typed = match io::stdin().lock().read(&mut typed) {
            Ok(0) => return Forwarded::Closed,
            Ok(length) => typed.get(..length).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Forwarded::Typed,
            Err(_) => return Forwarded::Closed,
        };
        let Some(passed) = self.keys.pass(typed) else { return Forwarded::WayOut };
        // What a guest that does not read its input has no room for is lost, as on a serial line. The
        // way out must go on working.
        let _ = self.ours.write(&passed);
        Forwarded::Typed
    }
}

/// What became of what was typed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Forwarded {
    /// The guest gets it.
    Typed,
    /// It was the key that gets out.
    WayOut,
    /// There is no more to come.
    Closed,
}

impl AsRawFd for Terminal {
    fn as_raw_fd(&self) -> RawFd {
        libc::STDIN_FILENO
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if let Err(error) = self.before.set() {
            eprintln!("ecr-vmm: restore the terminal: {error}");
        }
    }
}

/// Finds the way out among the keys.
#[derive(Debug, Default)]
struct Keys {
    escaped: bool,
}

impl Keys {
    /// What of `typed` is for the guest; `None` for the way out.
    fn pass(&mut self, typed: &[u8]) -> Option<Vec<u8>> {
        let mut passed = Vec::with_capacity(typed.len() + 1);
        for &key in typed {
            match (std::mem::take(&mut self.escaped), key) {
                (false, ESCAPE) => self.escaped = true,
                (false, key) => passed.push(key),
                (true, b'x' | b'X') => return None,
                (true, ESCAPE) => passed.push(ESCAPE),
                (true, key) => passed.extend([ESCAPE, key]),
            }
        }
        Some(passed)
    }
}

/// Settings of the terminal on standard input.
#[derive(Clone, Copy)]
struct Termios(libc::termios);

impl std::fmt::Debug for Termios {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Termios")
    }
}

impl Termios {
    fn get() -> io::Result<Self> {
        let mut termios = MaybeUninit::uninit();
        // SAFETY: the call writes a `termios` to where the pointer points, or fails.
        if unsafe { libc::tcgetattr(libc::STDIN_FILENO, termios.as_mut_ptr()) } < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call above has succeeded.
        Ok(Self(unsafe { termios.assume_init() }))
    }

    /// The same, raw. Output is still processed, so that our own lines begin at the margin.
    fn raw(mut self) -> Self {
        // SAFETY: the call changes the `termios` that the pointer points to, and nothing else.
        unsafe { libc::cfmakeraw(&raw mut self.0) };
        self.0.c_oflag |= libc::OPOST;
        self
    }

    fn set(&self) -> io::Result<()> {
        // SAFETY: the `termios` lives across the call, which only reads it.
        if unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, &raw const self.0) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_pass() {
        let mut keys = Keys::default();
        assert_eq!(keys.pass(b"ls -x\r\x03"), Some(b"ls -x\r\x03".to_vec()));
        assert_eq!(keys.pass(b"a\x01\x01b\x01cx"), Some(b"a\x01b\x01cx".to_vec()));
    }

    #[test]
    fn the_way_out_is_found_however_it_is_typed() {
        assert_eq!(Keys::default().pass(b"abc\x01x"), None);
        let mut keys = Keys::default();
        assert_eq!(keys.pass(b"\x01"), Some(vec![]));
        assert_eq!(keys.pass(b"X"), None);
    }
}
