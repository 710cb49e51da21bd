// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Who is connected to the task API. A stream that loses its writer just when containerd goes away has not come to its
//! end: containerd restarts, and opens it again.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::stream::{self, Stream};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::Instant;

/// Counts connections. Clones count together.
#[derive(Debug, Clone, Default)]
pub struct Callers {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    connected: usize,
    /// When the last one left.
    left: Option<Instant>,
}

impl Callers {
    /// Is somebody connected, and has nobody left for so long?
    pub fn are_steady(&self, time: Duration) -> bool {
        let state = self.state.lock();
        state.connected > 0 && state.left.is_none_or(|left| left.elapsed() >= time)
    }

    /// The connections that a listener accepts, counted.
    pub fn accept(&self, listener: UnixListener) -> impl Stream<Item = io::Result<Caller>> + use<> {
        stream::unfold((self.clone(), listener), |(callers, listener)| async {
            let accepted = listener.accept().await.map(|(stream, _)| callers.add(stream));
            Some((accepted, (callers, listener)))
        })
    }

    fn add(&self, stream: UnixStream) -> Caller {
        self.state.lock().connected += 1;
        Caller { stream, callers: self.clone() }
    }
}

/// A connection that is counted.
#[derive(Debug)]
pub struct Caller {
    stream: UnixStream,
    callers: Callers,
}

impl Drop for Caller {
    fn drop(&mut self) {
        let mut state = self.callers.state.lock();
        state.connected -= 1;
        state.left = Some(Instant::now());
    }
}

impl AsyncRead for Caller {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Caller {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
