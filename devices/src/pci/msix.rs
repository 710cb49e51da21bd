// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! MSI-X (PCI Local Bus Specification 3.0, section 6.8.2): table, pending bits and the vectors that a
//! device triggers.
//!
//! A data path holds [`MsixVector`]s and takes no lock but that of its vector. A vector for somebody
//! outside of this process has a route, whose eventfd keeps what arrives while the vector is masked.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use log::warn;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use super::cap::{self, Capability};
use crate::bus::Access;
use crate::irq::{MsiMessage, MsiRoute, MsiSink};

/// Most vectors of a function.
pub const MAX_VECTORS: u16 = 2048;
/// Bytes of a table entry: address, upper address, data, vector control.
const ENTRY_SIZE: u64 = 16;
/// Vector control: no messages.
const VECTOR_MASKED: u32 = 1;
/// The pending bits start here, unless the table is larger.
const MIN_PBA_OFFSET: u64 = 0x800;
/// Smallest BAR: guests map whole pages.
const MIN_BAR_SIZE: u64 = 0x1000;

/// The message control register.
pub mod control {
    /// Offset from the start of the capability.
    pub const OFFSET: u16 = 2;
    /// The function interrupts by messages.
    pub const ENABLE: u16 = 1 << 15;
    /// All vectors are masked.
    pub const FUNCTION_MASK: u16 = 1 << 14;
    /// What the guest can write.
    pub(super) const WRITABLE: u16 = ENABLE | FUNCTION_MASK;
}

/// The MSI-X structures of one function. They fill a BAR of their own: the table at its start, then the
/// pending bits. Clones are the same structures.
#[derive(Clone)]
pub struct Msix {
    shared: Arc<Shared>,
}

struct Shared {
    // Wiring.
    sink: Arc<dyn MsiSink>,
    requester: u16,
    // State.
    control: AtomicU16,
    vectors: Box<[Mutex<Vector>]>,
}

#[derive(Default)]
struct Vector {
    entry: Entry,
    pending: bool,
    /// For those outside of this process.
    route: Option<Box<dyn MsiRoute>>,
}

/// A table entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    address: u64,
    data: u32,
    control: u32,
}

impl Default for Entry {
    fn default() -> Self {
        Self { address: 0, data: 0, control: VECTOR_MASKED }
    }
}

/// What a guest has programmed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsixState {
    control: u16,
    vectors: Vec<VectorState>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct VectorState {
    entry: Entry,
    pending: bool,
}

impl fmt::Debug for Msix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Msix").field("vectors", &self.shared.vectors.len()).finish_non_exhaustive()
    }
}

impl Msix {
    /// `count` vectors, at most [`MAX_VECTORS`], into `sink`, with messages from `requester`.
    pub fn new(count: u16, sink: Arc<dyn MsiSink>, requester: u16) -> Self {
        let vectors = (0..count.clamp(1, MAX_VECTORS)).map(|_| Mutex::default()).collect();
        Self { shared: Arc::new(Shared { sink, requester, control: AtomicU16::new(0), vectors }) }
    }

    fn count(&self) -> u64 {
        self.shared.vectors.len() as u64
    }

    fn pba_offset(&self) -> u64 {
        (self.count() * ENTRY_SIZE).max(MIN_PBA_OFFSET)
    }

    /// Size of the BAR.
    pub fn bar_size(&self) -> u64 {
        let end = self.pba_offset() + self.count().div_ceil(64) * 8;
        end.next_power_of_two().max(MIN_BAR_SIZE)
    }

    /// The capability that says the structures fill BAR `bar`.
    pub fn capability(&self, bar: u8) -> Capability {
        let last = (self.shared.vectors.len() - 1) as u16;
        let (table, pba) = (u32::from(bar), self.pba_offset() as u32 | u32::from(bar));
        let body = [&last.to_le_bytes()[..], &table.to_le_bytes(), &pba.to_le_bytes()].concat();
        Capability::new(cap::id::MSIX, body)
            .writable(control::OFFSET.into(), &control::WRITABLE.to_le_bytes())
    }

    /// Follow the message control register.
    pub fn set_control(&self, control: u16) {
        let before = self.shared.control.swap(control & control::WRITABLE, Ordering::AcqRel);
        if before != control & control::WRITABLE {
            let vectors = self.shared.vectors.iter();
            let routed = vectors.filter(|vector| self.shared.update(&mut vector.lock())).count();
            self.shared.commit(routed > 0);
        }
    }

    /// Whether the function interrupts by messages.
    pub fn is_enabled(&self) -> bool {
        self.shared.mode() != Mode::Disabled
    }

    /// A handle to vector `index`, if there is one.
    pub fn vector(&self, index: u16) -> Option<MsixVector> {
        let index = usize::from(index);
        (index < self.shared.vectors.len())
            .then(|| MsixVector { shared: Arc::clone(&self.shared), index })
    }

    /// Read inside the BAR.
    pub fn bar_read(&self, offset: u64, data: &mut [u8]) -> Access {
        if !matches!(data.len(), 4 | 8) || !offset.is_multiple_of(data.len() as u64) {
            return Access::Unclaimed;
        }
        for (index, word) in data.chunks_exact_mut(4).enumerate() {
            word.copy_from_slice(&self.read_word(offset + index as u64 * 4).to_le_bytes());
        }
        Access::Done
    }

    /// Write inside the BAR. Pending bits are read-only.
    pub fn bar_write(&self, offset: u64, data: &[u8]) -> Access {
        if !matches!(data.len(), 4 | 8) || !offset.is_multiple_of(data.len() as u64) {
            return Access::Unclaimed;
        }
        let Some(vector) = self.table_vector(offset) else { return Access::Done };
        let mut vector = vector.lock();
        for (index, word) in data.chunks_exact(4).enumerate() {
            let word = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
            vector.entry.write(offset + index as u64 * 4, word);
        }
        let routed = self.shared.update(&mut vector);
        drop(vector);
        self.shared.commit(routed);
        Access::Done
    }

    fn table_vector(&self, offset: u64) -> Option<&Mutex<Vector>> {
        self.shared.vectors.get(usize::try_from(offset / ENTRY_SIZE).ok()?)
    }

    fn read_word(&self, offset: u64) -> u32 {
        if let Some(vector) = self.table_vector(offset) {
            return vector.lock().entry.read(offset);
        }
        let Some(word) = offset.checked_sub(self.pba_offset()) else { return 0 };
        let first = usize::try_from(word).unwrap_or(usize::MAX).saturating_mul(8);
        let vectors = self.shared.vectors.iter().skip(first).take(32);
        vectors
            .enumerate()
            .fold(0, |bits, (bit, vector)| bits | u32::from(self.shared.pending(vector)) << bit)
    }

    /// Back to the state after power-on. Routes stay, for whoever holds them, and are silent.
    pub fn reset(&self) {
        self.load(0, std::iter::repeat(VectorState { entry: Entry::default(), pending: false }));
    }

    /// What a guest has programmed, to be kept.
    pub fn state(&self) -> MsixState {
        let vectors = self.shared.vectors.iter().map(|vector| {
            let pending = self.shared.pending(vector);
            VectorState { entry: vector.lock().entry, pending }
        });
        MsixState {
            control: self.shared.control.load(Ordering::Acquire),
            vectors: vectors.collect(),
        }
    }

    /// Take back what was kept.
    pub fn restore(&self, state: &MsixState) {
        self.load(state.control, state.vectors.iter().copied());
    }

    fn load(&self, control: u16, vectors: impl Iterator<Item = VectorState>) {
        self.shared.control.store(control & control::WRITABLE, Ordering::Release);
        let mut routed = false;
        for (vector, state) in self.shared.vectors.iter().zip(vectors) {
            self.shared.pending(vector);
            let mut vector = vector.lock();
            vector.entry = state.entry;
            vector.pending = state.pending;
            routed |= self.shared.update(&mut vector);
        }
        self.shared.commit(routed);
    }
}

/// What becomes of a trigger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Disabled,
    Masked,
    Enabled,
}

impl Shared {
    fn mode(&self) -> Mode {
        let control = self.control.load(Ordering::Acquire);
        match (control & control::ENABLE, control & control::FUNCTION_MASK) {
            (0, _) => Mode::Disabled,
            (_, 0) => Mode::Enabled,
            _ => Mode::Masked,
        }
    }

    /// The message that a trigger of `vector` sends now.
    fn message(&self, vector: &Vector) -> Option<MsiMessage> {
        (self.mode() == Mode::Enabled && vector.entry.control & VECTOR_MASKED == 0).then_some(
            MsiMessage {
                address: vector.entry.address,
                data: vector.entry.data,
                requester: self.requester,
            },
        )
    }

    /// The pending bit, with what a route has kept while its vector was masked.
    fn pending(&self, vector: &Mutex<Vector>) -> bool {
        let mut vector = vector.lock();
        if let Some(route) = &vector.route
            && self.message(&vector).is_none()
            && route.eventfd().read().is_ok()
        {
            vector.pending = true;
        }
        vector.pending
    }

    /// Act on a change of the entry or of message control: send what is pending and can now be sent.
    /// Returns whether a route has changed, which needs [`Self::commit`].
    fn update(&self, vector: &mut Vector) -> bool {
        let message = self.message(vector);
        if let Some(message) = message
            && std::mem::take(&mut vector.pending)
        {
            self.signal(message);
        }
        let Some(route) = &vector.route else { return false };
        if let Err(error) = route.set(message) {
            warn!("change the route of an MSI-X vector to {message:x?}: {error}");
        }
        true
    }

    fn commit(&self, changed: bool) {
        if changed && let Err(error) = self.sink.commit() {
            warn!("make changed MSI-X routes take effect: {error}");
        }
    }

    fn signal(&self, message: MsiMessage) {
        if let Err(error) = self.sink.signal(message) {
            // The guest chose the message, so it can cause this at will.
            log::debug!("send MSI {message:x?}: {error}");
        }
    }
}

impl Entry {
    fn read(&self, offset: u64) -> u32 {
        match offset % ENTRY_SIZE {
            0 => self.address as u32,
            4 => (self.address >> 32) as u32,
            8 => self.data,
            _ => self.control,
        }
    }

    fn write(&mut self, offset: u64, value: u32) {
        let wide = u64::from(value);
        match offset % ENTRY_SIZE {
            // Messages are double words: the two low bits are hard-wired.
            0 => self.address = self.address >> 32 << 32 | wide & !0b11,
            4 => self.address = self.address & u64::from(u32::MAX) | wide << 32,
            8 => self.data = value,
            _ => self.control = value & VECTOR_MASKED,
        }
    }
}

/// One vector, for the thread that triggers it.
#[derive(Clone)]
pub struct MsixVector {
    shared: Arc<Shared>,
    index: usize,
}

impl fmt::Debug for MsixVector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("MsixVector").field(&self.index).finish()
    }
}

impl MsixVector {
    /// Send the vector's message, or note that it is pending while masked. Nothing happens while MSI-X
    /// is disabled.
    ///
    /// The message is sent under the vector's lock, so that none is sent once a guest's write of the
    /// mask has returned.
    pub fn trigger(&self) {
        let mut vector = self.shared.vectors[self.index].lock();
        match self.shared.message(&vector) {
            Some(message) => self.shared.signal(message),
            None => vector.pending |= self.shared.mode() != Mode::Disabled,
        }
    }

    /// An eventfd that triggers the vector, for those outside of this process.
    ///
    /// # Errors
    /// No route or no descriptor is left.
    pub fn eventfd(&self) -> io::Result<EventFd> {
        let mut vector = self.shared.vectors[self.index].lock();
        if let Some(route) = &vector.route {
            return route.eventfd().try_clone();
        }
        let route = Arc::clone(&self.shared.sink).route()?;
        let eventfd = route.eventfd().try_clone()?;
        route.set(self.shared.message(&vector))?;
        self.shared.sink.commit()?;
        vector.route = Some(route);
        Ok(eventfd)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::testing::{FakeMsi, REQUESTER};
    use proptest::prelude::*;

    const COUNT: u16 = 3;

    fn msix() -> (Arc<FakeMsi>, Msix) {
        let sink = Arc::new(FakeMsi::default());
        let msix = Msix::new(COUNT, Arc::clone(&sink) as Arc<dyn MsiSink>, REQUESTER);
        (sink, msix)
    }

    fn write(msix: &Msix, offset: u64, value: u32) {
        assert_eq!(msix.bar_write(offset, &value.to_le_bytes()), Access::Done);
    }

    fn read(msix: &Msix, offset: u64) -> u32 {
        let mut data = [0; 4];
        assert_eq!(msix.bar_read(offset, &mut data), Access::Done);
        u32::from_le_bytes(data)
    }

    /// Program each vector to send its number, as a driver does: while masked.
    fn program(msix: &Msix) {
        for vector in 0..u64::from(COUNT) {
            write(msix, vector * 16, 0xFEE0_0000);
            write(msix, vector * 16 + 4, 0);
            write(msix, vector * 16 + 8, vector as u32);
        }
    }

    fn set_masked(msix: &Msix, vector: u64, masked: bool) {
        write(msix, vector * 16 + 12, masked.into());
    }

    #[test]
    fn the_capability_describes_the_bar() {
        let (_, msix) = msix();
        let capability = msix.capability(1);
        assert_eq!(capability.body, [2, 0, 1, 0, 0, 0, 1, 8, 0, 0]);
        assert_eq!(msix.bar_size(), 0x1000);
        let large = Msix::new(MAX_VECTORS, Arc::new(FakeMsi::default()), REQUESTER);
        assert_eq!((large.pba_offset(), large.bar_size()), (0x8000, 0x1_0000));
    }

    #[test]
    fn a_masked_vector_is_pending_until_it_is_unmasked() {
        let (sink, msix) = msix();
        program(&msix);
        msix.set_control(control::ENABLE);
        let vector = msix.vector(1).unwrap();
        vector.trigger();
        vector.trigger();
        assert_eq!((sink.take(), read(&msix, MIN_PBA_OFFSET)), (vec![], 0b10));
        set_masked(&msix, 1, false);
        assert_eq!((sink.take(), read(&msix, MIN_PBA_OFFSET)), (vec![1], 0));
        vector.trigger();
        assert_eq!(sink.take(), [1]);
    }

    #[test]
    fn the_function_mask_holds_all_vectors_back() {
        let (sink, msix) = msix();
        program(&msix);
        (0..COUNT.into()).for_each(|vector| set_masked(&msix, vector, false));
        msix.set_control(control::ENABLE | control::FUNCTION_MASK);
        (0..COUNT).for_each(|index| msix.vector(index).unwrap().trigger());
        assert_eq!((sink.take(), read(&msix, MIN_PBA_OFFSET)), (vec![], 0b111));
        msix.set_control(control::ENABLE);
        assert_eq!((sink.take(), read(&msix, MIN_PBA_OFFSET)), (vec![0, 1, 2], 0));
    }

    #[test]
    fn a_disabled_function_sends_and_keeps_nothing() {
        let (sink, msix) = msix();
        program(&msix);
        set_masked(&msix, 0, false);
        msix.vector(0).unwrap().trigger();
        msix.set_control(control::ENABLE);
        assert!(sink.take().is_empty());
        assert!(msix.vector(COUNT).is_none());
    }

    #[test]
    fn routes_follow_the_table_in_one_commit() {
        let (sink, msix) = msix();
        program(&msix);
        (0..COUNT.into()).for_each(|vector| set_masked(&msix, vector, false));
        msix.set_control(control::ENABLE | control::FUNCTION_MASK);
        let _eventfds: Vec<_> =
            (0..COUNT).map(|index| msix.vector(index).unwrap().eventfd().unwrap()).collect();
        assert_eq!(*sink.routes.lock(), [None, None, None]);
        let before = *sink.commits.lock();
        msix.set_control(control::ENABLE);
        assert_eq!(*sink.commits.lock(), before + 1);
        let data: Vec<_> = sink.routes.lock().iter().map(|it| it.map(|it| it.data)).collect();
        assert_eq!(data, [Some(0), Some(1), Some(2)]);
        // A message that changes while in use takes effect.
        write(&msix, 8, 77);
        assert_eq!(sink.routes.lock()[0].map(|message| message.data), Some(77));
    }

    #[test]
    fn what_arrives_at_a_masked_route_is_pending() {
        let (sink, msix) = msix();
        program(&msix);
        msix.set_control(control::ENABLE);
        let eventfd = msix.vector(2).unwrap().eventfd().unwrap();
        eventfd.write(1).unwrap();
        assert_eq!(read(&msix, MIN_PBA_OFFSET), 0b100);
        set_masked(&msix, 2, false);
        assert_eq!(sink.take(), [2]);
        assert_eq!(read(&msix, MIN_PBA_OFFSET), 0);
    }

    #[test]
    fn an_unmasked_route_keeps_its_triggers() {
        let (_, msix) = msix();
        msix.set_control(control::ENABLE);
        set_masked(&msix, 0, false);
        let eventfd = msix.vector(0).unwrap().eventfd().unwrap();
        eventfd.write(1).unwrap();
        assert_eq!(read(&msix, MIN_PBA_OFFSET), 0);
        assert_eq!(eventfd.read().unwrap(), 1, "the interrupt controller must see it");
    }

    #[test]
    fn state_survives_a_round_trip() {
        let (sink, msix) = msix();
        program(&msix);
        msix.set_control(control::ENABLE);
        msix.vector(1).unwrap().trigger();
        let state = msix.state();
        msix.reset();
        assert_eq!((msix.is_enabled(), read(&msix, 16)), (false, 0));
        msix.restore(&state);
        assert_eq!(msix.state(), state);
        set_masked(&msix, 1, false);
        assert_eq!(sink.take(), [1]);
    }

    proptest! {
        #[test]
        fn no_access_panics(
            accesses in prop::collection::vec((0u64..0x1100, 0usize..9, any::<[u8; 8]>(), any::<u16>()), 0..60)
        ) {
            let (_, msix) = msix();
            let _eventfd = msix.vector(0).unwrap().eventfd().unwrap();
            for (offset, len, mut data, control) in accesses {
                msix.set_control(control);
                let _ = msix.bar_write(offset, &data[..len]);
                (0..COUNT).for_each(|index| msix.vector(index).unwrap().trigger());
                let _ = msix.bar_read(offset, &mut data[..len]);
            }
        }
    }
}
