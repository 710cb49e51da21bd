// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Log lines go to standard error, which is the console when the agent is init. A console is slow (on an emulated
//! serial line every byte leaves the guest), so nothing is logged on the way to a successful boot.

use std::io::Write;

use log::{Level, LevelFilter, Log, Metadata, Record};

struct Console;

/// Start logging at level `info`; `agent.log=` changes it later.
pub fn init() {
    // Fails only if there is a logger already.
    let _ = log::set_logger(&Console);
    log::set_max_level(LevelFilter::Info);
}

impl Log for Console {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let level = match record.level() {
            Level::Error => "error: ",
            Level::Warn => "warning: ",
            Level::Info => "",
            Level::Debug => "debug: ",
            Level::Trace => "trace: ",
        };
        // One write per line, so that lines of other programs do not cut it. A lost console is no reason to stop.
        let line = format!("ecr-agent: {level}{}\n", record.args());
        let _ = std::io::stderr().write_all(line.as_bytes());
    }

    fn flush(&self) {}
}
