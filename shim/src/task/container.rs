// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! A container as containerd knows it: its first process and its execs.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync;

use super::process::Process;
use crate::error::{Error, Kind, Result};
use crate::process::group::Role;

/// A container.
#[derive(Debug)]
pub struct Container {
    /// Its id.
    pub id: String,
    /// Its bundle on the host.
    pub bundle: PathBuf,
    /// What it is to the sandbox.
    pub role: Role,
    /// CRI-O made it: it looks for a file that tells of a want of memory.
    pub is_crio_s: bool,
    /// Its first process.
    pub first: Arc<Process>,
    /// Held by who changes the container.
    pub change: sync::Mutex<()>,
    execs: Mutex<HashMap<String, Arc<Process>>>,
}

impl Container {
    /// A container that has just been created.
    pub(crate) fn new(
        id: String,
        bundle: PathBuf,
        role: Role,
        is_crio_s: bool,
        first: Process,
    ) -> Self {
        Self {
            id,
            bundle,
            role,
            is_crio_s,
            first: Arc::new(first),
            change: sync::Mutex::default(),
            execs: Mutex::default(),
        }
    }

    /// Does the sandbox live as long as this container?
    pub fn owns_sandbox(&self) -> bool {
        self.role == Role::Owner
    }

    /// The first process, or an exec.
    pub fn process(&self, exec: &str) -> Result<Arc<Process>> {
        if exec.is_empty() {
            return Ok(self.first.clone());
        }
        self.execs.lock().get(exec).cloned().ok_or_else(|| {
            Error::new(Kind::NotFound, format!("exec {exec} of container {} not found", self.id))
        })
    }

    /// All execs.
    pub fn execs(&self) -> Vec<Arc<Process>> {
        self.execs.lock().values().cloned().collect()
    }

    /// Register an exec.
    pub(crate) fn add_exec(&self, process: Process) -> Result<()> {
        let mut execs = self.execs.lock();
        if execs.contains_key(&process.exec) {
            let text = format!("{} already exists", process.name());
            return Err(Error::new(Kind::AlreadyExists, text));
        }
        execs.insert(process.exec.clone(), Arc::new(process));
        Ok(())
    }

    /// Forget an exec.
    pub(crate) fn remove_exec(&self, exec: &str) {
        self.execs.lock().remove(exec);
    }
}
