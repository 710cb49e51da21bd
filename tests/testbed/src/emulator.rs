// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The QEMU that plays the host: Debian 13's on every machine, unpacked into the cache and run with its own libraries.
//!
//! Two faults of emulation decide about it. Before QEMU 8.1 an emulated processor could go on running code that another
//! one had just rewritten, and a kernel with KVM rewrites its own code whenever a VM comes or goes (static keys): Debian 12's
//! 7.2 died of a breakpoint that nobody set. And a host with several processors, with 11.1 too, may take an
//! interrupt of another one right after VMEXIT, with the guest's registers still loaded, and dies; guests in it hang or
//! triple-fault. Either came once in some hundred VMs. A host of one processor ran hundreds without a fault, so that is
//! what tests get; several hosts share them.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use crate::arch::Arch;
use crate::{cache, tree};

/// Raised whenever this module makes something else of the same packages.
const BUILDER: u32 = 1;

/// An unpacked QEMU.
#[derive(Debug)]
pub struct Emulator {
    root: PathBuf,
    /// This machine's.
    native: Arch,
    /// The emulated one.
    program: &'static str,
}

impl Emulator {
    /// The emulator of `arch`: from the cache, or fetched now.
    ///
    /// # Errors
    /// This machine is of an architecture that the testbed does not know, a tool is missing, or packages cannot be fetched.
    pub fn get(arch: Arch) -> Result<Self> {
        let native = Arch::native().context("the testbed runs on x86_64 and aarch64")?;
        let (program, package) = arch.emulator();
        let recipe = format!(
            "builder {BUILDER}\nsuite {}\narchitecture {}\npackage {package}\nleft out {}\n",
            tree::SUITE,
            native.debian(),
            tree::LEFT_OUT.join(" ")
        );
        let name = format!("{package}-{}", cache::key(&recipe));
        let root = cache::entry(&cache::root()?.join("testbed"), &name, |into| {
            eprintln!("testbed: fetching {package} of Debian {}", tree::SUITE);
            tree::unpack(native, &[package.to_owned()], into, into)
        })?;
        Ok(Self { root, native, program })
    }

    /// Its command, without arguments for a machine.
    #[must_use]
    pub fn command(&self) -> Command {
        let path = |relative: &str| self.root.join(relative);
        let libraries = path("usr/lib").join(self.native.triplet());
        let mut command = Command::new(path(self.native.loader()));
        command
            .arg("--library-path")
            .arg(&libraries)
            .arg(path("usr/bin").join(self.program))
            .env("QEMU_MODULE_DIR", libraries.join("qemu"));
        // Firmware, which has packages of its own.
        for directory in ["usr/share/qemu", "usr/share/seabios"] {
            command.arg("-L").arg(path(directory));
        }
        command
    }
}
