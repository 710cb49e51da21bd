// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What the embedding process holds of a running VM: [`VmHandle`], and the mailbox behind it through
//! which everybody reaches the control thread.

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;

use ecr_devices::chipset::{GuestRequest, GuestRequestSink};
use parking_lot::{Condvar, Mutex};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::control::{Command, CommandError, Event, Reply, ShutdownReason};
use crate::vcpu::VcpuEvent;

/// What reaches the control thread through its mailbox.
#[derive(Debug)]
pub(crate) enum Message {
    /// A request and where its answer goes.
    Request(Command, mpsc::Sender<Result<Reply, CommandError>>),
    /// From now on send events there.
    Subscribe(mpsc::Sender<Event>),
    /// A vCPU has stopped by itself.
    Vcpu(u32, VcpuEvent),
    /// The process that serves a device is gone.
    BackendLost(String),
    /// A thread of this VM cannot go on.
    Failed(String),
}

/// In the order in which they are to be handled.
const GUEST_REQUESTS: [GuestRequest; 5] = [
    GuestRequest::TakeEjected,
    GuestRequest::CrashLoaded,
    GuestRequest::Panicked,
    GuestRequest::PowerOff,
    GuestRequest::Reset,
];

/// Where messages for the control thread are put down, from any thread.
pub(crate) struct Mailbox {
    messages: mpsc::Sender<Message>,
    /// What the guest asked for, as flags: a guest that asks a million times before the control thread
    /// looks has asked once.
    guest: AtomicU32,
    wake: EventFd,
}

impl fmt::Debug for Mailbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Mailbox")
    }
}

impl Mailbox {
    /// A mailbox and the end that the control thread reads.
    pub(crate) fn new() -> io::Result<(Arc<Self>, mpsc::Receiver<Message>)> {
        let (messages, receiver) = mpsc::channel();
        let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        Ok((Arc::new(Self { messages, guest: AtomicU32::new(0), wake }), receiver))
    }

    /// Put down a message. Returns whether anybody will read it.
    pub(crate) fn send(&self, message: Message) -> bool {
        let sent = self.messages.send(message).is_ok();
        self.wake();
        sent
    }

    /// What the guest has asked for since the last call.
    pub(crate) fn take_requests(&self) -> impl Iterator<Item = GuestRequest> + use<> {
        let flags = self.guest.swap(0, Ordering::AcqRel);
        GUEST_REQUESTS.into_iter().filter(move |request| flags & *request as u32 != 0)
    }

    /// Before looking into the mailbox: what is put down later wakes again.
    pub(crate) fn clear_wake(&self) {
        // The counter may be zero already, which is what is wanted.
        let _ = self.wake.read();
    }

    fn wake(&self) {
        // Fails only where the counter is full, and then the reader is awake anyway.
        let _ = self.wake.write(1);
    }
}

impl GuestRequestSink for Mailbox {
    fn request(&self, request: GuestRequest) {
        self.guest.fetch_or(request as u32, Ordering::AcqRel);
        self.wake();
    }
}

impl AsRawFd for Mailbox {
    fn as_raw_fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }
}

/// How a VM ended, for all who wait.
#[derive(Debug)]
pub(crate) struct Outcome {
    reason: Mutex<Option<ShutdownReason>>,
    last_output: Mutex<String>,
    changed: Condvar,
    exit: EventFd,
}

impl Outcome {
    pub(crate) fn new() -> io::Result<Self> {
        let exit = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        Ok(Self {
            reason: Mutex::new(None),
            last_output: Mutex::default(),
            changed: Condvar::new(),
            exit,
        })
    }

    /// Before the reason: what the guest said last.
    pub(crate) fn set_last_output(&self, text: String) {
        *self.last_output.lock() = text;
    }

    /// Tell everybody. Only the first reason counts.
    pub(crate) fn set(&self, reason: ShutdownReason) {
        self.reason.lock().get_or_insert(reason);
        self.changed.notify_all();
        let _ = self.exit.write(1);
    }

    fn wait(&self) -> ShutdownReason {
        let mut reason = self.reason.lock();
        loop {
            match &*reason {
                Some(reason) => return reason.clone(),
                None => self.changed.wait(&mut reason),
            }
        }
    }
}

/// A running VM. Dropping the handle ends the VM and waits until nothing of it is left.
#[derive(Debug)]
pub struct VmHandle {
    mailbox: Arc<Mailbox>,
    outcome: Arc<Outcome>,
    thread: Option<JoinHandle<()>>,
}

impl VmHandle {
    pub(crate) fn new(
        mailbox: Arc<Mailbox>,
        outcome: Arc<Outcome>,
        thread: JoinHandle<()>,
    ) -> Self {
        Self { mailbox, outcome, thread: Some(thread) }
    }

    /// Ask for something and wait for the answer.
    ///
    /// # Errors
    /// The machine refused, or [`CommandError::Gone`] when it has ended.
    pub fn send(&self, command: Command) -> Result<Reply, CommandError> {
        self.request(command).recv().unwrap_or(Err(CommandError::Gone))
    }

    /// Ask for something; the answer arrives on the returned channel. The channel closes without an
    /// answer when the VM ends first.
    pub fn request(&self, command: Command) -> mpsc::Receiver<Result<Reply, CommandError>> {
        let (sender, receiver) = mpsc::channel();
        self.mailbox.send(Message::Request(command, sender));
        receiver
    }

    /// What happens from now on. The channel closes when the VM has ended.
    pub fn events(&self) -> mpsc::Receiver<Event> {
        let (sender, receiver) = mpsc::channel();
        self.mailbox.send(Message::Subscribe(sender));
        receiver
    }

    /// A descriptor that becomes readable when the VM has ended, for the caller's own event loop.
    pub fn exit_fd(&self) -> RawFd {
        self.outcome.exit.as_raw_fd()
    }

    /// Why the VM has ended, if it has.
    pub fn ended(&self) -> Option<ShutdownReason> {
        self.outcome.reason.lock().clone()
    }

    /// The last lines of the guest's consoles, also after the VM's end.
    pub fn last_output(&self) -> String {
        match self.send(Command::QueryLastOutput) {
            Ok(Reply::LastOutput(text)) => text,
            _ => self.outcome.last_output.lock().clone(),
        }
    }

    /// Wait until the VM has ended and nothing of it is left.
    pub fn wait(mut self) -> ShutdownReason {
        let reason = self.outcome.wait();
        self.join();
        reason
    }

    fn join(&mut self) {
        if let Some(thread) = self.thread.take() {
            // The thread catches its panics itself and reports them in the outcome.
            let _ = thread.join();
        }
    }
}

impl Drop for VmHandle {
    fn drop(&mut self) {
        if self.thread.is_some() {
            drop(self.request(Command::Quit));
            self.join();
        }
    }
}
