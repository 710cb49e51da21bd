// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The log port: the agent's log for the host, as text lines.

use std::sync::Arc;

use anyhow::{Context, Result};
use tokio::io::AsyncWriteExt;
use tokio::sync::Semaphore;
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener, VsockStream};

use crate::logger::Reader;

/// There is one runtime; a second reader may be a person.
const MOST_READERS: usize = 4;

/// Serve for ever what [`crate::logger::keep`] has kept.
pub async fn serve(port: u32) -> Result<()> {
    let listener = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port))
        .with_context(|| format!("listen on vsock port {port} for readers of the log"))?;
    let room = Arc::new(Semaphore::new(MOST_READERS));
    loop {
        let (connection, _) = listener.accept().await.context("accept a reader of the log")?;
        // One too many is turned away.
        let Ok(place) = Arc::clone(&room).try_acquire_owned() else { continue };
        tokio::spawn(async move {
            write_log(connection).await;
            drop(place);
        });
    }
}

/// Until the reader goes away, which shows when the next line is written.
async fn write_log(mut connection: VsockStream) {
    let Some(mut reader) = Reader::new() else { return };
    while let Some(line) = reader.line().await {
        if connection.write_all(line.as_bytes()).await.is_err() {
            return;
        }
    }
}
