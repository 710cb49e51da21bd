// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The shim with a sandbox that is none: containers are processes of the host. Tests start it as containerd would; with
//! it on containerd's path, `ctr run --runtime io.containerd.ecr_fake.v2` tries the task API without a VM.

#[path = "../tests/fake/mod.rs"]
mod fake;

use std::process::ExitCode;
use std::sync::Arc;

fn main() -> ExitCode {
    ecr_shim::process::main(
        std::env::args_os().skip(1),
        |_| Arc::new(fake::FakeLauncher::default()),
        |_, _, _| Ok(()),
    )
}
