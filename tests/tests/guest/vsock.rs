// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The agent is reached over vsock, through the kernel and through the VMM.

use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use ecr_agent_protocol::AGENT_PORT;
use ecr_agent_protocol::client::AgentClient;
use ecr_agent_protocol::health::CheckRequest;
use ecr_tests::guest::Boot;
use ecr_tests::place::KERNEL;
use ecr_tests::skip::{same_everywhere, skip};
use ttrpc::context;

use crate::place;

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

async fn check_health(client: AgentClient) -> Result<()> {
    let patience = context::with_duration(Duration::from_secs(30));
    let health = client.health.check(patience.clone(), &CheckRequest::new()).await?;
    ensure!(health.status.value() == 1, "not serving: {health:?}");
    let version = client.health.version(patience, &CheckRequest::new()).await?;
    ensure!(!version.agent_version.is_empty(), "{version:?}");
    Ok(())
}

#[test]
#[ignore = "boots a guest"]
fn the_agent_answers_over_vhost_vsock() -> Result<()> {
    if !Path::new("/dev/vhost-vsock").exists() {
        skip("this host has no /dev/vhost-vsock");
    }
    let cid = 0x0EC0_0000 | std::process::id();
    let mut guest = Boot::kernel(&place(), KERNEL)
        .initrd(&place(), "initrd.img")
        .with(&["--vsock", &format!("cid={cid}")])
        .start()?;
    guest.wait_ready()?;
    runtime().block_on(async {
        let stream =
            tokio_vsock::VsockStream::connect(tokio_vsock::VsockAddr::new(cid, AGENT_PORT)).await?;
        check_health(AgentClient::over(stream)).await
    })
}

#[test]
#[ignore = "boots a guest"]
fn the_agent_answers_over_the_userspace_vsock() -> Result<()> {
    same_everywhere();
    let scratch = tempfile::tempdir()?;
    let socket = scratch.path().join("vsock.sock");
    let mut guest = Boot::kernel(&place(), KERNEL)
        .initrd(&place(), "initrd.img")
        .with(&["--vsock", &format!("cid=3,socket={}", socket.display())])
        .start()?;
    guest.wait_ready()?;
    runtime()
        .block_on(async { check_health(AgentClient::connect(&socket, AGENT_PORT).await?).await })
}
