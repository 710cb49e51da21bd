// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Things by name, where making one takes time and the name is taken from the beginning.

use std::collections::HashMap;
use std::fmt::Debug;
use std::sync::Arc;

use parking_lot::Mutex;

/// Things by name; `None` stands for one that is being made.
#[derive(Debug)]
pub struct Registry<T>(Mutex<HashMap<String, Option<Arc<T>>>>);

impl<T> Default for Registry<T> {
    fn default() -> Self {
        Registry(Mutex::default())
    }
}

/// A name that is taken; free again when this is dropped without [`fill`](Self::fill).
#[derive(Debug)]
pub struct Reservation<'a, T> {
    registry: &'a Registry<T>,
    name: &'a str,
    filled: bool,
}

impl<T> Registry<T> {
    /// Take `name`; `None` if it is taken.
    pub fn reserve<'a>(&'a self, name: &'a str) -> Option<Reservation<'a, T>> {
        let mut table = self.0.lock();
        if table.contains_key(name) {
            return None;
        }
        table.insert(name.into(), None);
        Some(Reservation { registry: self, name, filled: false })
    }

    /// What has this name, if it is made already.
    pub fn get(&self, name: &str) -> Option<Arc<T>> {
        self.0.lock().get(name)?.clone()
    }

    /// Everything that is made.
    pub fn all(&self) -> Vec<(String, Arc<T>)> {
        let table = self.0.lock();
        table.iter().filter_map(|(name, one)| Some((name.clone(), one.clone()?))).collect()
    }

    /// Free the name if it is still that of `one`.
    pub fn remove(&self, name: &str, one: &Arc<T>) {
        let mut table = self.0.lock();
        if let Some(Some(present)) = table.get(name)
            && Arc::ptr_eq(present, one)
        {
            table.remove(name);
        }
    }
}

impl<T> Reservation<'_, T> {
    /// The name is that of `one` from now on.
    pub fn fill(mut self, one: Arc<T>) {
        self.filled = true;
        self.registry.0.lock().insert(self.name.into(), Some(one));
    }
}

impl<T> Drop for Reservation<'_, T> {
    fn drop(&mut self) {
        if !self.filled {
            self.registry.0.lock().remove(self.name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_taken_once() {
        let registry = Registry::default();
        let first = registry.reserve("a").unwrap();
        assert!(registry.reserve("a").is_none() && registry.get("a").is_none());
        drop(first);
        let one = Arc::new(1);
        registry.reserve("a").unwrap().fill(Arc::clone(&one));
        assert!(registry.reserve("a").is_none());
        assert_eq!(registry.get("a").as_deref(), Some(&1));
        registry.remove("a", &Arc::new(1));
        assert_eq!(registry.all().len(), 1, "another one's name is not freed");
        registry.remove("a", &one);
        assert!(registry.reserve("a").is_some());
    }
}
