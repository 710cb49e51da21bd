// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Log lines go to standard error, which is the console when the agent is init, and to whoever listens on the log port.
//! A console is slow (on an emulated serial line every byte leaves the guest), so nothing is logged on the way to a
//! successful boot.

use std::collections::VecDeque;
use std::io::Write;
use std::sync::Arc;

use log::{Level, LevelFilter, Log, Metadata, Record};
use parking_lot::Mutex;
use tokio::sync::watch;

/// What is kept for those who come late, or read slowly.
const KEPT: usize = 64 << 10;
/// Longer lines are cut for the log port.
const LONGEST: usize = 4 << 10;

static LOGGER: Logger = Logger { kept: Mutex::new(None) };

struct Logger {
    kept: Mutex<Option<Kept>>,
}

/// The last lines. Each has a number, so that a reader knows where it was.
struct Kept {
    lines: VecDeque<Arc<str>>,
    bytes: usize,
    /// Of the line after the last one.
    next: watch::Sender<u64>,
}

impl Kept {
    fn push(&mut self, line: &str) {
        let line = &line[..line.floor_char_boundary(LONGEST)];
        self.bytes += line.len();
        self.lines.push_back(line.into());
        while self.bytes > KEPT {
            self.bytes -= self.lines.pop_front().map_or(0, |line| line.len());
        }
        self.next.send_modify(|next| *next += 1);
    }

    /// The line of this number, or the oldest one after it, and the number of the one behind.
    fn get(&self, number: u64) -> Option<(Arc<str>, u64)> {
        let next = *self.next.borrow();
        let number = number.max(next - self.lines.len() as u64);
        let index = usize::try_from(number.checked_sub(next - self.lines.len() as u64)?).ok()?;
        self.lines.get(index).map(|line| (Arc::clone(line), number + 1))
    }
}

/// Start logging at level `info`; `agent.log=` changes it later.
pub fn init() {
    // Fails only if there is a logger already.
    let _ = log::set_logger(&LOGGER);
    log::set_max_level(LevelFilter::Info);
}

/// From now on the last lines are kept for [`Reader`]s.
pub fn keep() {
    LOGGER.kept.lock().get_or_insert_with(|| Kept {
        lines: VecDeque::new(),
        bytes: 0,
        next: watch::Sender::new(0),
    });
}

/// Reads the log from the oldest line that is kept. A reader that is too slow misses lines.
#[derive(Debug)]
pub struct Reader {
    number: u64,
    next: watch::Receiver<u64>,
}

impl Reader {
    /// None if no lines are kept.
    pub fn new() -> Option<Self> {
        let kept = LOGGER.kept.lock();
        kept.as_ref().map(|kept| Reader { number: 0, next: kept.next.subscribe() })
    }

    /// The next line, with a newline at its end.
    pub async fn line(&mut self) -> Option<Arc<str>> {
        loop {
            self.next.borrow_and_update();
            let found = LOGGER.kept.lock().as_ref().and_then(|kept| kept.get(self.number));
            if let Some((line, number)) = found {
                self.number = number;
                return Some(line);
            }
            self.next.changed().await.ok()?;
        }
    }
}

impl Log for Logger {
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
        if let Some(kept) = self.kept.lock().as_mut() {
            kept.push(&line);
        }
    }

    fn flush(&self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept() -> Kept {
        Kept { lines: VecDeque::new(), bytes: 0, next: watch::Sender::new(0) }
    }

    #[test]
    fn lines_are_read_in_order() {
        let mut kept = kept();
        assert!(kept.get(0).is_none());
        kept.push("a\n");
        kept.push("b\n");
        let (line, number) = kept.get(0).unwrap();
        assert_eq!((&*line, number), ("a\n", 1));
        let (line, number) = kept.get(number).unwrap();
        assert_eq!((&*line, number), ("b\n", 2));
        assert!(kept.get(number).is_none());
        assert!(kept.get(100).is_none());
    }

    #[test]
    fn old_lines_make_room() {
        let mut kept = kept();
        let long = "x".repeat(LONGEST) + "é";
        for _ in 0..100 {
            kept.push(&long);
        }
        assert_eq!(kept.bytes, KEPT);
        let (line, number) = kept.get(0).unwrap();
        assert_eq!((line.len(), number), (LONGEST, 100 - KEPT as u64 / LONGEST as u64 + 1));
    }
}
