// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What this host is.

use std::fs;
use std::path::Path;

/// Whether shared memory may have huge pages.
pub const HUGE_SHARED_MEMORY: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

/// The first value of a line `key: value` or `key=value`, quotes taken away.
fn value_of(content: &str, key: &str, separator: char) -> Option<String> {
    content.lines().find_map(|line| {
        let (name, value) = line.split_once(separator)?;
        (name.trim() == key).then(|| value.trim().trim_matches('"').to_owned())
    })
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// A line of `/proc/cpuinfo`; empty where there is none.
pub fn cpuinfo(key: &str) -> String {
    value_of(&read("/proc/cpuinfo"), key, ':').unwrap_or_default()
}

/// What of `wanted` the processor does not have.
pub fn missing_cpu_flags<'a>(wanted: &[&'a str]) -> Vec<&'a str> {
    let flags = cpuinfo("flags");
    let has = |flag: &&&str| !flags.split_whitespace().any(|found| found == **flag);
    wanted.iter().filter(has).copied().collect()
}

/// A line of `/etc/os-release`.
pub fn distribution(key: &str) -> String {
    value_of(&read("/etc/os-release"), key, '=').unwrap_or_default()
}

/// A line of `/proc/meminfo`, in kB.
pub fn memory(key: &str) -> u64 {
    let value = value_of(&read("/proc/meminfo"), key, ':').unwrap_or_default();
    value.split_whitespace().next().and_then(|value| value.parse().ok()).unwrap_or(0)
}

/// The kernel's release.
pub fn kernel() -> String {
    read("/proc/sys/kernel/osrelease").trim().to_owned()
}

/// Whether a module is loaded, or built in.
pub fn has_module(name: &str) -> bool {
    Path::new("/sys/module").join(name).exists()
}

/// Whether the kernel makes huge pages of shared memory where it is asked to, as guests that share files do; `None` where
/// it does not say (Linux, Documentation/admin-guide/mm/transhuge.rst).
pub fn huge_shared_memory() -> Option<bool> {
    chosen(&read(HUGE_SHARED_MEMORY)).map(|word| !matches!(word, "never" | "deny"))
}

/// The word in brackets.
fn chosen(words: &str) -> Option<&str> {
    words.split_whitespace().find_map(|word| word.strip_prefix('[')?.strip_suffix(']'))
}

/// Whether this user can open a device for reading and writing.
pub fn can_use(path: &str) -> std::io::Result<()> {
    fs::File::options().read(true).write(true).open(path).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_choice_is_in_brackets() {
        assert_eq!(chosen("always within_size advise [never] deny force\n"), Some("never"));
        assert_eq!(chosen(""), None);
    }

    #[test]
    fn values_are_found_in_both_notations() {
        assert_eq!(value_of("a: 1\nmodel name\t: X Y\n", "model name", ':').unwrap(), "X Y");
        assert_eq!(
            value_of("NAME=\"Debian GNU/Linux\"\n", "NAME", '=').unwrap(),
            "Debian GNU/Linux"
        );
        assert_eq!(value_of("NAME=x", "ID", '='), None);
        assert!(memory("MemTotal") > 0);
    }
}
