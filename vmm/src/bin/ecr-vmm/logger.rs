// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The log: lines on standard error or in a file, with the seconds since the start.

use std::error::Error;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::time::Instant;

use ecr_vmm::cmdline::LogTarget;
use log::{Log, Metadata, Record};
use parking_lot::Mutex;

struct Logger {
    start: Instant,
    output: Mutex<Box<dyn Write + Send>>,
}

/// Log as `target` says.
pub fn install(target: &LogTarget) -> Result<(), Box<dyn Error>> {
    let output: Box<dyn Write + Send> = match &target.file {
        None => Box::new(io::stderr()),
        Some(path) => {
            let file = OpenOptions::new().append(true).create(true).open(path);
            Box::new(file.map_err(|error| format!("open {path:?} for the log: {error}"))?)
        }
    };
    log::set_boxed_logger(Box::new(Logger { start: Instant::now(), output: Mutex::new(output) }))?;
    log::set_max_level(target.level);
    Ok(())
}

impl Log for Logger {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let time = self.start.elapsed().as_secs_f64();
        let (level, target, text) = (record.level(), record.target(), record.args());
        // One write for each line, so that lines of several processes do not mix. A log that cannot be
        // written has nowhere to complain.
        let line = format!("[{time:11.6}] {level:5} {target}: {text}\n");
        let _ = self.output.lock().write_all(line.as_bytes());
    }

    fn flush(&self) {
        let _ = self.output.lock().flush();
    }
}
