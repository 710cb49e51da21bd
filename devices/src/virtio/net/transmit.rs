// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Frames from the driver, section 5.1.6.2.

use std::io;
use std::os::fd::RawFd;

use super::pieces::Scratch;
use super::receive::FRAME_MAX;
use crate::backend::tap::HEADER_SIZE;
use crate::memory::GuestMemory;
use crate::virtio::queue::{Chain, DeviceQueue, RingError, Taken};

/// Smallest frame: two addresses and a type.
const ETHERNET_HEADER: usize = 14;

/// The half of a pair of queues that takes frames from the driver.
#[derive(Debug)]
pub(super) struct Transmitter {
    pub(super) queue: DeviceQueue,
    // state
    chain: Chain,
    scratch: Scratch,
    /// The host takes no more frames for now.
    blocked: bool,
    /// Frames that nobody could take.
    dropped: u64,
}

impl Transmitter {
    pub(super) fn new(queue: DeviceQueue) -> Self {
        Self {
            queue,
            chain: Chain::default(),
            scratch: Scratch::default(),
            blocked: false,
            dropped: 0,
        }
    }

    /// Whether the host has to be waited for.
    pub(super) fn is_blocked(&self) -> bool {
        self.blocked
    }

    /// Hand frames to `fd`, until there are no more, or it takes no more, or others have their turn.
    ///
    /// # Errors
    /// Any [`RingError`].
    pub(super) fn transmit(&mut self, memory: &GuestMemory, fd: RawFd) -> Result<(), RingError> {
        let Self { queue, chain, scratch, blocked, dropped } = self;
        *blocked = false;
        queue.serve_while(memory, chain, |chain| {
            match send(memory, scratch, chain, fd)? {
                Sent::Yes => {}
                Sent::Later => {
                    *blocked = true;
                    return Ok(Taken::Refused);
                }
                Sent::Never(why) => {
                    *dropped += 1;
                    // A guest can do this as often as it likes.
                    log::debug!("a frame from the guest is dropped ({dropped} until now): {why}");
                }
            }
            Ok(Taken::Used(0))
        })?;
        queue.notify(memory)
    }
}

enum Sent {
    Yes,
    Later,
    Never(io::Error),
}

fn send(
    memory: &GuestMemory,
    scratch: &mut Scratch,
    chain: &Chain,
    fd: RawFd,
) -> Result<Sent, RingError> {
    let invalid = |why| Ok(Sent::Never(io::Error::new(io::ErrorKind::InvalidInput, why)));
    let frame = chain.readable();
    if !(HEADER_SIZE + ETHERNET_HEADER..=FRAME_MAX).contains(&(frame.len() as usize)) {
        return invalid(format!("{} bytes", frame.len()));
    }
    let mut pieces = scratch.begin(memory);
    for segment in frame.segments() {
        pieces.push(segment)?;
    }
    if pieces.are_too_many() {
        return invalid("too many pieces".into());
    }
    Ok(match pieces.write_to(fd) {
        Ok(_) => Sent::Yes,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Sent::Later,
        Err(error) => Sent::Never(error),
    })
}
