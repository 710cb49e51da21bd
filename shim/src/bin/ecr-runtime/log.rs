// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! This program's own messages, in a file.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::time::SystemTime;

use anyhow::{Context as _, Result};
use log::{LevelFilter, Log, Metadata, Record};
use parking_lot::Mutex;

use ecr_shim::process::logger::rfc3339;

struct FileLog {
    file: Mutex<File>,
    json: bool,
}

/// Let messages go to `path`.
pub fn install(path: &Path, json: bool) -> Result<()> {
    let file = File::options().append(true).create(true).open(path);
    let file = file.with_context(|| format!("open the log {}", path.display()))?;
    log::set_boxed_logger(Box::new(FileLog { file: Mutex::new(file), json }))?;
    log::set_max_level(LevelFilter::Info);
    Ok(())
}

impl Log for FileLog {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= LevelFilter::Info
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let (time, level) = (rfc3339(SystemTime::now()), record.level().as_str().to_lowercase());
        let message = record.args().to_string();
        let line = if self.json {
            serde_json::json!({ "time": time, "level": level, "msg": message }).to_string()
        } else {
            format!("time={time:?} level={level} msg={message:?}")
        };
        // There is nobody to tell that the log is full.
        let _ = writeln!(self.file.lock(), "{line}");
    }

    fn flush(&self) {}
}
