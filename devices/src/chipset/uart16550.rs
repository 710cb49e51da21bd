// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! 16550A serial port (National Semiconductor PC16550D). The registers are `vm-superio`'s; here they meet
//! our bus, our interrupt line and a character backend.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io::{self, Write};

use vm_superio::{Serial, Trigger};

use crate::bus::{Access, IoDevice};
use crate::irq::IrqLine;

/// Bytes for the guest that wait while its FIFO is full.
const BACKLOG: usize = 4096;

struct Edge(IrqLine);

impl Trigger for Edge {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.pulse();
        Ok(())
    }
}

/// A character backend that takes everything at once, or drops it.
type Output = Box<dyn Write + Send>;

/// A serial port: [`Uart16550::PORTS`] ports.
pub struct Uart16550 {
    serial: Serial<Edge, vm_superio::serial::NoEvents, Output>,
    on_room: Box<dyn Fn() + Send>,
    backlog: VecDeque<u8>,
    /// Characters were refused for want of room.
    starved: bool,
}

impl std::fmt::Debug for Uart16550 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Uart16550").field("backlog", &self.backlog.len()).finish_non_exhaustive()
    }
}

impl Uart16550 {
    /// Ports that it takes.
    pub const PORTS: u64 = 8;

    /// A port whose output goes to `output`, which must never block. `on_room` is called when there is room
    /// again for characters that [`Self::receive`] refused.
    pub fn new(irq: IrqLine, output: Output, on_room: Box<dyn Fn() + Send>) -> Self {
        let serial = Serial::new(Edge(irq), output);
        Self { serial, on_room, backlog: VecDeque::new(), starved: false }
    }

    /// Characters for the guest. Returns how many were taken; the rest is to be offered later.
    pub fn receive(&mut self, bytes: &[u8]) -> usize {
        let taken = bytes.len().min(BACKLOG - self.backlog.len());
        self.backlog.extend(&bytes[..taken]);
        self.starved = taken < bytes.len();
        self.fill();
        taken
    }

    /// Move what waits into the FIFO.
    fn fill(&mut self) {
        let free = self.serial.fifo_capacity().min(self.backlog.len());
        if free == 0 {
            return;
        }
        let bytes: Vec<u8> = self.backlog.iter().take(free).copied().collect();
        // In loopback mode the FIFO takes nothing.
        if let Ok(taken) = self.serial.enqueue_raw_bytes(&bytes) {
            self.backlog.drain(..taken);
        }
        if self.starved && self.backlog.len() <= BACKLOG / 2 {
            self.starved = false;
            (self.on_room)();
        }
    }
}

impl IoDevice for Uart16550 {
    fn read(&mut self, offset: u64, data: &mut [u8]) -> Access {
        let ([byte], Ok(offset)) = (data, u8::try_from(offset)) else { return Access::Unclaimed };
        *byte = self.serial.read(offset);
        self.fill();
        Access::Done
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Access {
        let ([byte], Ok(offset)) = (data, u8::try_from(offset)) else { return Access::Unclaimed };
        if let Err(vm_superio::serial::Error::IOError(error)) = self.serial.write(offset, *byte)
            && error.kind() != io::ErrorKind::WouldBlock
        {
            log::debug!("serial output: {error}");
        }
        Access::Done
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use parking_lot::Mutex;
    use std::sync::Arc;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().extend(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    const DATA: u64 = 0;
    const LINE_STATUS: u64 = 5;
    const DATA_READY: u8 = 1;

    fn read(uart: &mut Uart16550, offset: u64) -> u8 {
        let mut data = [0];
        assert_eq!(uart.read(offset, &mut data), Access::Done);
        data[0]
    }

    #[test]
    fn written_characters_reach_the_backend() {
        let sink = Sink::default();
        let mut uart = Uart16550::new(IrqLine::detached(), Box::new(sink.clone()), Box::new(|| ()));
        for byte in b"ok" {
            assert_eq!(uart.write(DATA, &[*byte]), Access::Done);
        }
        assert_eq!(*sink.0.lock(), b"ok");
    }

    #[test]
    fn characters_for_the_guest_wait_in_order_and_are_bounded() {
        let room = Arc::new(Mutex::new(0));
        let on_room = Box::new({
            let room = Arc::clone(&room);
            move || *room.lock() += 1
        });
        let mut uart = Uart16550::new(IrqLine::detached(), Box::new(Sink::default()), on_room);
        let sent: Vec<u8> = (0..6000).map(|n| (n % 251) as u8).collect();
        let mut taken = uart.receive(&sent);
        assert!((BACKLOG..sent.len()).contains(&taken));
        let mut received = Vec::new();
        while received.len() < sent.len() {
            assert_eq!(read(&mut uart, LINE_STATUS) & DATA_READY, DATA_READY);
            received.push(read(&mut uart, DATA));
            // Room is announced once for each refusal.
            if std::mem::take(&mut *room.lock()) > 0 {
                taken += uart.receive(&sent[taken..]);
            }
        }
        assert_eq!(received, sent);
        assert_eq!(read(&mut uart, LINE_STATUS) & DATA_READY, 0);
    }
}
