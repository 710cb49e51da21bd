// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! One request, from its chain to what the backend is asked for. VIRTIO 1.2 section 5.2.6.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::{Bytes, GuestAddress};

use super::device::Disk;
use crate::backend::block::{Operation, Transfer};
use crate::memory::GuestMemory;
use crate::virtio::queue::{Buffers, Chain, RingError};

/// Unit of sectors, whatever the block size.
pub(super) const SECTOR_SIZE: u32 = 512;

/// Most sectors of a discard: 2 GiB.
pub(super) const MAX_DISCARD_SECTORS: u32 = 1 << 22;

/// Most sectors of a write of zeros: 32 MiB, as the host may have to write them.
pub(super) const MAX_WRITE_ZEROES_SECTORS: u32 = 1 << 16;

/// Most ranges of a discard or a write of zeros.
pub(super) const MAX_SEGMENTS: u32 = 1;

/// Bytes of struct `virtio_blk_req` before the data: type, reserved, sector.
const HEADER_SIZE: usize = 16;

/// Bytes of struct `virtio_blk_discard_write_zeroes`: sector, number of sectors, flags.
const RANGE_SIZE: usize = 16;

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    Ok = VIRTIO_BLK_S_OK as u8,
    IoError = VIRTIO_BLK_S_IOERR as u8,
    Unsupported = VIRTIO_BLK_S_UNSUPP as u8,
}

/// Where the status of a request goes, and what is then in its buffers.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reply {
    status: GuestAddress,
    /// Bytes before the status that a success writes.
    data: u32,
}

impl Reply {
    /// Write the status. Says how many bytes of the chain were written.
    pub(super) fn send(self, memory: &GuestMemory, status: Status) -> Result<u32, RingError> {
        memory.write_obj(status as u8, self.status).map_err(|_| RingError::Memory {
            what: "status",
            address: self.status.0,
            len: 1,
        })?;
        Ok(if status == Status::Ok { self.data + 1 } else { 1 })
    }
}

/// What a request comes to.
#[derive(Debug)]
pub(super) enum Action {
    /// It is done.
    Done(Status),
    /// The backend has to do it.
    Start(Operation),
}

/// Read the request in `chain`.
///
/// # Errors
/// There is no room for a status.
pub(super) fn parse(
    disk: &Disk,
    memory: &Arc<GuestMemory>,
    chain: &Chain,
) -> Result<(Reply, Action), RingError> {
    const NO_STATUS: &str = "has no writable byte for the status of a block request";
    let no_status = RingError::Request { head: chain.head(), rule: NO_STATUS };

    let writable = chain.writable();
    let (data_in, status) =
        writable.len().checked_sub(1).and_then(|len| writable.split_at(len)).ok_or(no_status)?;
    let status = status.segments().next().ok_or(no_status)?.address;
    // A chain has at most 4 GiB, so less than that comes before the status.
    let data = data_in.len() as u32;
    let reply = |data| Reply { status, data };

    let readable = chain.readable();
    let Some((header, data_out)) = readable.split_at(HEADER_SIZE as u64) else {
        return Ok((reply(0), Action::Done(Status::IoError)));
    };
    let mut bytes = [0; HEADER_SIZE];
    header.read(memory, &mut bytes)?;
    let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = bytes;
    let (kind, sector) = (u32::from_le_bytes([t0, t1, t2, t3]), u64::from_le_bytes(sector));

    let parser = Parser { disk, memory };
    Ok(match kind {
        VIRTIO_BLK_T_IN => (reply(data), parser.read(sector, data_in)?),
        VIRTIO_BLK_T_OUT => (reply(0), parser.write(sector, data_out)?),
        VIRTIO_BLK_T_FLUSH => (reply(0), Action::Start(Operation::Flush)),
        VIRTIO_BLK_T_GET_ID => (reply(data_in.write(memory, &disk.id)?), Action::Done(Status::Ok)),
        VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
            (reply(0), parser.range(kind, data_out)?)
        }
        _ => (reply(0), Action::Done(Status::Unsupported)),
    })
}

struct Parser<'a> {
    disk: &'a Disk,
    memory: &'a Arc<GuestMemory>,
}

impl Parser<'_> {
    fn read(&self, sector: u64, data: Buffers<'_>) -> Result<Action, RingError> {
        Ok(match self.offset(sector, data.len()) {
            None => Action::Done(Status::IoError),
            Some(_) if data.is_empty() => Action::Done(Status::Ok),
            Some(offset) => Action::Start(Operation::Read { offset, into: self.transfer(data)? }),
        })
    }

    fn write(&self, sector: u64, data: Buffers<'_>) -> Result<Action, RingError> {
        let durable = !self.disk.writeback.load(Ordering::Relaxed);
        Ok(match self.offset(sector, data.len()) {
            _ if self.disk.file.readonly() => Action::Done(Status::IoError),
            None => Action::Done(Status::IoError),
            Some(_) if data.is_empty() => Action::Done(Status::Ok),
            Some(offset) => {
                Action::Start(Operation::Write { offset, from: self.transfer(data)?, durable })
            }
        })
    }

    /// A discard or a write of zeros.
    fn range(&self, kind: u32, data: Buffers<'_>) -> Result<Action, RingError> {
        const FAILED: Action = Action::Done(Status::IoError);
        if self.disk.file.readonly() || data.len() != RANGE_SIZE as u64 {
            return Ok(FAILED);
        }
        let mut bytes = [0; RANGE_SIZE];
        data.read(self.memory, &mut bytes)?;
        let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = bytes;
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let count = u32::from_le_bytes([n0, n1, n2, n3]);
        let flags = u32::from_le_bytes(flags);

        let (known_flags, max) = match kind {
            VIRTIO_BLK_T_DISCARD => (0, MAX_DISCARD_SECTORS),
            _ => (VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP, MAX_WRITE_ZEROES_SECTORS),
        };
        if flags & !known_flags != 0 {
            return Ok(Action::Done(Status::Unsupported));
        }
        let len = u64::from(count) * u64::from(SECTOR_SIZE);
        Ok(match self.offset(sector, len) {
            Some(_) if count == 0 => Action::Done(Status::Ok),
            Some(offset) if count <= max => Action::Start(match kind {
                VIRTIO_BLK_T_DISCARD => Operation::Discard { offset, len },
                _ => Operation::WriteZeroes { offset, len, unmap: flags != 0 },
            }),
            _ => FAILED,
        })
    }

    /// Where `len` bytes from `sector` on stand in the file, if they are whole sectors of it.
    fn offset(&self, sector: u64, len: u64) -> Option<u64> {
        let size = u64::from(SECTOR_SIZE);
        let end = sector.checked_add(len / size)?;
        (len.is_multiple_of(size) && end <= self.disk.sectors).then(|| sector * size)
    }

    fn transfer(&self, data: Buffers<'_>) -> Result<Transfer, RingError> {
        let mut transfer = Transfer::new(Arc::clone(self.memory));
        for segment in data.segments() {
            transfer.push(segment.address, segment.len).map_err(|_| RingError::Memory {
                what: "buffer",
                address: segment.address.0,
                len: u64::from(segment.len),
            })?;
        }
        Ok(transfer)
    }
}
