// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Values of arguments as people write them: `512M`, `on`, and lists such as `path=disk.img,readonly`.

use std::path::PathBuf;
use std::str::FromStr;

/// A list of `key=value`, separated by commas. A comma within a value is written twice. A key alone means
/// `key=on`.
#[derive(Debug)]
pub(super) struct Options {
    entries: Vec<(String, String)>,
}

impl Options {
    /// Split `text`. Its first entry may leave out the key `first`. All keys must be among `keys`.
    pub(super) fn parse(text: &str, first: Option<&str>, keys: &[&str]) -> Result<Self, String> {
        let mut entries: Vec<(String, String)> = Vec::new();
        for (index, entry) in split(text).into_iter().enumerate() {
            let (key, value) = match (entry.split_once('='), first) {
                (Some((key, value)), _) if first.is_none() || keys.contains(&key) || index > 0 => {
                    (key.to_owned(), value.to_owned())
                }
                (_, Some(first)) if index == 0 => (first.to_owned(), entry),
                _ => (entry, "on".to_owned()),
            };
            if !keys.contains(&key.as_str()) {
                return Err(format!("there is no {key:?}: use {}", list(keys)));
            }
            if entries.iter().any(|(seen, _)| *seen == key) {
                return Err(format!("{key} is given twice"));
            }
            entries.push((key, value));
        }
        Ok(Self { entries })
    }

    fn get(&self, key: &str) -> Option<&str> {
        self.entries.iter().find(|(seen, _)| seen == key).map(|(_, value)| value.as_str())
    }

    /// The value of a key that must be there.
    pub(super) fn required(&self, key: &str) -> Result<&str, String> {
        match self.get(key) {
            Some(value) if !value.is_empty() => Ok(value),
            _ => Err(format!("{key}= is missing")),
        }
    }

    /// A path.
    pub(super) fn path(&self, key: &str) -> Option<PathBuf> {
        self.get(key).map(PathBuf::from)
    }

    /// A text.
    pub(super) fn text(&self, key: &str) -> Option<String> {
        self.get(key).map(str::to_owned)
    }

    /// A whole number.
    pub(super) fn number<N: FromStr>(&self, key: &str) -> Result<Option<N>, String> {
        self.get(key)
            .map(|value| number(value).map_err(|problem| format!("{key}={value}: {problem}")))
            .transpose()
    }

    /// A size in bytes.
    pub(super) fn size(&self, key: &str) -> Result<Option<u64>, String> {
        self.get(key)
            .map(|value| size(value).map_err(|problem| format!("{key}={problem}")))
            .transpose()
    }

    /// A switch; off where it is not given.
    pub(super) fn switch(&self, key: &str) -> Result<bool, String> {
        match self.get(key) {
            None | Some("off" | "no" | "false") => Ok(false),
            Some("on" | "yes" | "true") => Ok(true),
            Some(other) => Err(format!("{key}={other}: use on or off")),
        }
    }

    /// One of some words; `None` where it is not given.
    pub(super) fn choice<T: Copy>(
        &self,
        key: &str,
        words: &[(&str, T)],
    ) -> Result<Option<T>, String> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match words.iter().find(|(word, _)| *word == value) {
            Some((_, meaning)) => Ok(Some(*meaning)),
            None => {
                let words: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
                Err(format!("{key}={value}: use {}", list(&words)))
            }
        }
    }
}

/// Cut at single commas; a double one stands for itself.
fn split(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        let part = match character {
            ',' if characters.next_if_eq(&',').is_none() => {
                parts.push(String::new());
                continue;
            }
            _ => parts.last_mut(),
        };
        if let Some(part) = part {
            part.push(character);
        }
    }
    parts
}

/// `a, b or c`.
fn list(words: &[&str]) -> String {
    match words {
        [] => String::new(),
        [word] => (*word).to_owned(),
        [words @ .., last] => format!("{} or {last}", words.join(", ")),
    }
}

/// A whole number.
pub(super) fn number<N: FromStr>(text: &str) -> Result<N, String> {
    text.parse().map_err(|_| "use a whole number, not too large".to_owned())
}

/// A size in bytes: a whole number and a unit. There is no unit to fall back on, because half of the world
/// would mean bytes and the other half MiB.
pub(super) fn size(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let shift = match unit.to_ascii_uppercase().as_str() {
        _ if number.is_empty() => None,
        "K" | "KIB" => Some(10),
        "M" | "MIB" => Some(20),
        "G" | "GIB" => Some(30),
        "T" | "TIB" => Some(40),
        "" => return Err(format!("{text}: the unit is missing: use {text}M or {text}G")),
        _ => None,
    };
    let Some(shift) = shift else {
        return Err(format!("{text}: use a whole number and K, M, G or T, such as 512M or 2G"));
    };
    number
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(1 << shift))
        .ok_or_else(|| format!("{text}: use a size below 16777216T"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEYS: &[&str] = &["path", "readonly", "queues"];

    fn parse(text: &str) -> Result<Options, String> {
        Options::parse(text, Some("path"), KEYS)
    }

    #[test]
    fn sizes_as_people_write_them() {
        assert_eq!(size("512M"), Ok(512 << 20));
        assert_eq!(size("2g"), Ok(2 << 30));
        assert_eq!(size("2GiB"), Ok(2 << 30));
        assert_eq!(size("64k"), Ok(64 << 10));
        assert_eq!(size("1T"), Ok(1 << 40));
    }

    #[test]
    fn what_is_no_size() {
        assert_eq!(size("512").unwrap_err(), "512: the unit is missing: use 512M or 512G");
        for text in ["", "M", "-1M", "1.5G", "2GB", "2 G", "0x10M"] {
            let error = size(text).unwrap_err();
            assert!(error.contains("such as 512M"), "{error}");
        }
        for text in ["16777216T", "99999999999999999999M"] {
            assert!(size(text).unwrap_err().contains("below"), "{text}");
        }
    }

    #[test]
    fn lists() {
        let options = parse("path=a,readonly,queues=4").unwrap();
        assert_eq!(options.path("path"), Some("a".into()));
        assert_eq!(options.switch("readonly"), Ok(true));
        assert_eq!(options.number("queues"), Ok(Some(4u16)));
        let options = parse("a=b,readonly=off").unwrap();
        assert_eq!(options.path("path"), Some("a=b".into()));
        assert_eq!(options.switch("readonly"), Ok(false));
        assert_eq!(options.number::<u16>("queues"), Ok(None));
        assert_eq!(parse("one,,two,,,readonly").unwrap().required("path"), Ok("one,two,"));
    }

    #[test]
    fn mistakes_are_named_with_what_would_work() {
        assert_eq!(
            parse("a,speed=9").unwrap_err(),
            "there is no \"speed\": use path, readonly or queues"
        );
        assert_eq!(parse("a,path=b").unwrap_err(), "path is given twice");
        assert_eq!(parse("readonly=on").unwrap().required("path").unwrap_err(), "path= is missing");
        let options = parse("a,readonly=maybe,queues=many").unwrap();
        assert_eq!(options.switch("readonly").unwrap_err(), "readonly=maybe: use on or off");
        assert!(options.number::<u16>("queues").unwrap_err().starts_with("queues=many: "));
        let words = [("auto", 1), ("sync", 2)];
        assert_eq!(
            options.choice("readonly", &words).unwrap_err(),
            "readonly=maybe: use auto or sync"
        );
    }
}
