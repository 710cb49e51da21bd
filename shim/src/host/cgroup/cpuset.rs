// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Sets of CPUs and memory nodes, as cpuset writes them: `0-3,8`.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, ensure};

/// More numbers than any machine has, and few enough to list.
const MAX: u32 = 1 << 16;

/// All numbers of all lists; empty when every list is.
pub(super) fn union<'a>(lists: impl IntoIterator<Item = &'a str>) -> Result<String> {
    let mut numbers = BTreeSet::new();
    for list in lists {
        for range in list.split(',').map(str::trim).filter(|range| !range.is_empty()) {
            let what = || format!("cpuset {list:?}");
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            let first: u32 = first.parse().with_context(what)?;
            let last: u32 = last.parse().with_context(what)?;
            ensure!(first <= last && last < MAX, "{}: {range} is no range", what());
            numbers.extend(first..=last);
        }
    }
    Ok(write(&numbers))
}

fn write(numbers: &BTreeSet<u32>) -> String {
    let mut ranges: Vec<(u32, u32)> = Vec::new();
    for &number in numbers {
        match ranges.last_mut() {
            Some((_, last)) if *last + 1 == number => *last = number,
            _ => ranges.push((number, number)),
        }
    }
    let words: Vec<_> = ranges
        .into_iter()
        .map(
            |(first, last)| {
                if first == last { first.to_string() } else { format!("{first}-{last}") }
            },
        )
        .collect();
    words.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_become_one() {
        assert_eq!(union(["0-1,4", "", "2", "8-9, 9-11"]).unwrap(), "0-2,4,8-11");
        assert_eq!(union(["", ""]).unwrap(), "");
        assert_eq!(union([]).unwrap(), "");
        for bad in ["x", "3-1", "1-", "0-4294967295", "-1"] {
            let error = format!("{:#}", union([bad]).unwrap_err());
            assert!(error.contains(bad), "{error}");
        }
    }
}
