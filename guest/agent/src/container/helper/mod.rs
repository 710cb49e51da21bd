// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The helper: the agent's program, run again with one thread, which becomes a container's process.
//!
//! ```text
//! agent --spawn--> helper: reads the order, joins or makes namespaces
//!                    |  clone3(CLONE_PARENT | CLONE_INTO_CGROUP): a child of the agent, in the container's cgroup
//!                    |----> process: mounts, terminal, limits, user; "ready"; waits for "go"; execve
//!                    ends
//! ```
//!
//! Two steps, because a process is in a new PID namespace only if it is born there. The process's parent is the agent,
//! which therefore collects it like every other. Until the program is executed the process is not dumpable, so that
//! nobody in the container can reach the agent's program or memory through it.

mod device;
mod mount;
mod namespace;
mod privilege;
mod program;
mod root;
mod rootfs;
mod terminal;

use std::convert::Infallible;
use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use ecr_agent_protocol::oci::{Process, Spec};
use nix::sys::prctl;
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Gid, Uid, fchown, setsid};
use protobuf::Message;

use super::seccomp::Filter;
use super::wire::{self, Order, Report};
use namespace::Side;
use program::Program;
use rootfs::Rootfs;
use terminal::Terminal;

pub use root::Root;
pub use terminal::resize;

/// The argument that makes the agent's program the helper. The order comes on standard input.
pub const ARGUMENT: &str = "container-process";

/// Everything that the agent has sent.
struct Task {
    order: Order,
    spec: Spec,
    cgroup: OwnedFd,
    stdio: Vec<OwnedFd>,
}

/// Run as the helper. Returns only if the program was not started, or in the step that ends.
pub fn main() -> ExitCode {
    let Ok(socket) = io::stdin().as_fd().try_clone_to_owned() else { return ExitCode::FAILURE };
    let outcome = prepare(socket.as_fd());
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let report = Report::Failed(format!("{error:#}"));
            // The agent may have given up; then nobody wants to know.
            let _ = wire::send(socket.as_fd(), &report.encode(), &[]);
            ExitCode::FAILURE
        }
    }
}

/// The first step; in the process that it makes, the second one.
fn prepare(socket: BorrowedFd<'_>) -> Result<()> {
    prctl::set_dumpable(false).context("become undumpable")?;
    let task = receive_task(socket)?;
    let process = task.spec.process.get_or_default();
    namespace::set_oom_score(process.oom_score_adj)?;
    let init = match task.order {
        Order::Create => {
            namespace::enter_new(task.spec.linux.get_or_default())?;
            None
        }
        Order::Exec(init) => Some(namespace::join(init)?),
    };
    match namespace::split(task.cgroup.as_fd())? {
        Side::Parent(child) => {
            wire::send(socket, &Report::Child(child).encode(), &[])
                .context("tell the agent of the container's process")?;
            Ok(())
        }
        Side::Child => {
            let Err(error) = become_process(socket, task, init.as_ref().map(AsFd::as_fd));
            Err(error)
        }
    }
}

fn receive_task(socket: BorrowedFd<'_>) -> Result<Task> {
    let (message, fds) = wire::receive(socket).context("receive the order")?;
    let order = Order::decode(&message)?;
    let mut fds = fds.into_iter();
    let (Some(spec), Some(cgroup)) = (fds.next(), fds.next()) else {
        bail!("the order came without specification and cgroup");
    };
    let mut bytes = Vec::new();
    let mut file = File::from(spec);
    file.rewind().and_then(|()| file.read_to_end(&mut bytes)).context("read the specification")?;
    let spec = Spec::parse_from_bytes(&bytes).context("read the specification")?;
    Ok(Task { order, spec, cgroup, stdio: fds.collect() })
}

/// The second step: from here on this is the container's process.
fn become_process(
    socket: BorrowedFd<'_>,
    task: Task,
    init: Option<BorrowedFd<'_>>,
) -> Result<Infallible> {
    let Task { mut spec, stdio, .. } = task;
    let process = spec.process.take().unwrap_or_default();
    setsid().context("lead a session")?;
    // Modes are meant as they are written.
    umask(Mode::empty());

    let terminal = match init {
        None => make_container(&spec, &process)?,
        Some(init) => {
            namespace::join_inner(init)?;
            Terminal::open_if_wanted(&process, None)?
        }
    };
    let user = process.user.get_or_default();
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    match &terminal {
        Some(terminal) => terminal.become_stdio(uid)?,
        None => become_stdio(&stdio, uid, gid)?,
    }
    umask(Mode::from_bits_truncate(0o022));

    let seccomp = spec.linux.get_or_default().seccomp.as_ref();
    let filter = seccomp.map(Filter::compile).transpose()?;
    privilege::limit(&process, filter.as_ref())?;
    let program = Program::find(&process)?;

    let master: Vec<_> = terminal.iter().map(|terminal| terminal.master().as_raw_fd()).collect();
    wire::send(socket, &Report::Ready.encode(), &master).context("say that all is prepared")?;
    drop(terminal);
    let (answer, _) = wire::receive(socket).context("wait for the start")?;
    if answer != wire::GO {
        bail!("the container was given up before it was started");
    }
    if process.no_new_privileges
        && let Some(filter) = &filter
    {
        filter.load()?;
    }
    program.execute()
}

/// Namespaces that need the cgroup, the host name, and the container's root.
fn make_container(spec: &Spec, process: &Process) -> Result<Option<Terminal>> {
    let linux = spec.linux.get_or_default();
    namespace::enter_inner()?;
    let has_uts = linux.namespaces.iter().any(|one| one.type_ == "uts");
    if has_uts && !spec.hostname.is_empty() {
        nix::unistd::sethostname(&spec.hostname)
            .with_context(|| format!("set the host name to {:?}", spec.hostname))?;
    }
    let rootfs = Rootfs::prepare(spec)?;
    rootfs.mount_all(&spec.mounts)?;
    rootfs.make_devices(spec)?;
    let terminal = Terminal::open_if_wanted(process, Some(rootfs.root()))?;
    if let Some(terminal) = &terminal {
        rootfs.bind_console(terminal)?;
    }
    rootfs.make_working_directory(&process.cwd)?;
    rootfs.protect(spec)?;
    rootfs.enter(&linux.rootfs_propagation)?;
    Ok(terminal)
}

fn become_stdio(stdio: &[OwnedFd], uid: Uid, gid: Gid) -> Result<()> {
    let [input, output, error] = stdio else { bail!("the order came without standard streams") };
    nix::unistd::dup2_stdin(input).context("set standard input")?;
    nix::unistd::dup2_stdout(output).context("set standard output")?;
    nix::unistd::dup2_stderr(error).context("set standard error")?;
    for stream in stdio {
        // So that the user can open /dev/stdout and the like again.
        fchown(stream, Some(uid), Some(gid)).context("give the standard streams to the user")?;
    }
    Ok(())
}
