// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The small devices of a PC that firmware and kernels expect at fixed I/O ports.

mod bridges;
mod cmos;
mod i8042;
mod pm;
mod pvpanic;
mod pvpanic_pci;
mod reset;
mod uart16550;

pub use bridges::Bridge;
pub use cmos::Cmos;
pub use i8042::I8042;
pub use pm::PowerManagement;
pub use pvpanic::Pvpanic;
pub use pvpanic_pci::PvpanicPci;
pub use reset::ResetControl;
pub use uart16550::Uart16550;

/// What a guest asks of its machine through a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum GuestRequest {
    /// Power off.
    PowerOff = 1,
    /// Reset.
    Reset = 1 << 1,
    /// The kernel has panicked.
    Panicked = 1 << 2,
    /// The kernel has panicked and goes on to write a crash dump.
    CrashLoaded = 1 << 3,
    /// Take down the devices that it has ejected.
    TakeEjected = 1 << 4,
}

/// Who is told. Called by a vCPU with the device's lock held: it must only take a note.
pub trait GuestRequestSink: Send + Sync {
    /// Take a note of `request`.
    fn request(&self, request: GuestRequest);
}

#[cfg(test)]
pub(crate) mod testing {
    use super::{GuestRequest, GuestRequestSink};
    use parking_lot::Mutex;
    use std::sync::Arc;

    /// Remembers what was asked.
    #[derive(Default)]
    pub(crate) struct Requests(pub(crate) Mutex<Vec<GuestRequest>>);

    impl GuestRequestSink for Requests {
        fn request(&self, request: GuestRequest) {
            self.0.lock().push(request);
        }
    }

    impl Requests {
        pub(crate) fn new() -> Arc<Self> {
            Arc::default()
        }

        pub(crate) fn take(&self) -> Vec<GuestRequest> {
            std::mem::take(&mut self.0.lock())
        }
    }
}
