// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The shim's log: lines of `key=value` in the bundle's FIFO `log`, which containerd reads. The FIFO is open for
//! reading, too, so that containerd may come and go; a line that finds it full is lost and counted, since logging may
//! never hold up a container.

use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use log::{Level, LevelFilter, Log, Metadata, Record};

/// At most so many bytes of a message go into one line: with its keys, and if every byte has to be escaped, a line
/// must not exceed `PIPE_BUF`, or two of them could mix.
const MAX_MESSAGE: usize = 1800;

struct Fifo {
    file: File,
    sandbox: String,
    lost: AtomicU64,
}

/// Log to the FIFO `path` from now on.
pub fn init(path: &Path, sandbox: &str, debug: bool) -> io::Result<()> {
    let file =
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    let fifo = Fifo { file, sandbox: sandbox.to_owned(), lost: AtomicU64::new(0) };
    log::set_boxed_logger(Box::new(fifo)).map_err(io::Error::other)?;
    log::set_max_level(if debug { LevelFilter::Debug } else { LevelFilter::Info });
    std::panic::set_hook(Box::new(|panic| log::error!("{panic}")));
    Ok(())
}

impl Log for Fifo {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let message = record.args().to_string();
        for part in parts(&message) {
            self.write(record.level(), record.target(), part);
        }
    }

    fn flush(&self) {}
}

impl Fifo {
    fn write(&self, level: Level, source: &str, message: &str) {
        let lost = self.lost.swap(0, Ordering::Relaxed);
        if lost > 0 {
            let text = format!("{lost} lines were lost: nobody read the log");
            if !self.write_line(Level::Warn, module_path!(), &text) {
                self.lost.fetch_add(lost, Ordering::Relaxed);
            }
        }
        if !self.write_line(level, source, message) {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn write_line(&self, level: Level, source: &str, message: &str) -> bool {
        let line = line(SystemTime::now(), level, source, &self.sandbox, message);
        (&self.file).write_all(line.as_bytes()).is_ok()
    }
}

/// One line, as Kata writes them.
fn line(now: SystemTime, level: Level, source: &str, sandbox: &str, message: &str) -> String {
    let level = match level {
        Level::Error => "error",
        Level::Warn => "warning",
        Level::Info => "info",
        Level::Debug => "debug",
        Level::Trace => "trace",
    };
    format!(
        "time=\"{}\" level={level} msg=\"{}\" name=containerd-shim-ecr-v2 pid={} sandbox={sandbox} source={}\n",
        rfc3339(now),
        escape(message),
        process::id(),
        source.split_whitespace().collect::<String>(),
    )
}

/// A message in pieces that fit a line each; an empty message is one empty piece.
fn parts(message: &str) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = message;
    while rest.len() > MAX_MESSAGE {
        let (part, more) = rest.split_at(rest.floor_char_boundary(MAX_MESSAGE));
        parts.push(part);
        rest = more;
    }
    parts.push(rest);
    parts
}

fn escape(message: &str) -> String {
    let mut escaped = String::with_capacity(message.len() + 8);
    for character in message.chars() {
        match character {
            '"' => escaped.push_str("\\\""),
            '\\' => escaped.push_str("\\\\"),
            '\n' => escaped.push_str("\\n"),
            '\r' => escaped.push_str("\\r"),
            '\t' => escaped.push_str("\\t"),
            control if control.is_control() => escaped.push('?'),
            other => escaped.push(other),
        }
    }
    escaped
}

/// Go's RFC3339Nano, in UTC.
pub fn rfc3339(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let (days, seconds) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    let (year, month, day) = civil(days);
    let mut text = format!("{year:04}-{month:02}-{day:02}T");
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    // Writing to a string cannot fail.
    let _ = write!(text, "{hour:02}:{minute:02}:{second:02}.{:09}Z", since.subsec_nanos());
    text
}

/// The date of a day after 1970-01-01, in the proleptic Gregorian calendar. Years are counted from March, so that the
/// leap day is a year's last.
fn civil(days: u64) -> (u64, u64, u64) {
    const DAYS_OF_400_YEARS: u64 = 146_097;
    let days = days + 719_468;
    let (era, day_of_era) = (days / DAYS_OF_400_YEARS, days % DAYS_OF_400_YEARS);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn time_is_written_as_go_does() {
        let at = |seconds, nanos| rfc3339(UNIX_EPOCH + Duration::new(seconds, nanos));
        assert_eq!(at(0, 0), "1970-01-01T00:00:00.000000000Z");
        assert_eq!(at(951_782_400, 5), "2000-02-29T00:00:00.000000005Z");
        assert_eq!(at(1_795_455_553, 828_942_434), "2026-11-23T17:39:13.828942434Z");
        assert_eq!(at(4_107_542_399, 0), "2100-02-28T23:59:59.000000000Z");
        assert_eq!(at(4_107_542_400, 0), "2100-03-01T00:00:00.000000000Z");
    }

    #[test]
    fn a_line_is_one_line() {
        let line = line(UNIX_EPOCH, Level::Warn, "ecr_shim", "c1", "say \"no\"\nto \\ \u{1b}");
        assert!(line.starts_with(
            "time=\"1970-01-01T00:00:00.000000000Z\" level=warning msg=\"say \\\"no\\\"\\nto \\\\ ?\" name="
        ));
        assert_eq!(line.matches('\n').count(), 1);
    }

    #[test]
    fn long_messages_are_cut_between_characters() {
        let message = "ü".repeat(MAX_MESSAGE);
        let parts = parts(&message);
        assert_eq!(parts.concat(), message);
        assert!(parts.iter().all(|part| part.len() <= MAX_MESSAGE));
        assert_eq!(super::parts(""), [""]);
    }

    #[test]
    fn a_full_fifo_loses_lines_and_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&path)
            .unwrap();
        let fifo = Fifo { file, sandbox: "c1".into(), lost: AtomicU64::new(0) };
        for _ in 0..2000 {
            fifo.write(Level::Info, "test", "a line that nobody reads, and another, and another");
        }
        assert!(fifo.lost.load(Ordering::Relaxed) > 0);
        let mut buffer = vec![0; 1 << 20];
        let mut reader = &fifo.file;
        while reader.read(&mut buffer).is_ok() {}
        fifo.write(Level::Info, "test", "after");
        let read = reader.read(&mut buffer).unwrap();
        let text = String::from_utf8_lossy(&buffer[..read]).into_owned();
        assert!(text.contains("lines were lost") && text.contains("msg=\"after\""), "{text}");
    }
}
