// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Namespaces (namespaces(7)), and the step into a new process.

use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result, bail};
use ecr_agent_protocol::oci::Linux;
use nix::errno::Errno;
use nix::sched::{CloneFlags, setns, unshare};

/// `CLONE_INTO_CGROUP` (linux/sched.h), which only clone3(2) takes.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Everything that makes a container's view its own, but for the cgroup namespace.
const OUTER: CloneFlags = CloneFlags::CLONE_NEWNS
    .union(CloneFlags::CLONE_NEWPID)
    .union(CloneFlags::CLONE_NEWIPC)
    .union(CloneFlags::CLONE_NEWUTS)
    .union(CloneFlags::CLONE_NEWNET);

/// Which of the two processes this is after [`split`].
pub enum Side {
    Parent(i32),
    Child,
}

/// How gladly the kernel may end this process and its descendants when memory is short.
pub fn set_oom_score(adjustment: i64) -> Result<()> {
    fs::write("/proc/self/oom_score_adj", adjustment.to_string())
        .with_context(|| format!("set the OOM score adjustment to {adjustment}"))
}

/// Join the namespaces that have a path and make the others. Mount and cgroup namespaces are left for
/// [`enter_inner`]; a PID namespace is for the next process.
pub fn enter_new(linux: &Linux) -> Result<()> {
    let mut new = CloneFlags::empty();
    for namespace in &linux.namespaces {
        let flag = match namespace.type_.as_str() {
            "pid" => CloneFlags::CLONE_NEWPID,
            "ipc" => CloneFlags::CLONE_NEWIPC,
            "uts" => CloneFlags::CLONE_NEWUTS,
            "network" => CloneFlags::CLONE_NEWNET,
            "mount" | "cgroup" if namespace.path.is_empty() => continue,
            // Users are kept apart by the virtual machine.
            other => bail!(
                "namespace {other:?} with path {:?} is not supported in the guest",
                namespace.path
            ),
        };
        if namespace.path.is_empty() {
            new |= flag;
        } else {
            File::open(&namespace.path)
                .map_err(anyhow::Error::from)
                .and_then(|file| Ok(setns(file, flag)?))
                .with_context(|| {
                    format!("join the {} namespace {}", namespace.type_, namespace.path)
                })?;
        }
    }
    unshare(new).context("make namespaces")
}

/// The namespaces of a process that is in its cgroup already.
pub fn enter_inner() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWCGROUP)
        .context("make mount and cgroup namespaces")
}

/// Join the namespaces of process `init`, but for its cgroup namespace; afterwards its root is this one's. Returns what
/// [`join_inner`] needs.
pub fn join(init: i32) -> Result<OwnedFd> {
    // SAFETY: the call takes two numbers and returns a new descriptor.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, init, 0) };
    let fd = Errno::result(fd).with_context(|| format!("find the container's process {init}"))?;
    // SAFETY: the kernel has just made it for us.
    let process = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    setns(process.as_fd(), OUTER).context("join the container's namespaces")?;
    Ok(process)
}

/// Join the cgroup namespace of `process`. Only for one that is in its cgroup already: nobody can be moved to a cgroup
/// from outside of the namespace's root (cgroup_namespaces(7)).
pub fn join_inner(process: BorrowedFd<'_>) -> Result<()> {
    setns(process, CloneFlags::CLONE_NEWCGROUP).context("join the container's cgroup namespace")
}

/// Go on as two processes: the child is this process's sibling, in `cgroup`.
pub fn split(cgroup: BorrowedFd<'_>) -> Result<Side> {
    // SAFETY: all zero is a valid value of this structure of integers.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    // The signal for the parent is inherited, as clone3(2) wants it for a sibling.
    arguments.flags = libc::CLONE_PARENT as u64 | CLONE_INTO_CGROUP;
    arguments.cgroup = cgroup.as_raw_fd() as u64;
    // SAFETY: without CLONE_VM this is a fork, and this process has one thread: its copy is whole.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &arguments, size_of::<libc::clone_args>()) };
    match Errno::result(pid) {
        Ok(0) => Ok(Side::Child),
        Ok(pid) => Ok(Side::Parent(pid as i32)),
        Err(Errno::ENOMEM) => bail!(
            "make the container's process: ENOMEM; the first process of its PID namespace may have ended"
        ),
        Err(Errno::EAGAIN) => {
            bail!("make the container's process: its limit of processes is reached")
        }
        Err(error) => Err(error).context("make the container's process"),
    }
}
