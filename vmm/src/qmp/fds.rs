// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Descriptors that a client sent along with its commands, and the names it gave to them.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::OwnedFd;

use super::request::QmpError;

/// Most descriptors that wait for `getfd`.
pub(super) const MAX_WAITING: usize = 16;
/// Most descriptors with a name; a network device of 256 queue pairs needs one or two for each.
const MAX_NAMED: usize = 512;

/// The descriptors of one client. Those that nobody took are closed with the connection.
#[derive(Debug, Default)]
pub(super) struct FdTable {
    waiting: VecDeque<OwnedFd>,
    named: BTreeMap<String, OwnedFd>,
}

impl FdTable {
    /// A descriptor has arrived. Of too many, the oldest is closed.
    pub(super) fn receive(&mut self, fd: OwnedFd) {
        if self.waiting.len() == MAX_WAITING {
            self.waiting.pop_front();
        }
        self.waiting.push_back(fd);
    }

    /// Close those that came with commands that did not want them.
    pub(super) fn forget_waiting(&mut self) {
        self.waiting.clear();
    }

    /// `getfd`: name the descriptor that came with the command.
    pub(super) fn name(&mut self, name: &str) -> Result<(), QmpError> {
        let fd = self.waiting.pop_front();
        let fd =
            fd.ok_or_else(|| QmpError::generic("No file descriptor supplied via SCM_RIGHTS"))?;
        if name.starts_with(|first: char| first.is_ascii_digit()) {
            let text = "Parameter 'fdname' expects a name not starting with a digit";
            return Err(QmpError::generic(text));
        }
        if self.named.len() >= MAX_NAMED && !self.named.contains_key(name) {
            let text = format!("{MAX_NAMED} file descriptors have names: close one first");
            return Err(QmpError::generic(text));
        }
        self.named.insert(name.to_owned(), fd);
        Ok(())
    }

    /// `closefd`.
    pub(super) fn close(&mut self, name: &str) -> Result<(), QmpError> {
        match self.named.remove(name) {
            Some(_) => Ok(()),
            None => Err(QmpError::generic(format!("File descriptor named '{name}' not found"))),
        }
    }

    /// Take all of these, or none.
    pub(super) fn take(&mut self, names: &[&str]) -> Result<Vec<OwnedFd>, QmpError> {
        for (index, name) in names.iter().enumerate() {
            if names.iter().take(index).any(|before| before == name)
                || !self.named.contains_key(*name)
            {
                let text = format!("File descriptor named '{name}' has not been found");
                return Err(QmpError::generic(text));
            }
        }
        Ok(names.iter().filter_map(|name| self.named.remove(*name)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fd() -> OwnedFd {
        std::fs::File::open("/dev/null").unwrap().into()
    }

    #[test]
    fn names_are_given_in_the_order_of_arrival_and_taken_once() {
        let mut table = FdTable::default();
        let text = "No file descriptor supplied via SCM_RIGHTS";
        assert_eq!(table.name("a").unwrap_err().desc, text);
        for name in ["a", "b"] {
            table.receive(fd());
            table.name(name).unwrap();
        }
        assert_eq!(
            table.take(&["a", "c"]).unwrap_err().desc,
            "File descriptor named 'c' has not been found"
        );
        assert!(table.take(&["a", "a"]).is_err());
        assert_eq!(table.take(&["b", "a"]).unwrap().len(), 2);
        assert_eq!(table.close("a").unwrap_err().desc, "File descriptor named 'a' not found");
    }

    #[test]
    fn neither_waiting_nor_named_descriptors_grow_without_bound() {
        let mut table = FdTable::default();
        for _ in 0..100 {
            table.receive(fd());
        }
        assert_eq!(table.waiting.len(), MAX_WAITING);
        let text = "Parameter 'fdname' expects a name not starting with a digit";
        assert_eq!(table.name("7").unwrap_err().desc, text);
        for index in 0..MAX_NAMED {
            table.receive(fd());
            table.name(&format!("fd{index}")).unwrap();
        }
        table.receive(fd());
        assert!(table.name("more").unwrap_err().desc.contains("close one first"));
    }
}
