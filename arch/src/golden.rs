// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Golden files, for tests.

use std::fs;
use std::path::Path;

/// `text` must be what `tests/golden/<name>` holds.
pub(crate) fn golden(name: &str, text: &str) {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    if std::env::var_os("ECR_UPDATE_GOLDEN").is_some() {
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(&file, text).unwrap();
    }
    let wanted = fs::read_to_string(&file).unwrap_or_default();
    for (n, (is, was)) in text.lines().zip(wanted.lines()).enumerate() {
        let place = format!("{}:{}", file.display(), n + 1);
        assert_eq!(is, was, "{place} (ECR_UPDATE_GOLDEN=1 accepts the change)");
    }
    assert_eq!(text.len(), wanted.len(), "{} (ECR_UPDATE_GOLDEN=1 accepts)", file.display());
}
