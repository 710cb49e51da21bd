// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! `containerd-shim-ecr-v2`: what containerd starts for every pod.

use std::process::ExitCode;
use std::sync::Arc;

use ecr_shim::process;
use ecr_shim::sandbox::{HostLauncher, clean_up};

fn main() -> ExitCode {
    let arguments = std::env::args_os().skip(1);
    process::main(arguments, |_| Arc::new(HostLauncher), |_, id, bundle| Ok(clean_up(id, bundle)?))
}
