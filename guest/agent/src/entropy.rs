// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Fresh entropy for a guest that might share its state with others, such as one made from a template (random(4)).

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;

use anyhow::{Context, Result, bail};

const DEVICE: &str = "/dev/random";

nix::ioctl_write_ptr!(
    /// linux/random.h: count bits that have been written as entropy.
    add_to_entropy_count,
    b'R',
    0x01,
    libc::c_int
);
nix::ioctl_none!(
    /// linux/random.h: use what has been written from now on.
    reseed,
    b'R',
    0x07
);

/// Mix `data` into the kernel's random numbers, and use it at once.
pub fn add(data: &[u8]) -> Result<()> {
    if data.is_empty() {
        bail!("no entropy was sent");
    }
    let bits = libc::c_int::try_from(data.len().saturating_mul(8))
        .with_context(|| format!("{} bytes of entropy", data.len()))?;
    let mut device =
        File::options().write(true).open(DEVICE).with_context(|| format!("open {DEVICE}"))?;
    device.write_all(data).with_context(|| format!("write to {DEVICE}"))?;
    let fd = device.as_raw_fd();
    // SAFETY: the descriptor is open, and the request reads one int, which lives until the call returns.
    unsafe { add_to_entropy_count(fd, &bits) }.context("count the entropy")?;
    // SAFETY: the descriptor is open, and the request has no argument.
    unsafe { reseed(fd) }.context("use the entropy")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_no_entropy() {
        assert!(add(&[]).is_err());
    }
}
