// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Operations as plain system calls on the calling thread.

use std::collections::VecDeque;
use std::io;

use vmm_sys_util::eventfd::EventFd;

use super::{BlockBackend, BlockFile, Operation};

#[derive(Debug)]
pub(super) struct SyncBackend {
    file: BlockFile,
    done: VecDeque<(u16, io::Result<()>)>,
}

impl SyncBackend {
    pub(super) fn new(file: BlockFile) -> Self {
        Self { file, done: VecDeque::new() }
    }
}

impl BlockBackend for SyncBackend {
    fn start(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn completion(&self) -> Option<&EventFd> {
        None
    }

    fn queue(&mut self, tag: u16, operation: Operation) {
        self.done.push_back((tag, self.file.run(operation)));
    }

    fn complete(&mut self) -> io::Result<Option<(u16, io::Result<()>)>> {
        Ok(self.done.pop_front())
    }

    fn wait(&mut self) -> io::Result<()> {
        Ok(())
    }
}
