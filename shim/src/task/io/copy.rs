// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Moving bytes between a process in the guest and its streams on the host.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, timeout};

use super::super::callers::Callers;
use super::Streams;
use super::logger::Logger;
use super::sink::Sink;
use super::source::Source;
use crate::error::Result;
use crate::sandbox::{Output, ProcessId, Sandbox};

/// So many bytes are moved at once.
const CHUNK: u32 = 256 << 10;

/// So many chunks are read ahead of what has been written.
const AHEAD: usize = 2;

/// The process has ended and the guest has sent nothing for so long: somebody who is not going to write, or not soon,
/// holds the stream.
const SILENCE: Duration = Duration::from_secs(5);

/// The process has ended and nobody has taken anything from a stream for so long: the exit waits no longer.
const PATIENCE: Duration = Duration::from_secs(10);

/// The process has ended, and its streams still flow.
const FLOOD: Duration = Duration::from_secs(60);

/// The streams of a running process. Clones are the same.
#[derive(Debug, Clone)]
pub struct Copying {
    shared: Arc<Shared>,
    input: AbortHandle,
    outputs: Arc<[AbortHandle]>,
    /// How many outputs are not at their end.
    open: watch::Receiver<usize>,
    /// Standard input has been copied and closed.
    input_done: watch::Receiver<bool>,
}

#[derive(Debug)]
struct Shared {
    /// Counts chunks read and pieces written.
    moved: AtomicU64,
    /// How many outputs wait for their reader.
    writing: AtomicU32,
    /// Standard input is to be closed once it has been copied.
    close_input: watch::Sender<bool>,
    /// Outputs are to be no readers of their own FIFOs any more.
    let_go: watch::Sender<bool>,
}

/// A FIFO without a writer for so long is at its end, unless containerd is away.
const NO_WRITER: Duration = Duration::from_millis(500);

/// containerd is not away if it has been connected for so long: it restarts, and opens the FIFO again, in less.
const STEADY: Duration = Duration::from_secs(5);

/// Whose streams they are.
struct Owner {
    sandbox: Arc<dyn Sandbox>,
    container: String,
    exec: String,
    shared: Arc<Shared>,
    callers: Callers,
}

/// How the last bytes of a process that ended went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drained {
    /// All of them arrived, or nobody is there to take them.
    Wholly,
    /// Somebody in the guest still holds a stream, silently.
    Held,
    /// The reader is slow. Copying goes on.
    Slowly,
}

impl Streams {
    /// Begin to copy, for those who call.
    pub fn start(
        self,
        sandbox: &Arc<dyn Sandbox>,
        id: ProcessId<'_>,
        callers: &Callers,
    ) -> Copying {
        let shared = Arc::new(Shared {
            moved: AtomicU64::new(0),
            writing: AtomicU32::new(0),
            close_input: watch::Sender::new(false),
            let_go: watch::Sender::new(false),
        });
        let owner = || Owner {
            sandbox: sandbox.clone(),
            container: id.container.to_owned(),
            exec: id.exec.to_owned(),
            shared: shared.clone(),
            callers: callers.clone(),
        };
        // A terminal is one stream.
        let mut outputs = vec![(Output::Stdout, self.stdout)];
        if !self.terminal {
            outputs.push((Output::Stderr, self.stderr));
        }
        let (open_sender, open) = watch::channel(outputs.len());
        let logger = Arc::new(self.logger);
        let mut copies = Vec::new();
        for (output, sink) in outputs {
            let end = OutputEnd { open: open_sender.clone(), _logger: logger.clone() };
            let copy = copy_output(owner(), output, sink, end);
            copies.push(tokio::spawn(copy).abort_handle());
        }
        let (input_sender, input_done) = watch::channel(false);
        let copy = copy_input(owner(), self.stdin, self.terminal, input_sender);
        let input = tokio::spawn(copy).abort_handle();
        Copying { shared, input, outputs: copies.into(), open, input_done }
    }
}

impl Copying {
    /// Close standard input when what is in it has been copied.
    pub fn close_input(&self) {
        self.shared.close_input.send_replace(true);
    }

    /// Wait until standard input has been copied and closed.
    pub async fn input_closed(&self) {
        // The sender goes when copying was stopped; that closes it, too.
        let _ = self.input_done.clone().wait_for(|&done| done).await;
    }

    /// The process has ended: wait until what it wrote has arrived, within reason.
    pub async fn drain(&self) -> Drained {
        let mut open = self.open.clone();
        let ended = Instant::now();
        let mut moved = (self.moved(), ended);
        loop {
            let finished = open.wait_for(|&open| open == 0);
            // The sender goes when copying was stopped.
            if timeout(SILENCE / 8, finished).await.is_ok() {
                return Drained::Wholly;
            }
            if self.moved() != moved.0 {
                moved = (self.moved(), Instant::now());
            }
            let silent_for = moved.1.elapsed();
            let writing = self.shared.writing.load(Ordering::Relaxed) > 0;
            if silent_for >= SILENCE && !writing {
                return Drained::Held;
            }
            if silent_for >= SILENCE {
                self.shared.let_go.send_replace(true);
            }
            if silent_for >= PATIENCE || ended.elapsed() >= FLOOD {
                return Drained::Slowly;
            }
        }
    }

    /// Nobody reads standard input any more: close it.
    pub fn stop_input(&self) {
        self.input.abort();
    }

    /// Stop copying and close the streams.
    pub fn stop(&self) {
        self.stop_input();
        for output in self.outputs.iter() {
            output.abort();
        }
    }

    fn moved(&self) -> u64 {
        self.shared.moved.load(Ordering::Relaxed)
    }
}

impl Owner {
    fn id(&self) -> ProcessId<'_> {
        ProcessId { container: &self.container, exec: &self.exec }
    }

    fn moved(&self) {
        self.shared.moved.fetch_add(1, Ordering::Relaxed);
    }
}

/// Says that an output is at its end, however that came about. The last one lets the logging program go.
struct OutputEnd {
    open: watch::Sender<usize>,
    _logger: Arc<Option<Logger>>,
}

impl Drop for OutputEnd {
    fn drop(&mut self) {
        self.open.send_modify(|open| *open -= 1);
    }
}

/// Copy an output to its end. Reading goes on while writing waits.
async fn copy_output(owner: Owner, output: Output, mut sink: Sink, end: OutputEnd) {
    let (chunks, mut written) = mpsc::channel::<Vec<u8>>(AHEAD);
    let read = async {
        loop {
            let data = match owner.sandbox.read(owner.id(), output, CHUNK).await {
                Ok(data) if data.is_empty() => break,
                Ok(data) => data,
                // Older agents end a stream with an error.
                Err(error) => {
                    log::debug!("{output:?} of {:?} ends: {error}", owner.id());
                    break;
                }
            };
            owner.moved();
            if chunks.send(data).await.is_err() {
                break;
            }
        }
        drop(chunks);
    };
    let write = async {
        let mut let_go = owner.shared.let_go.subscribe();
        while let Some(data) = written.recv().await {
            if let Err(error) = write_all(&owner, &mut sink, &data, &mut let_go).await {
                log::warn!("{output:?} of {:?} is lost from here on: {error}", owner.id());
                // The process must not wait for what nobody takes.
                sink = Sink::Nowhere;
            }
        }
    };
    tokio::join!(read, write);
    drop(sink);
    drop(end);
}

async fn write_all(
    owner: &Owner,
    sink: &mut Sink,
    mut data: &[u8],
    let_go: &mut watch::Receiver<bool>,
) -> io::Result<()> {
    let _writing = Writing::new(&owner.shared.writing);
    while !data.is_empty() {
        if *let_go.borrow_and_update() {
            sink.let_go()?;
        }
        tokio::select! {
            written = sink.write(data) => {
                data = data.get(written?..).unwrap_or_default();
                owner.moved();
            }
            Ok(()) = let_go.changed() => {}
        }
    }
    Ok(())
}

/// Counts a stream among those that wait for their reader.
struct Writing<'a>(&'a AtomicU32);

impl<'a> Writing<'a> {
    fn new(count: &'a AtomicU32) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Copy standard input until it ends or is to be closed, then close it.
async fn copy_input(
    owner: Owner,
    source: Option<Source>,
    terminal: bool,
    done: watch::Sender<bool>,
) {
    if let Some(source) = source {
        if let Err(error) = copy_source(&owner, source, terminal).await {
            log::debug!("stdin of {:?} ends: {error}", owner.id());
        }
    } else if terminal {
        // There is nothing to end: the terminal is only written to.
        let _ = owner.shared.close_input.subscribe().wait_for(|&close| close).await;
    }
    if let Err(error) = owner.sandbox.close_stdin(owner.id()).await {
        log::debug!("close stdin of {:?}: {error}", owner.id());
    }
    done.send_replace(true);
}

async fn copy_source(owner: &Owner, mut source: Source, terminal: bool) -> Result<()> {
    let mut close = owner.shared.close_input.subscribe();
    let mut buffer = vec![0; CHUNK as usize];
    // A FIFO has lost its last writer.
    let mut alone = false;
    loop {
        let closing = *close.borrow_and_update();
        let read = if closing {
            source.read_present(&mut buffer).await
        } else {
            tokio::select! {
                read = source.read(&mut buffer) => read,
                Ok(()) = close.changed() => continue,
                // A terminal outlives those who are attached to it.
                () = sleep(NO_WRITER), if alone && !terminal => {
                    match source.read_now(&mut buffer) {
                        // Another one has come, and has written nothing yet.
                        Ok(None) => {
                            alone = false;
                            continue;
                        }
                        Ok(Some(0)) if owner.callers.are_steady(STEADY) => return Ok(()),
                        Ok(Some(0)) => continue,
                        Ok(Some(read)) => Ok(read),
                        Err(error) => Err(error),
                    }
                }
            }
        };
        let read = read.map_err(anyhow::Error::from)?;
        match buffer.get(..read).filter(|data| !data.is_empty()) {
            Some(data) => {
                alone = false;
                write_stdin(owner, data).await?;
            }
            None if closing || !source.reopen().map_err(anyhow::Error::from)? => return Ok(()),
            None => alone = true,
        }
    }
}

async fn write_stdin(owner: &Owner, mut data: &[u8]) -> Result<()> {
    while !data.is_empty() {
        let taken = owner.sandbox.write_stdin(owner.id(), data).await?;
        data = data.get(taken..).unwrap_or_default();
        if taken == 0 {
            // A guest that takes nothing must not make us spin.
            sleep(Duration::from_millis(10)).await;
        }
    }
    Ok(())
}
