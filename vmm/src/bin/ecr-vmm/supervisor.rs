// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What the main thread does while the VM runs: wait for its end, for signals and for keys.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use ecr_vmm::VmHandle;
use ecr_vmm::control::Command;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::signals::{Signals, Wish};
use super::terminal::{Forwarded, Terminal};

/// How long a guest that was asked to power off has for it.
const PATIENCE: Duration = Duration::from_secs(30);

const EXIT: u64 = 0;
const SIGNAL: u64 = 1;
const KEY: u64 = 2;

/// Waits for the end of a VM.
#[derive(Debug)]
pub struct Supervisor<'a> {
    vm: &'a VmHandle,
    signals: Signals,
    terminal: Option<Terminal>,
    epoll: Epoll,
    /// When a guest that was asked to power off has had enough time.
    deadline: Option<Instant>,
}

impl<'a> Supervisor<'a> {
    pub fn new(vm: &'a VmHandle, signals: Signals, terminal: Option<Terminal>) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let watch = |fd: RawFd, token| {
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, token))
        };
        watch(vm.exit_fd(), EXIT)?;
        watch(signals.as_raw_fd(), SIGNAL)?;
        if let Some(terminal) = &terminal {
            watch(terminal.as_raw_fd(), KEY)?;
        }
        Ok(Self { vm, signals, terminal, epoll, deadline: None })
    }

    /// Returns when the VM has ended. The terminal is restored.
    pub fn run(mut self) -> io::Result<()> {
        loop {
            let mut ready = [EpollEvent::default(); 3];
            let count = match self.epoll.wait(self.timeout(), &mut ready) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            for event in ready.iter().take(count) {
                match event.data() {
                    EXIT => return Ok(()),
                    SIGNAL => self.signalled(),
                    _ => self.typed()?,
                }
            }
            if self.deadline.is_some_and(|deadline| deadline <= Instant::now()) {
                eprintln!("ecr-vmm: the guest did not power off within {} s", PATIENCE.as_secs());
                self.quit();
            }
        }
    }

    /// In milliseconds; without a deadline, for ever.
    fn timeout(&self) -> i32 {
        let Some(deadline) = self.deadline else { return -1 };
        let left = deadline.saturating_duration_since(Instant::now()).as_millis() + 1;
        i32::try_from(left).unwrap_or(i32::MAX)
    }

    /// The first signal asks the guest, the second one does not.
    fn signalled(&mut self) {
        while let Some(wish) = self.signals.next() {
            if wish == Wish::Quit || self.deadline.is_some() {
                self.quit();
            } else {
                eprintln!("ecr-vmm: asking the guest to power off; ask again to end it at once");
                self.deadline = Some(Instant::now() + PATIENCE);
                // The guest's answer is the end of the VM.
                drop(self.vm.request(Command::Powerdown));
            }
        }
    }

    fn typed(&mut self) -> io::Result<()> {
        let Some(terminal) = &mut self.terminal else { return Ok(()) };
        match terminal.forward() {
            Forwarded::Typed => {}
            Forwarded::WayOut => self.quit(),
            Forwarded::Closed => {
                let fd = terminal.as_raw_fd();
                self.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default())?;
            }
        }
        Ok(())
    }

    /// The VM's end tells that it was heard.
    fn quit(&mut self) {
        self.deadline = None;
        drop(self.vm.request(Command::Quit));
    }
}
