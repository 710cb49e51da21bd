// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! This machine as the host.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::exec::{self, Attendant, CommandSpec, Ending, Stream};
use crate::files::{self, COLLECT_VARIABLE, FILES_VARIABLE, GivenFile};
use crate::host::{Host, Output};
use crate::interrupt::{Guard, Undo};

/// This machine, with a directory for the given files and one for what commands leave.
#[derive(Debug)]
pub struct Native {
    directory: TempDir,
    environment: Vec<(String, String)>,
    _cleanup: Guard,
}

impl Native {
    /// Lays the files out.
    ///
    /// # Errors
    /// No temporary directory can be made.
    pub fn new(given: &[GivenFile], environment: &[(String, String)]) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("ecr-testbed-").tempdir()?;
        let cleanup = Guard::new(Undo::Directory(directory.path().to_owned()));
        let (files, collect) = (directory.path().join("files"), directory.path().join("collect"));
        std::fs::create_dir(&files)?;
        std::fs::create_dir(&collect)?;
        files::link(given, &files)?;
        let mut environment = environment.to_vec();
        environment.push((FILES_VARIABLE.into(), files.display().to_string()));
        environment.push((COLLECT_VARIABLE.into(), collect.display().to_string()));
        Ok(Self { directory, environment, _cleanup: cleanup })
    }

    fn collected(&self) -> PathBuf {
        self.directory.path().join("collect")
    }

    fn complete(&self, spec: &CommandSpec) -> CommandSpec {
        let mut spec = spec.clone();
        spec.env = self.environment.iter().cloned().chain(spec.env).collect();
        spec
    }
}

impl Host for Native {
    fn run(&mut self, spec: &CommandSpec, output: Output<'_>) -> Result<Ending> {
        struct Forward<'a>(Output<'a>);
        impl Attendant for Forward<'_> {
            fn output(&mut self, stream: Stream, bytes: Vec<u8>) -> io::Result<()> {
                (self.0)(stream, &bytes);
                Ok(())
            }
        }
        Ok(exec::run(&self.complete(spec), None, &mut Forward(output))?)
    }

    /// The terminal is the command's own: no need to stand in between.
    fn run_on_terminal(&mut self, spec: &CommandSpec) -> Result<Ending> {
        let spec = self.complete(spec);
        let (program, arguments) = spec.argv.split_first().context("no command to run")?;
        let mut command = Command::new(program);
        command.args(arguments).envs(spec.env.iter().map(|(k, v)| (k, v)));
        Ok(command.status().with_context(|| format!("running {program}"))?.into())
    }

    fn path_of(&self, file: &GivenFile) -> String {
        self.directory.path().join("files").join(&file.name).display().to_string()
    }

    fn collect(&mut self, to: &Path) -> Result<()> {
        copy_tree(&self.collected(), to)
            .with_context(|| format!("collecting files to {}", to.display()))
    }
}

fn copy_tree(from: &Path, to: &Path) -> io::Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        let kind = entry.file_type()?;
        if kind.is_dir() {
            copy_tree(&source, &target)?;
        } else if kind.is_file() {
            std::fs::copy(&source, &target)?;
        }
    }
    Ok(())
}
