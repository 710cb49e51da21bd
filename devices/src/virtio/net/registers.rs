// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What a driver sees of a network device, and what its features mean to a tap. Sections 5.1.2 to 5.1.4.

use libc::{TUN_F_CSUM, TUN_F_TSO_ECN, TUN_F_TSO4, TUN_F_TSO6, TUN_F_UFO, TUN_F_USO4, TUN_F_USO6};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_GUEST_USO4,
    VIRTIO_NET_F_GUEST_USO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ,
    VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};

/// What the driver finds.
#[derive(Debug, Clone)]
pub(crate) struct Registers {
    mac: [u8; 6],
    mtu: Option<u16>,
    pairs: u16,
    queue_sizes: Vec<u16>,
    features: u64,
}

/// Size of the queue of commands; a driver sends one at a time.
const CONTROL_QUEUE_SIZE: u16 = 64;

/// Most pairs of queues that there can be, with the control queue, at a transport of ours.
const PAIRS_MAX: usize = 256;

impl Registers {
    /// A device with `pairs` pairs of queues of `queue_size` entries, before a tap that can do `offloads`
    /// (`TUN_F_*`). `None` where there are no queues, or too many, or none of this size.
    pub(crate) fn new(
        mac: [u8; 6],
        mtu: Option<u16>,
        pairs: usize,
        queue_size: u16,
        offloads: u32,
    ) -> Option<Self> {
        let size_fits = queue_size.is_power_of_two() && queue_size >= 2;
        if !(1..=PAIRS_MAX).contains(&pairs) || !size_fits {
            return None;
        }
        let mut queue_sizes = vec![queue_size; 2 * pairs];
        queue_sizes.push(CONTROL_QUEUE_SIZE);
        let mut features = offered(offloads);
        if mtu.is_some() {
            features |= 1 << VIRTIO_NET_F_MTU;
        }
        if pairs > 1 {
            features |= 1 << VIRTIO_NET_F_MQ;
        }
        // At most PAIRS_MAX.
        Some(Self { mac, mtu, pairs: pairs as u16, queue_sizes, features })
    }

    /// Sizes of all queues, in their order.
    pub(crate) fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    /// Features of the device itself.
    pub(crate) fn features(&self) -> u64 {
        self.features
    }

    /// The number of the control queue, section 5.1.2: behind all pairs, of which a driver that does not know
    /// of several has one.
    pub(crate) fn control_queue(&self, features: u64) -> u16 {
        if has(features, VIRTIO_NET_F_MQ) { 2 * self.pairs } else { 2 }
    }

    /// Read `struct virtio_net_config`, section 5.1.4.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) {
        let mut space = [0; 12];
        let (mac, rest) = space.split_at_mut(6);
        mac.copy_from_slice(&self.mac);
        let fields = [VIRTIO_NET_S_LINK_UP as u16, self.pairs, self.mtu.unwrap_or(0)];
        for (to, field) in rest.chunks_exact_mut(2).zip(fields) {
            to.copy_from_slice(&field.to_le_bytes());
        }
        data.fill(0);
        let rest = usize::try_from(offset).ok().and_then(|offset| space.get(offset..));
        for (to, from) in data.iter_mut().zip(rest.unwrap_or_default()) {
            *to = *from;
        }
    }
}

/// Whether `feature` is among `features`.
pub(crate) fn has(features: u64, feature: u32) -> bool {
    features >> feature & 1 != 0
}

/// What the driver may leave to a tap, and a tap to the driver.
const PAIRED: [(u32, &[u32]); 5] = [
    (TUN_F_CSUM, &[VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM]),
    (TUN_F_TSO4, &[VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_GUEST_TSO4]),
    (TUN_F_TSO6, &[VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_GUEST_TSO6]),
    (TUN_F_TSO_ECN, &[VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_GUEST_ECN]),
    (TUN_F_UFO, &[VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_F_GUEST_UFO]),
];

const USO: u32 = TUN_F_USO4 | TUN_F_USO6;

fn offered(offloads: u32) -> u64 {
    let mut features = 1 << VIRTIO_NET_F_MAC
        | 1 << VIRTIO_NET_F_STATUS
        | 1 << VIRTIO_NET_F_MRG_RXBUF
        | 1 << VIRTIO_NET_F_CTRL_VQ
        | 1 << VIRTIO_NET_F_CTRL_GUEST_OFFLOADS;
    for (_, both) in PAIRED.into_iter().filter(|(offload, _)| offloads & offload != 0) {
        both.iter().for_each(|feature| features |= 1 << feature);
    }
    if offloads & USO == USO {
        for feature in [VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6] {
            features |= 1 << feature;
        }
    }
    features
}

/// Features that say what frames a driver accepts, which are also the bits of its later commands.
pub(crate) const GUEST_OFFLOADS: u64 = 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_ECN
    | 1 << VIRTIO_NET_F_GUEST_UFO
    | 1 << VIRTIO_NET_F_GUEST_USO4
    | 1 << VIRTIO_NET_F_GUEST_USO6;

/// What a tap may hand to a driver with these features: `TUN_F_*`. A tap refuses segments without
/// checksums, and UDP segments of one IP version only.
pub(crate) fn accepted(features: u64) -> u32 {
    if !has(features, VIRTIO_NET_F_GUEST_CSUM) {
        return 0;
    }
    let tcp = has(features, VIRTIO_NET_F_GUEST_TSO4) || has(features, VIRTIO_NET_F_GUEST_TSO6);
    let mut offloads = 0;
    for (offload, both) in PAIRED {
        let wanted = both.last().is_some_and(|guest| has(features, *guest));
        if wanted && (offload != TUN_F_TSO_ECN || tcp) {
            offloads |= offload;
        }
    }
    if has(features, VIRTIO_NET_F_GUEST_USO4) && has(features, VIRTIO_NET_F_GUEST_USO6) {
        offloads |= USO;
    }
    offloads
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: u32 = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN | TUN_F_UFO | USO;

    fn registers(pairs: usize, offloads: u32) -> Registers {
        Registers::new([2, 0, 0, 0, 0, 9], Some(1400), pairs, 256, offloads).unwrap()
    }

    #[test]
    fn queues_stand_in_the_order_of_the_specification() {
        let registers = registers(3, ALL);
        assert_eq!(registers.queue_sizes(), [256, 256, 256, 256, 256, 256, 64]);
        assert_eq!(registers.control_queue(registers.features()), 6);
        assert_eq!(registers.control_queue(0), 2);
        for (pairs, size) in [(0, 256), (257, 256), (1, 0), (1, 100)] {
            assert!(Registers::new([2; 6], None, pairs, size, 0).is_none());
        }
    }

    #[test]
    fn configuration_is_read_in_any_pieces() {
        let registers = registers(2, ALL);
        let mut all = [0xff; 16];
        registers.read(0, &mut all);
        assert_eq!(all[..12], [2, 0, 0, 0, 0, 9, 1, 0, 2, 0, 0x78, 5]);
        assert_eq!(all[12..], [0; 4]);
        let mut part = [0; 2];
        registers.read(10, &mut part);
        assert_eq!(part, [0x78, 5]);
        for offset in [12, 4096, u64::MAX] {
            let mut beyond = [0xff; 4];
            registers.read(offset, &mut beyond);
            assert_eq!(beyond, [0; 4]);
        }
    }

    #[test]
    fn what_the_tap_cannot_do_is_not_offered() {
        let features = registers(1, 0).features();
        assert_eq!(features & GUEST_OFFLOADS, 0);
        assert!(!has(features, VIRTIO_NET_F_CSUM) && !has(features, VIRTIO_NET_F_MQ));
        assert!(has(features, VIRTIO_NET_F_MTU));
        let features = registers(2, ALL).features();
        assert_eq!(features & GUEST_OFFLOADS, GUEST_OFFLOADS);
        assert!(has(features, VIRTIO_NET_F_HOST_USO) && has(features, VIRTIO_NET_F_MQ));
    }

    #[test]
    fn the_tap_is_asked_for_what_it_takes_together() {
        assert_eq!(accepted(GUEST_OFFLOADS), ALL);
        assert_eq!(accepted(GUEST_OFFLOADS & !(1 << VIRTIO_NET_F_GUEST_CSUM)), 0);
        assert_eq!(accepted(GUEST_OFFLOADS & !(1 << VIRTIO_NET_F_GUEST_USO4)), ALL & !USO);
        let only_ecn = 1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_ECN;
        assert_eq!(accepted(only_ecn), TUN_F_CSUM);
    }
}
