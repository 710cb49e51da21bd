// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The guest agent: the first process of the virtual machine, and the runtime's hands in it.
//!
//! As init it mounts what programs expect, loads the kernel modules that the initial RAM disk lists, moves to the root
//! file system if the initial RAM disk was asked to find one, brings up the loopback link, says in one line that the
//! guest is ready, and then serves the agent protocol on vsock until it is told to power off. Started by another init,
//! it only serves.
//!
//! `service` answers the protocol's calls; the state that they share is `sandbox`.

mod cgroup;
mod clock;
mod container;
mod debug_console;
mod device;
mod entropy;
mod exec;
mod files;
mod hotplug;
mod log_port;
mod logger;
mod loopback;
mod metrics;
mod modules;
mod mounts;
mod network;
mod options;
mod power;
mod reaper;
mod root;
mod sandbox;
mod service;
mod setup;
mod storage;
mod uevent;
mod volume;

use std::future::Future;
use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use ecr_agent_protocol::AGENT_PORT;
use ttrpc::r#async::Server;

use container::helper;
use options::Options;
use power::Stop;
use reaper::Reaper;
use sandbox::Sandbox;

const TIME_TO_ANSWER: Duration = Duration::from_millis(20);

fn main() -> ExitCode {
    let before = clock::own_work();
    let init = std::process::id() == 1;
    // Words of the kernel command line may end up as arguments of init, and mean nothing there.
    if !init && std::env::args_os().nth(1).is_some_and(|word| word == helper::ARGUMENT) {
        return helper::main();
    }
    logger::init();
    let outcome = if init { run_as_init(before) } else { run_as_service() };
    // If init returns, the kernel panics, which is what the operator has to see.
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// `before` is the CPU time that this process had used when it became the agent: it was the kernel's own before.
fn run_as_init(before: Duration) -> Result<()> {
    mounts::mount_system()?;
    let options = Options::from_kernel_command_line()?;
    log::set_max_level(options.log);
    modules::load_listed()?;
    // The runtime may tell it later.
    if let Err(error) = clock::set_from_host() {
        log::warn!("the time of day is not known: {error:#}");
    }
    if root::on_initial_ram_disk()? {
        match &options.root {
            Some(root) => drop(root::switch(root)?), // Returns only with an error.
            None => root::stay()?,
        }
    }
    options.report();
    // Without them containers have no limits, but it is still a guest to look around in.
    if let Err(error) = cgroup::prepare() {
        log::error!("control groups: {error:#}");
    }
    set_host_name();
    loopback::bring_up()?;
    let stop = runtime()?.block_on(serve_guest(&options, before))?;
    power::shut_down(stop)
}

fn run_as_service() -> Result<()> {
    let options = Options::from_kernel_command_line()?.with_environment();
    log::set_max_level(options.log);
    runtime()?.block_on(async {
        reaper::adopt_orphans()?;
        let sandbox = Sandbox::with_hotplug_limit(Reaper::start()?, options.hotplug_limit);
        start_helpers(&options, &sandbox);
        let mut signals = power::Signals::watch()?;
        let _server = start_server(&options, Arc::clone(&sandbox)).await?;
        tokio::select! {
            _ = signals.first() => {}
            () = end_of_sandbox(&sandbox) => {}
        }
        Ok(())
    })
}

/// The name in the image, if it has one. The runtime names the sandbox later.
fn set_host_name() {
    if let Ok(name) = std::fs::read_to_string("/etc/hostname")
        && let Err(error) = nix::unistd::sethostname(name.trim())
    {
        log::warn!("set the host name to {:?}: {error}", name.trim());
    }
}

/// One thread is enough: the agent waits far more than it works, and threads cost the guest memory and boot time.
fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the runtime")
}

/// Serve until somebody wants the guest stopped.
async fn serve_guest(options: &Options, before: Duration) -> Result<Stop> {
    let sandbox = Sandbox::with_hotplug_limit(Reaper::start()?, options.hotplug_limit);
    start_helpers(options, &sandbox);
    // A kernel without vsock still makes a useful guest: for `ecr.exec`, or to look around in.
    let _server = match start_server(options, Arc::clone(&sandbox)).await {
        Ok(server) => Some(server),
        Err(error) => {
            log::warn!("the runtime cannot reach this agent: {error:#}");
            None
        }
    };
    // Who reads that the agent is ready may use all of its ports, and press the power button: first listen to it all.
    let requests = power::Requests::listen()?;
    tokio::task::yield_now().await;
    announce(before);

    let program = async {
        match &options.exec {
            Some(command) => exec::run(command, &sandbox.reaper).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        stop = requests.first() => Ok(stop),
        () = program => Ok(Stop::PowerOff),
        () = end_of_sandbox(&sandbox) => Ok(Stop::PowerOff),
    }
}

/// What runs beside the calls. None of it is worth stopping the agent for.
fn start_helpers(options: &Options, sandbox: &Arc<Sandbox>) {
    sandbox.containers.set_pipe_size(options.container_pipe_size.unwrap_or_default());
    let uevents = Arc::clone(sandbox);
    run_beside("devices that are plugged", async move { uevents.uevents.listen().await });
    if let Some(port) = options.log_port {
        // Now: the first reader comes later than the first line.
        logger::keep();
        run_beside("the log port", log_port::serve(port));
    }
    if options.debug_console {
        let sandbox = Arc::clone(sandbox);
        match options.debug_console_port {
            Some(port) => run_beside("the debug console", debug_console::serve(port, sandbox)),
            None => run_beside("the debug console", debug_console::on_console(sandbox)),
        }
    }
}

fn run_beside(what: &'static str, work: impl Future<Output = Result<()>> + Send + 'static) {
    tokio::spawn(async move {
        if let Err(error) = work.await {
            log::error!("{what}: {error:#}");
        }
    });
}

/// The end of the sandbox is the end of the guest, but whoever asked for it has to be answered first.
async fn end_of_sandbox(sandbox: &Sandbox) {
    sandbox.stopped().await;
    tokio::time::sleep(TIME_TO_ANSWER).await;
}

async fn start_server(options: &Options, sandbox: Arc<Sandbox>) -> Result<Server> {
    let address = options.server_addr.clone().unwrap_or_else(|| format!("vsock://-1:{AGENT_PORT}"));
    let mut server = Server::new()
        .bind(&address)
        .with_context(|| format!("listen on {address}"))?
        .register_service(service::health())
        .register_service(service::agent(sandbox));
    server.start().await.with_context(|| format!("serve on {address}"))?;
    Ok(server)
}

/// The boot line. A console that cannot be written to is no reason to stop.
fn announce(before: Duration) {
    let uptime = clock::since_boot();
    let _ = writeln!(
        std::io::stdout(),
        "ecr-agent {} ready in {}.{:06} s",
        env!("CARGO_PKG_VERSION"),
        uptime.as_secs(),
        uptime.subsec_micros(),
    );
    let work = clock::own_work().saturating_sub(before);
    log::debug!("{} us of CPU time until then", work.as_micros());
}
