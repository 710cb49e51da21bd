// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Find out whether the host can run a guest at all.
//!
//! A `/dev/kvm` that opens proves little: some create VMs and then cannot emulate an instruction of a stock kernel. So
//! [`probe`] runs a guest of a few hundred bytes that does what such a kernel does while it boots, step by step, and says
//! after each that it has come so far. A step that fails is named, with the hypervisor's reason.

#[cfg(target_arch = "aarch64")]
#[path = "probe/aarch64.rs"]
mod arch;
#[cfg(target_arch = "x86_64")]
#[path = "probe/x86_64.rs"]
mod arch;

use std::fmt;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::Duration;

use ecr_arch::layout::Range;
use vm_memory::{Bytes, GuestAddress};

use crate::hypervisor::{Hypervisor, HypervisorError, IoHandler, Vcpu, VcpuSetup, Vm};
use crate::memory::{MemoryError, MemoryManager, RamBacking};
use crate::vcpu::{VcpuEvent, VcpuThread};

/// A guest that says nothing for so long is stuck.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why the host cannot run a guest.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// The hypervisor refused to build the machine.
    #[error(transparent)]
    Hypervisor(#[from] HypervisorError),
    /// The machine got no memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The host refused a thread.
    #[error("start the thread of a vCPU: {0}")]
    Thread(std::io::Error),
    /// The guest came to grief.
    #[error("a guest that does what a kernel does at boot failed at {step}: {reason}")]
    Guest {
        /// What it attempted.
        step: &'static str,
        /// What became of it.
        reason: String,
    },
}

/// What a guest has shown that the host can do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proof {
    /// What the guest did, in its order.
    pub steps: Vec<&'static str>,
}

impl fmt::Display for Proof {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.steps.join(", "))
    }
}

/// Create a VM and let it do what a kernel does at boot.
///
/// # Errors
/// What the host cannot do.
pub fn probe(hypervisor: &Arc<dyn Hypervisor>) -> Result<Proof, ProbeError> {
    arch::run(&**hypervisor)
}

/// A VM's memory.
fn ram(vm: &Arc<dyn Vm>, range: Range) -> Result<MemoryManager, ProbeError> {
    let backing = RamBacking { shared: false, hugepages: None, prealloc: false, path: None };
    let mut memory = MemoryManager::new(Arc::clone(vm));
    memory.add_ram(&[range], &backing)?;
    Ok(memory)
}

/// Put `bytes` into it.
fn load(memory: &MemoryManager, address: u64, bytes: &[u8]) -> Result<(), ProbeError> {
    memory.view().write_slice(bytes, GuestAddress(address)).map_err(|error| {
        let step = "being put into its memory";
        ProbeError::Guest { step, reason: error.to_string() }
    })
}

enum Seen {
    Step(u8),
    Event(VcpuEvent),
}

/// Where the guest writes the number of each step when it has done it: there is nothing else to write to.
struct Steps(Sender<Seen>);

impl IoHandler for Steps {
    fn mmio_read(&self, _: u64, data: &mut [u8]) {
        data.fill(0xFF);
    }
    fn mmio_write(&self, _: u64, data: &[u8]) {
        self.pio_write(0, data);
    }
    fn pio_read(&self, _: u16, data: &mut [u8]) {
        data.fill(0xFF);
    }
    fn pio_write(&self, _: u16, data: &[u8]) {
        if let [step] = data {
            // Nobody may be waiting any more.
            let _ = self.0.send(Seen::Step(*step));
        }
    }
}

/// Run the guest until it has done all of `steps`.
fn follow(
    vcpu: Box<dyn Vcpu>,
    setup: VcpuSetup,
    steps: &[&'static str],
) -> Result<Proof, ProbeError> {
    let (sender, seen) = mpsc::channel();
    let listener = {
        let sender = sender.clone();
        Arc::new(move |_, event| {
            // Nobody may be waiting any more.
            let _ = sender.send(Seen::Event(event));
        })
    };
    let thread = VcpuThread::spawn(0, vcpu, setup, Arc::new(Steps(sender)), listener)
        .map_err(ProbeError::Thread)?;
    thread.wait_paused();
    thread.resume();
    let outcome = watch(&seen, steps);
    drop(thread);
    outcome
}

/// Follow the guest's steps to the last.
fn watch(seen: &Receiver<Seen>, steps: &[&'static str]) -> Result<Proof, ProbeError> {
    for (number, &step) in (1_u8..).zip(steps) {
        let reason = match seen.recv_timeout(PATIENCE) {
            Ok(Seen::Step(done)) if done == number => continue,
            Ok(Seen::Step(done)) => format!("its result is wrong (code {done:#x})"),
            Ok(Seen::Event(VcpuEvent::Failed(text))) => text,
            Ok(Seen::Event(VcpuEvent::Shutdown(kind))) => format!("it shut down: {kind:?}"),
            Err(RecvTimeoutError::Timeout) => format!("it does nothing for {PATIENCE:?}"),
            Err(RecvTimeoutError::Disconnected) => "its vCPU is gone".into(),
        };
        return Err(ProbeError::Guest { step, reason });
    }
    Ok(Proof { steps: steps.to_vec() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor;

    /// A limited KVM may fail; then it says at what, and quickly.
    #[test]
    fn the_host_is_told_apart() {
        let Ok(host) = hypervisor::host() else { return };
        match probe(&host) {
            Ok(proof) => assert_eq!(proof.to_string().is_empty(), proof.steps.is_empty()),
            Err(ProbeError::Guest { step, reason }) => {
                assert!(!step.is_empty() && !reason.is_empty());
            }
            Err(error) => panic!("{error}"),
        }
    }
}
