// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The common configuration structure (VIRTIO 1.2, section 4.1.4.3), without `queue_notify_data` and
//! `queue_reset`, whose features are not offered.

use serde::{Deserialize, Serialize};

use super::VirtioPci;
use super::interrupt::NO_VECTOR;
use crate::virtio::transport::session::{QueueSetup, status};

/// Offsets, in the specification's words.
mod field {
    pub(super) const DEVICE_FEATURE_SELECT: u64 = 0;
    pub(super) const DEVICE_FEATURE: u64 = 4;
    pub(super) const DRIVER_FEATURE_SELECT: u64 = 8;
    pub(super) const DRIVER_FEATURE: u64 = 12;
    pub(super) const CONFIG_MSIX_VECTOR: u64 = 16;
    pub(super) const NUM_QUEUES: u64 = 18;
    pub(super) const DEVICE_STATUS: u64 = 20;
    pub(super) const CONFIG_GENERATION: u64 = 21;
    pub(super) const QUEUE_SELECT: u64 = 22;
    pub(super) const QUEUE_SIZE: u64 = 24;
    pub(super) const QUEUE_MSIX_VECTOR: u64 = 26;
    pub(super) const QUEUE_ENABLE: u64 = 28;
    pub(super) const QUEUE_NOTIFY_OFF: u64 = 30;
    pub(super) const QUEUE_DESC: u64 = 32;
    pub(super) const QUEUE_DRIVER: u64 = 40;
    pub(super) const QUEUE_DEVICE: u64 = 48;
    pub(super) const END: u64 = 56;
}

/// What the driver has selected for the registers that show one of many.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(super) struct Selection {
    device_feature: u32,
    driver_feature: u32,
    queue: u16,
}

/// What an access of a size that the driver must not use reads.
const ABSENT: u64 = 0;

/// Read at `offset`. The driver reads fields whole, or 64-bit fields by halves.
pub(super) fn read(function: &VirtioPci, offset: u64, data: &mut [u8]) {
    let start = field_start(offset);
    let value = read_field(function, start) >> ((offset - start) * 8);
    let bytes = value.to_le_bytes();
    data.fill(0);
    let len = data.len().min(bytes.len());
    data[..len].copy_from_slice(&bytes[..len]);
}

/// 64-bit fields may be accessed by halves, section 4.1.3.1; all others are accessed at their start.
fn field_start(offset: u64) -> u64 {
    match offset {
        field::QUEUE_DESC..field::END => offset & !7,
        _ => offset,
    }
}

fn read_field(function: &VirtioPci, offset: u64) -> u64 {
    let (session, interrupt) = (&function.session, &function.interrupt);
    let selection = function.selection;
    let queue = session.queue(selection.queue).copied();
    let of_queue = |get: fn(QueueSetup) -> u64| queue.map_or(ABSENT, get);
    match offset {
        field::DEVICE_FEATURE_SELECT => selection.device_feature.into(),
        field::DEVICE_FEATURE => half(session.offered_features(), selection.device_feature),
        field::DRIVER_FEATURE_SELECT => selection.driver_feature.into(),
        field::DRIVER_FEATURE => half(session.driver_features(), selection.driver_feature),
        field::CONFIG_MSIX_VECTOR => interrupt.config_vector().into(),
        field::NUM_QUEUES => session.queue_count().into(),
        field::DEVICE_STATUS => {
            let needs_reset = if interrupt.is_reset_needed() { status::NEEDS_RESET } else { 0 };
            (session.status() | needs_reset).into()
        }
        field::CONFIG_GENERATION => interrupt.generation().into(),
        field::QUEUE_SELECT => selection.queue.into(),
        field::QUEUE_SIZE => of_queue(|queue| queue.size.into()),
        field::QUEUE_MSIX_VECTOR => match queue {
            Some(_) => interrupt.queue_vector(selection.queue).into(),
            None => NO_VECTOR.into(),
        },
        field::QUEUE_ENABLE => of_queue(|queue| queue.enabled.into()),
        field::QUEUE_NOTIFY_OFF => selection.queue.into(),
        field::QUEUE_DESC => of_queue(|queue| queue.descriptors),
        field::QUEUE_DRIVER => of_queue(|queue| queue.available),
        field::QUEUE_DEVICE => of_queue(|queue| queue.used),
        _ => ABSENT,
    }
}

/// Write at `offset`. Whatever does not fit the field's size is ignored.
pub(super) fn write(function: &mut VirtioPci, offset: u64, data: &[u8]) {
    match *data {
        [value] if offset == field::DEVICE_STATUS => function.write_status(value),
        [a, b] => write16(function, offset, u16::from_le_bytes([a, b])),
        [a, b, c, d] => write32(function, offset, u32::from_le_bytes([a, b, c, d])),
        [a, b, c, d, e, f, g, h] if offset.is_multiple_of(8) => {
            write32(function, offset, u32::from_le_bytes([a, b, c, d]));
            write32(function, offset + 4, u32::from_le_bytes([e, f, g, h]));
        }
        _ => {}
    }
}

fn write16(function: &mut VirtioPci, offset: u64, value: u16) {
    let queue = function.selection.queue;
    match offset {
        field::CONFIG_MSIX_VECTOR => function.interrupt.set_config_vector(value),
        field::QUEUE_SELECT => function.selection.queue = value,
        field::QUEUE_MSIX_VECTOR => function.interrupt.set_queue_vector(queue, value),
        field::QUEUE_SIZE => {
            if let Some(queue) = function.session.queue_mut(queue) {
                queue.size = value;
            }
        }
        field::QUEUE_ENABLE if value == 1 => {
            if let Some(queue) = function.session.queue_mut(queue) {
                queue.enabled = true;
            }
        }
        _ => {}
    }
}

fn write32(function: &mut VirtioPci, offset: u64, value: u32) {
    let selection = &mut function.selection;
    match offset {
        field::DEVICE_FEATURE_SELECT => selection.device_feature = value,
        field::DRIVER_FEATURE_SELECT => selection.driver_feature = value,
        field::DRIVER_FEATURE => {
            let mut features = function.session.driver_features();
            set_half(&mut features, selection.driver_feature, value);
            function.session.set_driver_features(features);
        }
        field::QUEUE_DESC..field::END => write_address(function, offset, value),
        _ => {}
    }
}

fn write_address(function: &mut VirtioPci, offset: u64, value: u32) {
    let Some(queue) = function.session.queue_mut(function.selection.queue) else { return };
    let address = match field_start(offset) {
        field::QUEUE_DESC => &mut queue.descriptors,
        field::QUEUE_DRIVER => &mut queue.available,
        _ => &mut queue.used,
    };
    match offset % 8 {
        0 => set_half(address, 0, value),
        4 => set_half(address, 1, value),
        _ => {}
    }
}

/// The low half of `value` for 0, the high for 1. There is no more.
fn half(value: u64, select: u32) -> u64 {
    match select {
        0 => value & 0xffff_ffff,
        1 => value >> 32,
        _ => 0,
    }
}

fn set_half(value: &mut u64, select: u32, half: u32) {
    let half = u64::from(half);
    match select {
        0 => *value = *value >> 32 << 32 | half,
        1 => *value = *value & 0xffff_ffff | half << 32,
        _ => {}
    }
}
