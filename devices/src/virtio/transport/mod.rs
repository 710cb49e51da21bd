// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What carries a virtio device to its driver.
//!
//! [`session`] is common to all transports: status, features, queues. [`pci`] shows it as registers.

pub mod pci;
pub mod session;
