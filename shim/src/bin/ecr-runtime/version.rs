// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What this program is.

/// Its version.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
/// The OCI runtime specification that containers follow.
pub const OCI: &str = "1.2.1";

/// The commit that it was built from, where the build says so.
pub fn commit() -> &'static str {
    option_env!("ECR_COMMIT").unwrap_or("unknown")
}

/// Three lines, as Kata's.
pub fn print() {
    println!("ecr-runtime  : {VERSION}");
    println!("   commit   : {}", commit());
    println!("   OCI specs: {OCI}");
}
