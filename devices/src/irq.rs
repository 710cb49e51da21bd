// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! How a device interrupts the guest: a line ([`IrqLine`]) or a message ([`MsiSink`]).
//!
//! The hypervisor implements the sinks. Devices hold handles and know no interrupt numbers.

use std::fmt;
use std::io;
use std::sync::Arc;

use parking_lot::Mutex;
use vmm_sys_util::eventfd::EventFd;

/// One input of the interrupt controller.
pub trait IrqSink: Send + Sync {
    /// Drive the input high or low.
    fn set_level(&self, high: bool);
}

/// A device's end of an interrupt line.
#[derive(Clone)]
pub struct IrqLine(Arc<dyn IrqSink>);

impl fmt::Debug for IrqLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("IrqLine")
    }
}

impl IrqLine {
    /// A line into `sink`.
    pub fn new(sink: Arc<dyn IrqSink>) -> Self {
        Self(sink)
    }

    /// A line that leads nowhere.
    pub fn detached() -> Self {
        struct Nowhere;
        impl IrqSink for Nowhere {
            fn set_level(&self, _high: bool) {}
        }
        Self(Arc::new(Nowhere))
    }

    /// Drive the line high or low.
    pub fn set(&self, high: bool) {
        self.0.set_level(high);
    }

    /// One edge: high, then low.
    pub fn pulse(&self) {
        self.set(true);
        self.set(false);
    }
}

/// A level-triggered line with several drivers: it is high while any of them is.
#[derive(Debug, Clone)]
pub struct SharedLine {
    inner: Arc<SharedLineInner>,
}

#[derive(Debug)]
struct SharedLineInner {
    line: IrqLine,
    /// How many drivers are high. Held while the line changes, so that two drivers cannot swap their edges.
    high: Mutex<u32>,
}

impl SharedLine {
    /// Share `line`.
    pub fn new(line: IrqLine) -> Self {
        Self { inner: Arc::new(SharedLineInner { line, high: Mutex::new(0) }) }
    }

    /// A new driver of the shared line, low at first.
    pub fn driver(&self) -> IrqLine {
        struct Driver {
            shared: Arc<SharedLineInner>,
            high: Mutex<bool>,
        }
        impl IrqSink for Driver {
            fn set_level(&self, high: bool) {
                let mut was = self.high.lock();
                if *was == high {
                    return;
                }
                *was = high;
                let mut count = self.shared.high.lock();
                if high {
                    *count += 1;
                } else {
                    *count -= 1;
                }
                if *count == u32::from(high) {
                    self.shared.line.set(high);
                }
            }
        }
        impl Drop for Driver {
            fn drop(&mut self) {
                self.set_level(false);
            }
        }
        IrqLine::new(Arc::new(Driver { shared: Arc::clone(&self.inner), high: Mutex::new(false) }))
    }
}

/// A message-signalled interrupt as the guest programmed it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MsiMessage {
    /// Address that the message is written to.
    pub address: u64,
    /// Data that is written.
    pub data: u32,
    /// Who writes it: the PCI requester id (bus, device, function) as the interrupt controller sees it.
    /// x86 ignores it, the ITS of aarch64 needs it.
    pub requester: u16,
}

/// Where message-signalled interrupts go.
pub trait MsiSink: Send + Sync {
    /// Deliver `message` now. One system call and no routing table: what devices in this process use.
    ///
    /// # Errors
    /// The interrupt controller refused the message.
    fn signal(&self, message: MsiMessage) -> io::Result<()>;

    /// A route whose trigger is an eventfd, for those outside this process (vhost, VFIO).
    ///
    /// # Errors
    /// No route or no eventfd left.
    fn route(self: Arc<Self>) -> io::Result<Box<dyn MsiRoute>>;

    /// Make all changes to routes since the last commit take effect, in one step.
    ///
    /// # Errors
    /// The interrupt controller refused the table.
    fn commit(&self) -> io::Result<()>;
}

/// One eventfd that sends one message. Dropping it frees the route.
pub trait MsiRoute: Send + Sync {
    /// The trigger. It does not block.
    fn eventfd(&self) -> &EventFd;

    /// Send `message` from now on; `None` masks: triggers are kept in the eventfd's counter. Takes
    /// effect at the next [`MsiSink::commit`].
    ///
    /// # Errors
    /// The interrupt controller refused the change.
    fn set(&self, message: Option<MsiMessage>) -> io::Result<()>;
}

/// Guest writes that trigger an eventfd inside the hypervisor, without a return to this process.
pub trait DoorbellSink: Send + Sync {
    /// A write of any size and value at guest-physical `address` signals `eventfd`.
    ///
    /// # Errors
    /// The hypervisor refused it; writes then arrive on the bus as usual.
    fn attach(&self, address: u64, eventfd: &EventFd) -> io::Result<()>;

    /// Undo [`Self::attach`].
    ///
    /// # Errors
    /// There was no such doorbell.
    fn detach(&self, address: u64, eventfd: &EventFd) -> io::Result<()>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<bool>>);

    impl IrqSink for Recorder {
        fn set_level(&self, high: bool) {
            self.0.lock().push(high);
        }
    }

    #[test]
    fn a_shared_line_is_high_while_any_driver_is() {
        let sink = Arc::new(Recorder::default());
        let shared = SharedLine::new(IrqLine::new(Arc::clone(&sink) as Arc<dyn IrqSink>));
        let (a, b) = (shared.driver(), shared.driver());
        a.set(true);
        b.set(true);
        b.set(true);
        a.set(false);
        assert_eq!(*sink.0.lock(), [true]);
        drop(b);
        assert_eq!(*sink.0.lock(), [true, false]);
    }
}
