// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Mount options, as mount(8) writes them: the words that mount(2) has flags for, and the rest, which is the file
//! system's.

use nix::mount::MsFlags;

/// What mount(2) takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountOptions {
    pub flags: MsFlags,
    pub data: String,
}

/// A word, the flags that it sets, and those that it clears.
type Word = (&'static str, MsFlags, MsFlags);

const NONE: MsFlags = MsFlags::empty();
const ATIME: MsFlags =
    MsFlags::MS_NOATIME.union(MsFlags::MS_RELATIME).union(MsFlags::MS_STRICTATIME);

#[rustfmt::skip] // A table.
const WORDS: [Word; 37] = [
    ("defaults",      NONE,                                        NONE),
    ("async",         NONE,                                        MsFlags::MS_SYNCHRONOUS),
    ("atime",         NONE,                                        MsFlags::MS_NOATIME),
    ("bind",          MsFlags::MS_BIND,                            NONE),
    ("dev",           NONE,                                        MsFlags::MS_NODEV),
    ("diratime",      NONE,                                        MsFlags::MS_NODIRATIME),
    ("dirsync",       MsFlags::MS_DIRSYNC,                         NONE),
    ("exec",          NONE,                                        MsFlags::MS_NOEXEC),
    ("iversion",      MsFlags::MS_I_VERSION,                       NONE),
    ("lazytime",      MsFlags::MS_LAZYTIME,                        NONE),
    ("loud",          NONE,                                        MsFlags::MS_SILENT),
    ("mand",          MsFlags::MS_MANDLOCK,                        NONE),
    ("noatime",       MsFlags::MS_NOATIME,                         ATIME),
    ("nodev",         MsFlags::MS_NODEV,                           NONE),
    ("nodiratime",    MsFlags::MS_NODIRATIME,                      NONE),
    ("noexec",        MsFlags::MS_NOEXEC,                          NONE),
    ("noiversion",    NONE,                                        MsFlags::MS_I_VERSION),
    ("nolazytime",    NONE,                                        MsFlags::MS_LAZYTIME),
    ("nomand",        NONE,                                        MsFlags::MS_MANDLOCK),
    ("norelatime",    NONE,                                        MsFlags::MS_RELATIME),
    ("nostrictatime", NONE,                                        MsFlags::MS_STRICTATIME),
    ("nosuid",        MsFlags::MS_NOSUID,                          NONE),
    ("private",       MsFlags::MS_PRIVATE,                         NONE),
    ("rbind",         MsFlags::MS_BIND.union(MsFlags::MS_REC),     NONE),
    ("relatime",      MsFlags::MS_RELATIME,                        ATIME),
    ("remount",       MsFlags::MS_REMOUNT,                         NONE),
    ("ro",            MsFlags::MS_RDONLY,                          NONE),
    ("rprivate",      MsFlags::MS_PRIVATE.union(MsFlags::MS_REC),  NONE),
    ("rshared",       MsFlags::MS_SHARED.union(MsFlags::MS_REC),   NONE),
    ("rslave",        MsFlags::MS_SLAVE.union(MsFlags::MS_REC),    NONE),
    ("rw",            NONE,                                        MsFlags::MS_RDONLY),
    ("shared",        MsFlags::MS_SHARED,                          NONE),
    ("silent",        MsFlags::MS_SILENT,                          NONE),
    ("slave",         MsFlags::MS_SLAVE,                           NONE),
    ("strictatime",   MsFlags::MS_STRICTATIME,                     ATIME),
    ("suid",          NONE,                                        MsFlags::MS_NOSUID),
    ("sync",          MsFlags::MS_SYNCHRONOUS,                     NONE),
];

impl MountOptions {
    /// Later words win over earlier ones. One string may hold several words, with commas between them.
    pub fn parse<S: AsRef<str>>(options: &[S]) -> Self {
        let mut flags = MsFlags::empty();
        let mut data = Vec::new();
        let words = options.iter().flat_map(|option| option.as_ref().split(','));
        for word in words.map(str::trim).filter(|word| !word.is_empty()) {
            match WORDS.iter().find(|(name, ..)| *name == word) {
                Some((_, set, clear)) => flags = flags.difference(*clear).union(*set),
                None => data.push(word),
            }
        }
        MountOptions { flags, data: data.join(",") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_and_the_file_systems_own() {
        let options =
            MountOptions::parse(&["noexec", "nosuid", "nodev", "mode=1777", "size=67108864"]);
        let flags = MsFlags::MS_NOEXEC | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        assert_eq!(options, MountOptions { flags, data: "mode=1777,size=67108864".into() });
        let empty = MountOptions { flags: MsFlags::empty(), data: String::new() };
        assert_eq!(MountOptions::parse::<&str>(&[]), empty);
        assert_eq!(MountOptions::parse(&["", "defaults", " ,"]), empty);
    }

    #[test]
    fn the_later_word_wins() {
        let flags = |options: &[&str]| MountOptions::parse(options).flags;
        assert_eq!(flags(&["ro", "rw"]), MsFlags::empty());
        assert_eq!(flags(&["rw", "ro"]), MsFlags::MS_RDONLY);
        assert_eq!(flags(&["noatime", "relatime"]), MsFlags::MS_RELATIME);
        assert_eq!(flags(&["nosuid,nodev", "dev"]), MsFlags::MS_NOSUID);
        assert_eq!(flags(&["rbind"]), MsFlags::MS_BIND | MsFlags::MS_REC);
    }

    #[test]
    fn an_overlay_keeps_its_directories() {
        let options = MountOptions::parse(&["ro", "lowerdir=/a:/b", "nouuid"]);
        assert_eq!(options.flags, MsFlags::MS_RDONLY);
        assert_eq!(options.data, "lowerdir=/a:/b,nouuid");
    }

    #[test]
    fn every_word_is_there_once() {
        for (index, (name, ..)) in WORDS.iter().enumerate() {
            assert!(WORDS[..index].iter().all(|(earlier, ..)| earlier != name), "{name}");
        }
    }
}
