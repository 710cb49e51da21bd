// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Where Debian packages come from: the mirror that this machine's own apt uses.
//!
//! Both formats of sources.list(5) are read, one-line and deb822. The archive is told from its path, which is what
//! mirrors keep: `.../debian` and `.../debian-security`. A machine without Debian sources uses the public names.

use std::fs;
use std::path::{Path, PathBuf};

const PUBLIC_ARCHIVE: &str = "http://deb.debian.org/debian";
const PUBLIC_SECURITY: &str = "http://deb.debian.org/debian-security";

/// The sources of `suite`, as sources.list(5) lines.
#[must_use]
pub fn sources(suite: &str) -> Vec<String> {
    lines(&configured(Path::new("/etc/apt")), suite)
}

fn lines(uris: &[String], suite: &str) -> Vec<String> {
    let mirror_of = |archive: &str, public: &str| {
        let ending = |uri: &&String| uri.trim_end_matches('/').ends_with(archive);
        uris.iter().find(ending).map_or(public, String::as_str).to_owned()
    };
    let archive = mirror_of("/debian", PUBLIC_ARCHIVE);
    let security = mirror_of("/debian-security", PUBLIC_SECURITY);
    vec![
        format!("deb {archive} {suite} main"),
        format!("deb {archive} {suite}-updates main"),
        format!("deb {security} {suite}-security main"),
    ]
}

/// The URIs of all package sources below `apt`, in the order in which apt reads them.
fn configured(apt: &Path) -> Vec<String> {
    let parts = fs::read_dir(apt.join("sources.list.d")).into_iter().flatten().flatten();
    let mut files: Vec<PathBuf> = parts.map(|entry| entry.path()).collect();
    files.sort();
    files.insert(0, apt.join("sources.list"));
    files.iter().flat_map(|path| uris(&fs::read_to_string(path).unwrap_or_default())).collect()
}

fn uris(text: &str) -> Vec<String> {
    let is_uri = |word: &&str| word.contains("://");
    text.lines()
        .map(str::trim)
        .filter_map(|line| line.strip_prefix("deb ").or_else(|| line.strip_prefix("URIs:")))
        .flat_map(|rest| rest.split_whitespace().filter(is_uri).map(str::to_owned))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_formats_are_read() {
        let apt = tempfile::tempdir().unwrap();
        fs::create_dir(apt.path().join("sources.list.d")).unwrap();
        fs::write(
            apt.path().join("sources.list"),
            "# deb http://old.example/debian bookworm main\n\
             deb [arch=amd64] https://one.example/pool/debian/ bookworm main # comment\n\
             deb-src http://src.example/debian bookworm main\n",
        )
        .unwrap();
        fs::write(
            apt.path().join("sources.list.d/debian.sources"),
            "Types: deb\n# http://snapshot.example/\nURIs: http://two.example/debian-security\nSuites: x\n",
        )
        .unwrap();
        assert_eq!(
            lines(&configured(apt.path()), "trixie"),
            [
                "deb https://one.example/pool/debian/ trixie main",
                "deb https://one.example/pool/debian/ trixie-updates main",
                "deb http://two.example/debian-security trixie-security main",
            ]
        );
    }

    #[test]
    fn without_debian_sources_the_public_names_are_used() {
        let other = ["http://archive.example/ubuntu".to_owned()];
        assert_eq!(lines(&other, "trixie")[0], format!("deb {PUBLIC_ARCHIVE} trixie main"));
    }
}
