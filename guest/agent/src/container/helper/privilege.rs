// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! From root to the process's user: limits, capabilities, seccomp, ids, working directory (config.md, "process").

use std::collections::HashSet;

use anyhow::{Context, Result, bail};
use caps::{CapSet, Capability, CapsHashSet};
use ecr_agent_protocol::oci::{POSIXRlimit, Process};
use nix::errno::Errno;
use nix::sys::prctl;
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};

use crate::container::seccomp::Filter;

/// Give up what the process must not have. A filter is loaded here while this is still allowed, unless the process
/// gets no new privileges: then that is done as the last step, and the filter sees less of this code.
pub fn limit(process: &Process, filter: Option<&Filter>) -> Result<()> {
    for one in &process.rlimits {
        set_limit(one)?;
    }
    if process.no_new_privileges {
        prctl::set_no_new_privs().context("forbid new privileges")?;
    } else if let Some(filter) = filter {
        filter.load()?;
    }
    let wanted = process.capabilities.get_or_default();
    drop_bounding(&set_of(&wanted.bounding))?;
    let entered = enter_directory(&process.cwd);
    become_user(process)?;
    // A directory may be the user's only, or root's only.
    if entered.is_err() {
        enter_directory(&process.cwd).map_err(|error| {
            anyhow::anyhow!(
                "chdir to cwd ({:?}) set in config.json failed: {}",
                process.cwd,
                error.desc().to_lowercase()
            )
        })?;
    }
    set_capabilities(process)
}

fn enter_directory(path: &str) -> nix::Result<()> {
    nix::unistd::chdir(if path.is_empty() { "/" } else { path })
}

fn set_limit(one: &POSIXRlimit) -> Result<()> {
    let resource = match one.type_.as_str() {
        "RLIMIT_CPU" => libc::RLIMIT_CPU,
        "RLIMIT_FSIZE" => libc::RLIMIT_FSIZE,
        "RLIMIT_DATA" => libc::RLIMIT_DATA,
        "RLIMIT_STACK" => libc::RLIMIT_STACK,
        "RLIMIT_CORE" => libc::RLIMIT_CORE,
        "RLIMIT_RSS" => libc::RLIMIT_RSS,
        "RLIMIT_NPROC" => libc::RLIMIT_NPROC,
        "RLIMIT_NOFILE" => libc::RLIMIT_NOFILE,
        "RLIMIT_MEMLOCK" => libc::RLIMIT_MEMLOCK,
        "RLIMIT_AS" => libc::RLIMIT_AS,
        "RLIMIT_LOCKS" => libc::RLIMIT_LOCKS,
        "RLIMIT_SIGPENDING" => libc::RLIMIT_SIGPENDING,
        "RLIMIT_MSGQUEUE" => libc::RLIMIT_MSGQUEUE,
        "RLIMIT_NICE" => libc::RLIMIT_NICE,
        "RLIMIT_RTPRIO" => libc::RLIMIT_RTPRIO,
        "RLIMIT_RTTIME" => libc::RLIMIT_RTTIME,
        other => bail!("limit {other:?} is not known"),
    };
    let limit = libc::rlimit { rlim_cur: one.soft, rlim_max: one.hard };
    // SAFETY: the call reads one structure.
    let outcome = unsafe { libc::setrlimit(resource, &raw const limit) };
    Errno::result(outcome).with_context(|| {
        format!("set {} to {} (soft), {} (hard)", one.type_, one.soft, one.hard)
    })?;
    Ok(())
}

/// Names that this kernel does not know are passed over: specifications are written for many kernels.
fn set_of(names: &[String]) -> CapsHashSet {
    names.iter().filter_map(|name| name.parse().ok()).collect()
}

fn drop_bounding(keep: &CapsHashSet) -> Result<()> {
    for capability in present(CapSet::Bounding)?.difference(keep) {
        caps::drop(None, CapSet::Bounding, *capability)
            .with_context(|| format!("drop {capability} from the bounding set"))?;
    }
    Ok(())
}

fn present(set: CapSet) -> Result<HashSet<Capability>> {
    caps::read(None, set).with_context(|| format!("read the {set:?} capabilities"))
}

fn become_user(process: &Process) -> Result<()> {
    let user = process.user.get_or_default();
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    // Without this the capabilities would go with root.
    prctl::set_keepcaps(true).context("keep capabilities over the change of user")?;
    let groups: Vec<Gid> = user.additional_gids.iter().map(|&gid| Gid::from_raw(gid)).collect();
    setgroups(&groups).with_context(|| format!("join groups {:?}", user.additional_gids))?;
    setresgid(gid, gid, gid).with_context(|| format!("become group {gid}"))?;
    setresuid(uid, uid, uid).with_context(|| format!("become user {uid}"))?;
    prctl::set_keepcaps(false).context("let capabilities go again")
}

fn set_capabilities(process: &Process) -> Result<()> {
    let wanted = process.capabilities.get_or_default();
    let (permitted, inheritable) = (set_of(&wanted.permitted), set_of(&wanted.inheritable));
    // Each step needs what the next one takes away.
    let steps = [
        (CapSet::Inheritable, inheritable.clone()),
        (CapSet::Effective, set_of(&wanted.effective)),
        (CapSet::Permitted, permitted.clone()),
    ];
    for (set, capabilities) in steps {
        caps::set(None, set, &capabilities)
            .with_context(|| format!("set the {set:?} capabilities"))?;
    }
    caps::clear(None, CapSet::Ambient).context("clear the ambient capabilities")?;
    for capability in set_of(&wanted.ambient) {
        // The kernel's own condition; the specification lets it fail silently.
        if permitted.contains(&capability) && inheritable.contains(&capability) {
            caps::raise(None, CapSet::Ambient, capability)
                .with_context(|| format!("raise ambient {capability}"))?;
        }
    }
    Ok(())
}

/// The home directory of `uid` as the container's `/etc/passwd` has it.
pub fn home_of(uid: u32) -> String {
    let table = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    home_in(&table, uid).unwrap_or("/").to_string()
}

/// passwd(5): name, password, uid, gid, comment, home, shell.
fn home_in(table: &str, uid: u32) -> Option<&str> {
    table.lines().find_map(|line| {
        let mut fields = line.split(':').skip(2);
        (fields.next()?.parse() == Ok(uid)).then(|| fields.nth(2))?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn homes() {
        let table = "root:x:0:0:root:/root:/bin/sh\n# odd\nme:x:1000:1000::/home/me:\nbad:x:7\n";
        assert_eq!(home_in(table, 0), Some("/root"));
        assert_eq!(home_in(table, 1000), Some("/home/me"));
        assert_eq!(home_in(table, 7), None);
        assert_eq!(home_in(table, 8), None);
    }

    #[test]
    fn unknown_capabilities_are_passed_over() {
        let names = ["CAP_CHOWN".to_string(), "CAP_OF_TOMORROW".into(), "chown".into()];
        assert_eq!(set_of(&names), HashSet::from([Capability::CAP_CHOWN]));
    }
}
