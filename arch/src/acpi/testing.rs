// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What tests of all boards' tables do.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use super::AcpiTables;
use crate::golden::golden;

pub(super) fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

/// Every byte of every table, as dumps that a reviewer can read, in a directory of golden files.
pub(super) fn golden_tables(directory: &str, tables: &AcpiTables) {
    for range in &tables.tables {
        let bytes = &tables.bytes[range.clone()];
        golden(&format!("{directory}/{}.hex", table_name(bytes)), &dump(bytes));
    }
}

fn dump(bytes: &[u8]) -> String {
    let line = |(n, line): (usize, &[u8])| {
        let hex: String = line.iter().map(|byte| format!("{byte:02x} ")).collect();
        let text: String = line
            .iter()
            .map(|&byte| if byte.is_ascii_graphic() { char::from(byte) } else { '.' })
            .collect();
        format!("{:04x}  {hex:<48} {text}\n", n * 16)
    };
    bytes.chunks(16).enumerate().map(line).collect()
}

fn table_name(bytes: &[u8]) -> String {
    String::from_utf8_lossy(&bytes[..4]).to_lowercase()
}

/// `iasl` must neither warn nor refuse, and must compile its own text of the AML again.
pub(super) fn disassemble(tables: &AcpiTables) {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    if Command::new("iasl").arg("-v").output().is_err() {
        eprintln!("SKIPPED: no iasl on this machine (Debian package acpica-tools)");
        return;
    }
    let (process, count) = (std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    let scratch = std::env::temp_dir().join(format!("ecr-acpi-{process}-{count}"));
    fs::create_dir_all(&scratch).unwrap();
    for range in &tables.tables {
        let bytes = &tables.bytes[range.clone()];
        let name = table_name(bytes);
        fs::write(scratch.join(format!("{name}.dat")), bytes).unwrap();
        iasl(&scratch, &["-d", &format!("{name}.dat")]);
    }
    iasl(&scratch, &["-we", "dsdt.dsl"]);
    fs::remove_dir_all(&scratch).unwrap();
}

fn iasl(scratch: &Path, arguments: &[&str]) {
    let output = Command::new("iasl").args(arguments).current_dir(scratch).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned()
        + &String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "iasl {arguments:?}: {said}");
    for complaint in ["Warning", "Error", "Invalid", "Unknown"] {
        let none = said.replace("0 Warnings", "").replace("0 Errors", "");
        assert!(!none.contains(complaint), "iasl {arguments:?}: {said}");
    }
}
