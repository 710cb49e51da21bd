// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The architectures that the testbed can play, and everything that differs between them.

use std::fmt;

use clap::ValueEnum;

/// An architecture, by the name that `uname -m` gives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum Arch {
    /// 64-bit x86: q35, an AMD processor with nested SVM.
    #[value(name = "x86_64")]
    X86_64,
    /// 64-bit Arm: virt, entered at EL2.
    #[value(name = "aarch64")]
    Aarch64,
}

/// Version of an Arm host's interrupt controller, and so of those that its KVM has for guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Gic {
    /// As on boards with a Cortex-A72 and older.
    #[value(name = "2")]
    V2,
    /// As on servers.
    #[default]
    #[value(name = "3")]
    V3,
}

impl Arch {
    /// This machine's, if the testbed knows it.
    #[must_use]
    pub fn native() -> Option<Self> {
        match std::env::consts::ARCH {
            "x86_64" => Some(Self::X86_64),
            "aarch64" => Some(Self::Aarch64),
            _ => None,
        }
    }

    /// `uname -m`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64",
            Self::Aarch64 => "aarch64",
        }
    }

    /// `dpkg --print-architecture`.
    #[must_use]
    pub fn debian(self) -> &'static str {
        match self {
            Self::X86_64 => "amd64",
            Self::Aarch64 => "arm64",
        }
    }

    /// Debian's name of the directory with this architecture's libraries.
    #[must_use]
    pub fn triplet(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64-linux-gnu",
            Self::Aarch64 => "aarch64-linux-gnu",
        }
    }

    /// Where the C library's package has the dynamic loader.
    #[must_use]
    pub fn loader(self) -> &'static str {
        match self {
            Self::X86_64 => "usr/lib64/ld-linux-x86-64.so.2",
            Self::Aarch64 => "usr/lib/ld-linux-aarch64.so.1",
        }
    }

    /// The emulator of this architecture, and the Debian package that has it.
    #[must_use]
    pub fn emulator(self) -> (&'static str, &'static str) {
        match self {
            Self::X86_64 => ("qemu-system-x86_64", "qemu-system-x86"),
            Self::Aarch64 => ("qemu-system-aarch64", "qemu-system-arm"),
        }
    }

    /// Machine and processor with virtualisation. On x86_64 only SVM is emulated, so it is an AMD processor, without
    /// what the emulator would warn that it cannot do; on aarch64 neoverse-n1 has VHE but neither pointer
    /// authentication nor SVE, which cost the emulator most: `max` without these, and neoverse-n2, are not faster.
    #[must_use]
    pub fn machine(self, gic: Gic) -> [&'static str; 4] {
        let machine = match (self, gic) {
            (Self::X86_64, _) => "q35,usb=off,vmport=off",
            (Self::Aarch64, Gic::V2) => "virt,virtualization=on,gic-version=2",
            (Self::Aarch64, Gic::V3) => "virt,virtualization=on,gic-version=3",
        };
        let processor = match self {
            Self::X86_64 => {
                "EPYC,+svm,+npt,-rdseed,-sha-ni,-fxsr-opt,-misalignsse,-3dnowprefetch,-osvw,-topoext,\
                 -nrip-save,-xsavec"
            }
            Self::Aarch64 => "neoverse-n1",
        };
        ["-machine", machine, "-cpu", processor]
    }

    /// The kernel's name of the first serial line.
    #[must_use]
    pub fn console(self) -> &'static str {
        match self {
            Self::X86_64 => "ttyS0",
            Self::Aarch64 => "ttyAMA0",
        }
    }

    /// The Rust target of static programs.
    #[must_use]
    pub fn static_target(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64-unknown-linux-musl",
            Self::Aarch64 => "aarch64-unknown-linux-musl",
        }
    }
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
