// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Register blocks through which ACPI code in the guest learns what was plugged in or is to be removed.

mod ged;
mod pcihp;

pub use ged::{Ged, GedEvent};
pub use pcihp::{EjectSink, PciHotplug};
