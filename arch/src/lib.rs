// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The machine as data: address maps, ACPI tables, device trees, boot plans, CPU register and CPUID values.
//!
//! Nothing here calls the operating system or touches guest memory: functions take a description and
//! return bytes or numbers, so all of it is tested on any machine.

#![forbid(unsafe_code)]

pub mod acpi;
pub mod arm64;
pub mod boot;
pub mod efi;
pub mod fdt;
#[cfg(test)]
mod golden;
pub mod layout;
pub mod x86;
