// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What `CreateSandbox` does: everything that containers share, before the first of them.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use anyhow::{Context, Result, bail};
use ecr_agent_protocol::agent::CreateSandboxRequest;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use tokio::sync::oneshot;

use crate::sandbox::{Namespaces, RUN, Sandbox};
use crate::{modules, mounts, root, storage};

/// Where namespaces are kept that no process need be in.
const NAMESPACES: &str = "/var/run/sandbox-ns";
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// Make the sandbox. There is one per guest.
pub async fn create(sandbox: &Arc<Sandbox>, request: &CreateSandboxRequest) -> Result<()> {
    if sandbox.created.swap(true, Ordering::Relaxed) {
        bail!("the sandbox of this guest has been created already");
    }
    let made = make(sandbox, request).await;
    if made.is_err() {
        sandbox.created.store(false, Ordering::Relaxed);
    }
    made
}

async fn make(sandbox: &Arc<Sandbox>, request: &CreateSandboxRequest) -> Result<()> {
    recreate(Path::new(RUN))?;
    *sandbox.namespaces.write() = keep_namespaces(request.hostname.clone()).await?;
    *sandbox.guest_hooks.write() =
        Some(&request.guest_hook_path).filter(|path| !path.is_empty()).map(PathBuf::from);
    for module in &request.kernel_modules {
        modules::load_named(&module.name, &module.parameters, &sandbox.reaper).await?;
    }
    // They stay as long as the sandbox: nobody takes their mount points back.
    storage::add_storages(sandbox, &request.storages, "").await?;
    set_name_servers(&request.dns, &Path::new(RUN).join("sandbox"), Path::new(RESOLV_CONF))
}

/// An empty directory. What is mounted below it belongs to others, and is not emptied.
fn recreate(directory: &Path) -> Result<()> {
    mounts::detach_below(directory);
    if let Ok(metadata) = fs::symlink_metadata(directory) {
        root::delete_below(directory, metadata.dev());
    }
    fs::create_dir_all(directory).with_context(|| format!("create {}", directory.display()))
}

/// New IPC and UTS namespaces, kept by bind mounts. A thread of its own goes there and does not come back.
async fn keep_namespaces(hostname: String) -> Result<Namespaces> {
    let (result, done) = oneshot::channel();
    std::thread::Builder::new()
        .name("namespaces".into())
        .spawn(move || {
            // Nobody listens if the call has run out of time.
            let _ = result.send(keep_namespaces_of_this_thread(&hostname, Path::new(NAMESPACES)));
        })
        .context("start a thread for the sandbox's namespaces")?;
    done.await.context("make the sandbox's namespaces")?
}

fn keep_namespaces_of_this_thread(hostname: &str, directory: &Path) -> Result<Namespaces> {
    fs::create_dir_all(directory)
        .with_context(|| format!("create directory {}", directory.display()))?;
    unshare(CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS)
        .context("make IPC and UTS namespaces")?;
    if !hostname.is_empty() {
        nix::unistd::sethostname(hostname)
            .with_context(|| format!("set the host name to {hostname:?}"))?;
    }
    Ok(Namespaces { ipc: Some(keep("ipc", directory)?), uts: Some(keep("uts", directory)?) })
}

fn keep(kind: &str, directory: &Path) -> Result<PathBuf> {
    let path = directory.join(kind);
    let attempt = || format!("keep the {kind} namespace at {}", path.display());
    // Of an attempt that failed later. A namespace's file cannot be opened for writing.
    let _ = umount2(&path, MntFlags::MNT_DETACH);
    File::options().create(true).append(true).open(&path).with_context(attempt)?;
    let source = format!("/proc/thread-self/ns/{kind}");
    mount(Some(source.as_str()), &path, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .with_context(attempt)?;
    Ok(path)
}

/// `lines` become the guest's name server configuration, if it has such a file: the root is read-only, and takes no new
/// one.
fn set_name_servers(lines: &[String], directory: &Path, file: &Path) -> Result<()> {
    if lines.is_empty() {
        return Ok(());
    }
    let ours = directory.join("resolv.conf");
    let attempt = || format!("write {}", ours.display());
    fs::create_dir_all(directory).with_context(attempt)?;
    fs::write(&ours, lines.join("\n") + "\n").with_context(attempt)?;
    if !file.exists() {
        return Ok(());
    }
    mount(Some(&ours), file, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .with_context(|| format!("bind {} to {}", ours.display(), file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_servers_are_written_even_where_the_image_has_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let (ours, missing) = (dir.path().join("sandbox"), dir.path().join("none"));
        set_name_servers(&[], &ours, &missing).unwrap();
        assert!(!ours.exists());
        let lines = ["search example.com".to_string(), "nameserver 10.0.0.1".to_string()];
        set_name_servers(&lines, &ours, &missing).unwrap();
        assert_eq!(
            fs::read_to_string(ours.join("resolv.conf")).unwrap(),
            "search example.com\nnameserver 10.0.0.1\n"
        );
    }

    #[test]
    fn a_directory_is_emptied() {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join("run");
        fs::create_dir_all(run.join("container/rootfs")).unwrap();
        fs::write(run.join("container/config.json"), "{}").unwrap();
        recreate(&run).unwrap();
        assert_eq!(fs::read_dir(&run).unwrap().count(), 0);
        recreate(&run.join("new")).unwrap();
    }
}
