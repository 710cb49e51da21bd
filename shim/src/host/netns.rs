// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Network namespaces: which one a pod has, visiting it, and making one where nobody else did.
//!
//! A namespace belongs to a thread, and a thread that has changed it can never be given back to a pool: every visit is
//! a thread of its own, which ends with the visit.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::{Context as _, Result, anyhow, bail};
use nix::mount::MsFlags;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::statfs::fstatfs;
use oci_spec::runtime::{LinuxNamespaceType, Spec};

use crate::error::{Error, Kind};
use crate::host::mount;

/// Where namespaces with a name live; ip-netns(8) lists them.
const DIRECTORY: &str = "/run/netns";
/// File system type of a namespace file (`linux/magic.h`).
const NSFS_MAGIC: i64 = 0x6e73_6673;

/// The network namespace of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodNetns {
    /// Its file.
    pub path: PathBuf,
    /// We made it, and [`delete`] takes it away again.
    pub created: bool,
}

/// The network namespace that the specification of sandbox `id` asks for. One is made when the specification wants one
/// of its own but names none: hooks may fill it. The host's own is refused, as a guest cannot share it.
pub fn for_pod(spec: &Spec, id: &str) -> Result<PodNetns> {
    let refusal =
        || Error::new(Kind::InvalidArgument, "Host networking requested, not supported by runtime");
    let namespaces =
        spec.linux().as_ref().and_then(|linux| linux.namespaces().as_deref()).unwrap_or_default();
    let entry = namespaces.iter().find(|entry| entry.typ() == LinuxNamespaceType::Network);
    // Without an entry a container is in the namespace of its runtime (OCI config-linux, Namespaces).
    let Some(entry) = entry else { bail!(refusal()) };
    match entry.path() {
        Some(path) if !path.as_os_str().is_empty() => {
            if is_hosts(path)? {
                bail!(refusal());
            }
            Ok(PodNetns { path: path.clone(), created: false })
        }
        _ => {
            let path = path_of(id);
            create(&path)?;
            Ok(PodNetns { path, created: true })
        }
    }
}

/// Where the namespace is that [`for_pod`] makes for sandbox `id`.
pub fn path_of(id: &str) -> PathBuf {
    Path::new(DIRECTORY).join(format!("ecr-{id}"))
}

/// Whether `path` is the network namespace that this process runs in, which is containerd's.
fn is_hosts(path: &Path) -> Result<bool> {
    const OWN: &str = "/proc/self/ns/net";
    let theirs = open(path)?.metadata().with_context(|| format!("look at {}", path.display()))?;
    let own = fs::metadata(OWN).with_context(|| format!("look at {OWN}"))?;
    Ok((theirs.dev(), theirs.ino()) == (own.dev(), own.ino()))
}

fn open(path: &Path) -> Result<File> {
    let what = || format!("open network namespace {}", path.display());
    let file = File::open(path).with_context(what)?;
    // What is left of a namespace that was unmounted is an ordinary file.
    if fstatfs(&file).with_context(what)?.filesystem_type().0 != NSFS_MAGIC {
        bail!("{} is no network namespace, or one no longer", path.display());
    }
    Ok(file)
}

/// Whether the namespace at `path` is gone, and with it everything that was in it.
pub fn is_gone(path: &Path) -> bool {
    match File::open(path) {
        Ok(file) => fstatfs(&file).is_ok_and(|fs| fs.filesystem_type().0 != NSFS_MAGIC),
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    }
}

/// Run `work` in the network namespace at `path` and wait for it.
pub fn inside<T: Send>(path: &Path, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let namespace = open(path)?;
    on_own_thread(|| {
        setns(&namespace, CloneFlags::CLONE_NEWNET)
            .with_context(|| format!("enter network namespace {}", path.display()))?;
        work()
    })
}

fn on_own_thread<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    thread::scope(|scope| {
        thread::Builder::new()
            .name("ecr-netns".into())
            .spawn_scoped(scope, work)
            .context("start a thread")?
            .join()
            .unwrap_or_else(|_| Err(anyhow!("a thread in a network namespace panicked")))
    })
}

/// Make a network namespace that stays until [`delete`]. Unlike ip-netns(8) this does not turn the directory into a
/// shared mount, which would stay for good: below a shared `/run`, as systemd has it, nothing is gained by it.
fn create(path: &Path) -> Result<()> {
    let what = || format!("create network namespace {}", path.display());
    fs::create_dir_all(DIRECTORY).with_context(what)?;
    // Not truncated and not followed: a namespace may be there already.
    OpenOptions::new().write(true).create_new(true).open(path).with_context(what)?;
    let made = on_own_thread(|| {
        unshare(CloneFlags::CLONE_NEWNET)?;
        let own = Path::new("/proc/thread-self/ns/net");
        nix::mount::mount(Some(own), path, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
        Ok(())
    });
    if let Err(error) = made {
        fs::remove_file(path).with_context(what)?;
        return Err(error).with_context(what);
    }
    Ok(())
}

/// Take away a namespace that [`for_pod`] made. One that is gone is no error.
pub fn delete(path: &Path) -> Result<()> {
    mount::unmount(path)?;
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("delete network namespace {}", path.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::unistd::geteuid;
    use oci_spec::runtime::{LinuxBuilder, LinuxNamespaceBuilder, SpecBuilder};

    fn spec(path: Option<Option<&str>>) -> Spec {
        let mut namespaces = vec![];
        if let Some(path) = path {
            let entry = LinuxNamespaceBuilder::default().typ(LinuxNamespaceType::Network);
            let entry = match path {
                Some(path) => entry.path(path),
                None => entry,
            };
            namespaces.push(entry.build().unwrap());
        }
        let linux = LinuxBuilder::default().namespaces(namespaces).build().unwrap();
        SpecBuilder::default().linux(linux).build().unwrap()
    }

    #[test]
    fn the_hosts_network_is_refused_however_it_is_asked_for() {
        let text = "Host networking requested, not supported by runtime";
        let asked = [spec(None), spec(Some(Some("/proc/self/ns/net")))];
        for spec in asked {
            let error = for_pod(&spec, "x").unwrap_err();
            assert_eq!(crate::error::Error::from(error).to_string(), text);
        }
    }

    #[test]
    fn a_namespace_that_is_gone_is_named() {
        let missing = spec(Some(Some("/run/netns/no-such-namespace")));
        let error = format!("{:#}", for_pod(&missing, "x").unwrap_err());
        assert!(
            error.contains("/run/netns/no-such-namespace") && error.contains("No such file"),
            "{error}"
        );
        let file = tempfile::NamedTempFile::new().unwrap();
        let unmounted = spec(Some(file.path().to_str()));
        let error = format!("{:#}", for_pod(&unmounted, "x").unwrap_err());
        assert!(error.contains("is no network namespace"), "{error}");
        assert!(is_gone(file.path()) && is_gone(Path::new("/run/netns/no-such-namespace")));
    }

    #[test]
    fn one_is_made_when_none_is_named_and_taken_away_again() {
        if !geteuid().is_root() {
            eprintln!("SKIPPED: a network namespace needs root");
            return;
        }
        let id = format!("test-{}", std::process::id());
        let netns = for_pod(&spec(Some(None)), &id).unwrap();
        assert!(netns.created);
        assert!(!is_hosts(&netns.path).unwrap());
        assert_eq!(for_pod(&spec(Some(netns.path.to_str())), &id).unwrap().path, netns.path);
        let links =
            inside(&netns.path, || Ok(fs::read_to_string("/proc/thread-self/net/dev")?)).unwrap();
        assert_eq!(links.lines().skip(2).count(), 1, "{links}");
        // The same name again: the first stays.
        for_pod(&spec(Some(None)), &id).unwrap_err();
        assert!(!is_gone(&netns.path));
        delete(&netns.path).unwrap();
        assert!(!netns.path.exists());
        delete(&netns.path).unwrap();
    }

    #[test]
    fn a_panic_in_a_visit_is_an_error() {
        let error = on_own_thread(|| -> Result<()> { panic!("on purpose") }).unwrap_err();
        assert!(error.to_string().contains("panicked"));
    }
}
