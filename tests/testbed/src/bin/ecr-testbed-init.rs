// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Pid 1 of the testbed's emulated host.

fn main() -> std::process::ExitCode {
    ecr_testbed::init::main()
}
