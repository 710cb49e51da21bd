// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The streams of a process, between the guest and what containerd named: FIFOs, files, or a logging program.
//!
//! | module | subject |
//! |---|---|
//! | [`uri`] | what containerd names |
//! | [`source`], [`sink`] | its ends, opened |
//! | [`logger`] | the logging program |
//! | [`copy`] | moving bytes, and how a process that ended gets rid of its last |

pub mod copy;
pub mod logger;
pub mod sink;
pub mod source;
pub mod uri;

pub use copy::Copying;

use logger::Logger;
use sink::Sink;
use source::Source;
use uri::Place;

use crate::error::Result;

/// The streams of a process as containerd names them. An empty name is no stream.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stdio {
    /// The process has a terminal: there is no standard error.
    pub terminal: bool,
    /// Standard input.
    pub stdin: String,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

/// The streams of a process, opened.
#[derive(Debug, Default)]
pub struct Streams {
    terminal: bool,
    stdin: Option<Source>,
    stdout: Sink,
    stderr: Sink,
    logger: Option<Logger>,
}

impl Streams {
    /// Open what containerd names, for a container in a namespace.
    pub async fn open(stdio: &Stdio, namespace: &str, container: &str) -> Result<Self> {
        let mut streams = Self { terminal: stdio.terminal, ..Self::default() };
        if let Some(place) = Place::parse("stdin", &stdio.stdin)? {
            streams.stdin = Some(Source::open(&place).await?);
        }
        let stdout = Place::parse("stdout", &stdio.stdout)?;
        let stderr = if stdio.terminal { None } else { Place::parse("stderr", &stdio.stderr)? };
        match stdout {
            None => {}
            Some(Place::Program { path, args }) => {
                let (logger, [out, err]) =
                    Logger::start(&path, &args, namespace, container).await?;
                (streams.stdout, streams.stderr) = (out, err);
                streams.logger = Some(logger);
            }
            Some(place) => streams.stdout = Sink::open(&place).await?,
        }
        match stderr {
            // A program logs both streams.
            None | Some(Place::Program { .. }) => {}
            Some(place) => streams.stderr = Sink::open(&place).await?,
        }
        Ok(streams)
    }
}
