// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! QEMU's own client library, `qemu.qmp` from PyPI, drives the server. `ECR_QMP_PYTHON` names a Python that
//! has it; `tests/qmp/requirements.txt` says which version.

use std::path::Path;
use std::process::Command;

use crate::machine::Running;

#[test]
fn qemus_own_client_drives_the_server() {
    let Some(python) = std::env::var_os("ECR_QMP_PYTHON") else {
        eprintln!("SKIPPED: ECR_QMP_PYTHON names no Python that has qemu.qmp");
        return;
    };
    let server = Running::new();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/qmp/drive.py");
    let output = Command::new(python).arg(script).arg(server.socket()).output().unwrap();
    assert!(
        output.status.success(),
        "{}\n{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    // The script's last command is quit.
    server.wait();
}
