// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The shim itself: serves the task API on the listener that `start` left as file descriptor 3, until containerd shuts
//! it down, SIGTERM ends it, or nothing is left to serve.

use std::collections::HashMap;
use std::env;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use containerd_shim_protos::shim_async::{Task, create_task};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{getsockopt, sockopt};
use tokio::runtime;
use tokio::signal::unix::{SignalKind, signal};
use ttrpc::r#async::transport::Listener;
use ttrpc::r#async::{Server, Service};

use super::args::Args;
use super::socket::ShimSocket;
use super::{LISTENER_FD, id, logger};
use crate::error::{Error, Kind, Result};
use crate::sandbox::Launcher;
use crate::task::events::Publisher;
use crate::task::pod::Pod;
use crate::task::service::TaskService;

/// The version of the task API that the generated bindings are called after, and the one before: they differ in name
/// only.
const VERSIONS: (&str, &str) = (".v3.", ".v2.");

/// How long the last answers may take to leave.
const FAREWELL: Duration = Duration::from_secs(1);

/// How long events may take to reach containerd once there is nothing else to do.
const LAST_EVENTS: Duration = Duration::from_secs(5);

/// Serve until the end.
pub fn serve(args: &Args, launcher: Arc<dyn Launcher>) -> Result<()> {
    id::check_container(&args.id)?;
    let listener = listener(args)?;
    start_log(args);
    let runtime = runtime::Builder::new_multi_thread()
        .thread_name("ecr-shim")
        .enable_all()
        .build()
        .map_err(|error| failed("start the runtime", &error))?;
    let result = runtime.block_on(run(args, listener, launcher));
    // What still runs are reads that nobody waits for.
    runtime.shutdown_background();
    ShimSocket::of(&args.address, &args.namespace, &args.id).remove();
    result
}

/// A bundle without the FIFO (not containerd's) has no log; a shim that cannot log works all the same.
fn start_log(args: &Args) {
    if logger::init(Path::new("log"), &args.id, args.debug).is_ok() {
        log::info!(
            "ecr {} serves sandbox {} in namespace {}",
            env!("CARGO_PKG_VERSION"),
            args.id,
            args.namespace
        );
    }
}

async fn run(args: &Args, listener: UnixListener, launcher: Arc<dyn Launcher>) -> Result<()> {
    let events = Publisher::start(&args.namespace, env::var("TTRPC_ADDRESS").ok());
    let pod = Pod::new(&args.namespace, &args.id, launcher, events.clone());
    let mut server = server(listener, &pod)?;
    let mut terminate =
        signal(SignalKind::terminate()).map_err(|error| failed("listen for SIGTERM", &error))?;
    server.start().await.map_err(|error| failed("serve the task API", &error))?;
    tokio::select! {
        () = pod.finished() => {}
        _ = terminate.recv() => {
            log::info!("SIGTERM: stopping the sandbox");
            pod.terminate().await;
        }
    }
    events.flush(LAST_EVENTS).await;
    // Waits for answers that are on their way, and for callers that hang on: no longer than this.
    let _ = tokio::time::timeout(FAREWELL, server.shutdown()).await;
    log::info!("the shim of sandbox {} ends", args.id);
    Ok(())
}

/// A server of both versions of the API, by one implementation.
pub fn server(listener: UnixListener, pod: &Arc<Pod>) -> Result<Server> {
    let unusable = |error| failed("use the listener", &error);
    listener.set_nonblocking(true).map_err(unusable)?;
    let listener = tokio::net::UnixListener::from_std(listener).map_err(unusable)?;
    let service: Arc<dyn Task + Send + Sync> = Arc::new(TaskService::new(pod.clone()));
    let (newest, before) = VERSIONS;
    let older: HashMap<String, Service> = create_task(service.clone())
        .into_iter()
        .map(|(name, service)| (name.replace(newest, before), service))
        .collect();
    Ok(Server::new()
        .add_listener(Listener::new(pod.callers.accept(listener)))
        .register_service(create_task(service))
        .register_service(older))
}

/// The socket to serve on: a path, or what `start` left open.
fn listener(args: &Args) -> Result<UnixListener> {
    if !args.socket.is_empty() {
        return UnixListener::bind(&args.socket)
            .map_err(|error| failed(&format!("listen on {}", args.socket), &error));
    }
    inherited(LISTENER_FD).map_err(|error| {
        let text = format!(
            "there is no socket to serve on at file descriptor {LISTENER_FD} ({error}): give the action start, or a \
             path with -socket"
        );
        Error::new(Kind::InvalidArgument, text)
    })
}

fn inherited(number: i32) -> io::Result<UnixListener> {
    // SAFETY: fcntl with F_GETFD takes no pointers, and tells of a number that is no open descriptor.
    if unsafe { libc::fcntl(number, libc::F_GETFD) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is open, and nothing in this process knows of it: it was opened before its first
    // instruction, and this function is called once.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    if !getsockopt(&fd, sockopt::AcceptConn)? {
        return Err(io::Error::other("it is a socket that does not listen"));
    }
    fcntl(fd.as_fd(), FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    debug_assert_eq!(fd.as_raw_fd(), number);
    Ok(UnixListener::from(fd))
}

fn failed(attempted: &str, error: &dyn std::fmt::Display) -> Error {
    Error::new(Kind::Internal, format!("{attempted}: {error}"))
}
