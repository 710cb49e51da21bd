// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! One port of a console: what it is, whom it speaks to, and where its conversation with the driver
//! stands. Knows no queues.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use super::control::{
    CONSOLE_PORT, Control, DEVICE_READY, Outbox, PORT_ADD, PORT_NAME, PORT_OPEN, PORT_READY,
};
use crate::backend::chardev::{CharPort, CharSink};

/// Most bytes of input kept until the driver gives buffers; then the host must wait.
pub const INPUT_CAPACITY: usize = 4 << 10;

/// What a port is and whom it speaks to.
#[derive(Debug)]
pub struct PortConfig {
    /// Whether the guest is to make a console (`hvcN`) of it rather than a plain port (`vportNpM`).
    pub console: bool,
    /// Its name in the guest, `/dev/virtio-ports/NAME`.
    pub name: Option<String>,
    /// The host's side.
    pub chardev: CharPort,
}

/// Where the conversation with the driver stands.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortState {
    /// The driver has set the port up.
    ready: bool,
    /// Somebody in the guest has it open.
    guest_open: bool,
    /// Somebody on the host has it open.
    host_open: bool,
    outbox: Outbox,
}

#[derive(Debug)]
pub(super) struct Port {
    // Configuration.
    id: u32,
    is_console: bool,
    name: Option<String>,
    // Wiring.
    chardev: CharPort,
    /// Tells the worker that there is input or something to announce.
    wake: Arc<EventFd>,
    // State.
    input: Mutex<VecDeque<u8>>,
    state: Mutex<PortState>,
}

impl Port {
    pub(super) fn new(id: u32, config: PortConfig, wake: Arc<EventFd>) -> Arc<Self> {
        let port = Arc::new(Self {
            id,
            is_console: config.console,
            name: config.name,
            chardev: config.chardev,
            wake,
            input: Mutex::default(),
            state: Mutex::default(),
        });
        port.chardev.connect(Box::new(Sink(Arc::clone(&port))));
        port
    }

    /// Cease to take input from the host.
    pub(super) fn close(&self) {
        self.chardev.disconnect();
    }

    pub(super) fn save(&self) -> PortState {
        *self.state.lock()
    }

    /// Whether somebody on the host listens is not restored: it is another host.
    pub(super) fn restore(&self, saved: &PortState) {
        let mut state = self.state.lock();
        let host_open = state.host_open;
        *state = *saved;
        state.host_open = host_open;
        state.outbox.open |= saved.ready && saved.host_open != host_open;
    }

    /// A control message from the driver about this port, or about the device.
    pub(super) fn told(&self, message: Control) {
        let mut state = self.state.lock();
        let yes = message.value == 1;
        match message.event {
            DEVICE_READY => {
                let host_open = state.host_open;
                *state = PortState { host_open, ..PortState::default() };
                state.outbox.add = yes;
            }
            PORT_READY => {
                state.ready = yes;
                state.outbox.console = yes && self.is_console;
                state.outbox.name = yes && self.name.is_some();
                state.outbox.open = yes && (self.is_console || state.host_open);
            }
            PORT_OPEN => state.guest_open = yes,
            _ => {}
        }
    }

    /// The next control message to the driver, and the bytes that follow it.
    pub(super) fn to_tell(&self) -> Option<(Control, &[u8])> {
        let mut state = self.state.lock();
        let event = state.outbox.take()?;
        let (value, text) = match event {
            PORT_ADD | CONSOLE_PORT => (1, None),
            PORT_NAME => (1, self.name.as_deref()),
            // A console is always there; there may just be nobody who looks at it.
            _ => (u16::from(self.is_console || state.host_open), None),
        };
        Some((Control { id: self.id, event, value }, text.unwrap_or_default().as_bytes()))
    }

    pub(super) fn has_to_tell(&self) -> bool {
        !self.state.lock().outbox.is_empty()
    }

    pub(super) fn is_open_in_guest(&self) -> bool {
        self.state.lock().guest_open
    }

    /// Output of the guest; never waits.
    pub(super) fn output(&self, data: &[u8]) {
        self.chardev.put(data);
    }

    pub(super) fn has_input(&self) -> bool {
        !self.input.lock().is_empty()
    }

    /// Take up to `buffer.len()` bytes of input.
    pub(super) fn take_input(&self, buffer: &mut [u8]) -> usize {
        let mut input = self.input.lock();
        let n = buffer.len().min(input.len());
        for (to, from) in buffer.iter_mut().zip(input.drain(..n)) {
            *to = from;
        }
        drop(input);
        self.chardev.resume();
        n
    }
}

/// Where the host's input arrives, on the backend's thread.
struct Sink(Arc<Port>);

impl CharSink for Sink {
    fn receive(&mut self, data: &[u8]) -> usize {
        let mut input = self.0.input.lock();
        let n = data.len().min(INPUT_CAPACITY - input.len().min(INPUT_CAPACITY));
        input.extend(&data[..n]);
        drop(input);
        let _ = self.0.wake.write(1);
        n
    }

    fn opened(&mut self, open: bool) {
        let mut state = self.0.state.lock();
        state.host_open = open;
        state.outbox.open |= state.ready && !self.0.is_console;
        drop(state);
        let _ = self.0.wake.write(1);
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::super::control::CONTROL_SIZE;
    use super::*;
    use crate::backend::chardev::{Chardev, ChardevSpec};
    use crate::io_thread::IoThread;

    fn port(console: bool, name: Option<&str>) -> Arc<Port> {
        let thread = IoThread::spawn("test", Box::new(|why| panic!("{why}"))).unwrap();
        let chardev = Chardev::open(ChardevSpec::Null, &thread.handle()).unwrap();
        let config = PortConfig { console, name: name.map(Into::into), chardev: chardev.port() };
        Port::new(2, config, Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()))
    }

    fn tell(port: &Port, event: u16, value: u16) {
        port.told(Control { id: 2, event, value });
    }

    fn heard(port: &Port) -> Vec<(u16, u16, Vec<u8>)> {
        std::iter::from_fn(|| port.to_tell())
            .map(|(message, text)| {
                assert_eq!(message.id, 2);
                (message.event, message.value, text.to_vec())
            })
            .collect()
    }

    #[test]
    fn a_console_introduces_itself() {
        let port = port(true, None);
        assert_eq!(heard(&port), []);
        tell(&port, DEVICE_READY, 1);
        assert_eq!(heard(&port), [(PORT_ADD, 1, vec![])]);
        tell(&port, PORT_READY, 1);
        assert_eq!(heard(&port), [(CONSOLE_PORT, 1, vec![]), (PORT_OPEN, 1, vec![])]);
        tell(&port, PORT_OPEN, 1);
        assert!(port.is_open_in_guest());
        // A driver that starts anew begins at the beginning.
        tell(&port, DEVICE_READY, 1);
        assert!(!port.is_open_in_guest());
        assert_eq!(heard(&port), [(PORT_ADD, 1, vec![])]);
    }

    #[test]
    fn a_named_port_says_who_is_there() {
        let port = port(false, Some("org.example.0"));
        tell(&port, DEVICE_READY, 1);
        tell(&port, PORT_READY, 1);
        let name = (PORT_NAME, 1, b"org.example.0".to_vec());
        assert_eq!(heard(&port), [(PORT_ADD, 1, vec![]), name]);
        let mut sink = Sink(Arc::clone(&port));
        sink.opened(true);
        assert_eq!(heard(&port), [(PORT_OPEN, 1, vec![])]);
        sink.opened(false);
        assert_eq!(heard(&port), [(PORT_OPEN, 0, vec![])]);
    }

    #[test]
    fn saved_state_says_what_has_changed_meanwhile() {
        let old = port(false, None);
        Sink(Arc::clone(&old)).opened(true);
        tell(&old, DEVICE_READY, 1);
        tell(&old, PORT_READY, 1);
        tell(&old, PORT_OPEN, 1);
        heard(&old);
        let new = port(false, None);
        new.restore(&old.save());
        assert!(new.is_open_in_guest());
        assert_eq!(heard(&new), [(PORT_OPEN, 0, vec![])]);
    }

    #[test]
    fn input_is_bounded() {
        let port = port(true, None);
        let mut sink = Sink(Arc::clone(&port));
        assert_eq!(sink.receive(&[1; INPUT_CAPACITY - 1]), INPUT_CAPACITY - 1);
        assert_eq!(sink.receive(&[2; 9]), 1);
        assert_eq!(sink.receive(&[3; 9]), 0);
        let mut buffer = [0; INPUT_CAPACITY + 1];
        assert_eq!(port.take_input(&mut buffer), INPUT_CAPACITY);
        assert_eq!(buffer[INPUT_CAPACITY - 2..], [1, 2, 0]);
        assert!(!port.has_input());
    }

    #[test]
    fn control_messages_are_little_endian() {
        let bytes: [u8; CONTROL_SIZE] = [4, 3, 2, 1, 6, 0, 1, 0];
        let message = Control { id: 0x0102_0304, event: PORT_OPEN, value: 1 };
        assert_eq!(Control::from_bytes(bytes), message);
        assert_eq!(message.to_bytes(), bytes);
    }
}
