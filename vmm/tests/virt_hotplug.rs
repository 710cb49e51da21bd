// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Devices that come and go while a guest runs on a virt.

// All of this is test code; clippy's own exception covers functions marked `#[test]` only.
#![allow(clippy::unwrap_used)]

// Shared with other tests, which use the rest.
#[allow(dead_code)]
#[path = "boards/virt.rs"]
mod board;
#[allow(dead_code)]
#[path = "machine/driver.rs"]
mod driver;
#[path = "machine/hotplug.rs"]
mod hotplug;
#[path = "machine/hotplug_tests.rs"]
mod hotplug_tests;
#[allow(dead_code)]
#[path = "machine/rig.rs"]
mod rig;
