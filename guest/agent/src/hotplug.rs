// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! CPUs and memory that were plugged: the kernel has found them, and the agent puts them online.
//!
//! Containers need no new CPU sets for it: theirs are empty, which means all that are online.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::uevent::put_online;

const SYSTEM: &str = "/sys/devices/system";
const TRIES: u32 = 100;
const PAUSE: Duration = Duration::from_millis(50);

/// Bytes per memory block; 0 where the kernel has no memory hotplug.
pub fn memory_block_size() -> Result<u64> {
    let file = Path::new(SYSTEM).join("memory/block_size_bytes");
    block_size(&file).with_context(|| format!("read the memory block size from {}", file.display()))
}

fn block_size(file: &Path) -> io::Result<u64> {
    match fs::read_to_string(file) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
        text => u64::from_str_radix(text?.trim(), 16).map_err(io::Error::other),
    }
}

fn probe_file() -> PathBuf {
    Path::new(SYSTEM).join("memory/probe")
}

/// Whether the kernel has to be told about new memory, for want of ACPI.
pub fn can_probe_memory() -> bool {
    probe_file().exists()
}

/// Tell the kernel about the memory blocks at `addresses`.
pub fn probe_memory(addresses: &[u64]) -> Result<()> {
    let file = probe_file();
    for address in addresses {
        fs::write(&file, format!("{address:#X}").replacen("0X", "0x", 1))
            .with_context(|| format!("write {address:#x} to {}", file.display()))?;
    }
    Ok(())
}

/// `OnlineCPUMem`: put all memory blocks online, and CPUs until `cpus` of them are. The kernel may need a while to find
/// what was plugged.
pub async fn put_all_online(cpus: u32, memory: bool) -> Result<()> {
    put_online_below(Path::new(SYSTEM), cpus, memory, TRIES).await
}

async fn put_online_below(system: &Path, cpus: u32, memory: bool, tries: u32) -> Result<()> {
    if memory {
        // As the agent is told of each block, this is for those that came before it listened.
        for block in numbered(&system.join("memory"), "memory") {
            put_online(&block);
        }
    }
    for attempt in 0..tries {
        let online = put_cpus_online(system);
        if online >= cpus {
            return Ok(());
        }
        if attempt + 1 < tries {
            tokio::time::sleep(PAUSE).await;
        }
    }
    bail!("failed to online {cpus} CPU(s) after {tries} retries")
}

/// Returns how many are online then.
fn put_cpus_online(system: &Path) -> u32 {
    let cpus = numbered(&system.join("cpu"), "cpu");
    // A CPU that cannot be switched, such as the first one, is online.
    let online = cpus.iter().filter(|cpu| {
        put_online(cpu);
        fs::read_to_string(cpu.join("online")).map_or(true, |state| state.trim() == "1")
    });
    u32::try_from(online.count()).unwrap_or(u32::MAX)
}

/// `PREFIX` and a number, in the order of numbers.
fn numbered(directory: &Path, prefix: &str) -> Vec<PathBuf> {
    let mut found: Vec<(u64, PathBuf)> = fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let number = entry.file_name().to_str()?.strip_prefix(prefix)?.parse().ok()?;
            Some((number, entry.path()))
        })
        .collect();
    found.sort();
    found.into_iter().map(|(_, path)| path).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn switch(system: &Path, device: &str, state: Option<&str>) {
        let device = system.join(device);
        fs::create_dir_all(&device).unwrap();
        if let Some(state) = state {
            fs::write(device.join("online"), state).unwrap();
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn cpus_and_memory_are_put_online() {
        let system = tempfile::tempdir().unwrap();
        let system = system.path();
        switch(system, "cpu/cpu0", None);
        switch(system, "cpu/cpu1", Some("0\n"));
        switch(system, "cpu/cpu10", Some("1\n"));
        switch(system, "cpu/cpufreq", Some("0\n"));
        switch(system, "memory/memory32", Some("0\n"));
        put_online_below(system, 3, false, 1).await.unwrap();
        assert_eq!(fs::read_to_string(system.join("cpu/cpu1/online")).unwrap(), "1");
        assert_eq!(fs::read_to_string(system.join("cpu/cpufreq/online")).unwrap(), "0\n");
        assert_eq!(fs::read_to_string(system.join("memory/memory32/online")).unwrap(), "0\n");
        put_online_below(system, 0, true, 1).await.unwrap();
        assert_eq!(fs::read_to_string(system.join("memory/memory32/online")).unwrap(), "1");
        let error = put_online_below(system, 4, true, 1).await.unwrap_err().to_string();
        assert_eq!(error, "failed to online 4 CPU(s) after 1 retries");
    }

    #[test]
    fn memory_block_size_is_hexadecimal() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("block_size_bytes");
        assert_eq!(block_size(&file).unwrap(), 0);
        fs::write(&file, "8000000\n").unwrap();
        assert_eq!(block_size(&file).unwrap(), 128 << 20);
        fs::write(&file, "many\n").unwrap();
        assert!(block_size(&file).is_err());
    }
}
