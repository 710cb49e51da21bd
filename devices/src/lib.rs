// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Device models behind small traits.
//!
//! A device knows only its own registers. It is given an [`irq::IrqLine`] or an [`irq::MsiSink`] and a
//! [`memory::GuestMemoryHandle`]; it has no base address, no interrupt number, no bus and no lock of
//! its own. The board, in the `vmm` crate, says where each device sits.

pub mod backend;
pub mod bus;
pub mod chipset;
pub mod gicv2m;
pub mod hotplug;
pub mod io_thread;
pub mod irq;
pub mod memory;
pub mod pci;
pub mod primecell;
pub mod vhost;
pub mod virtio;
